"""Rollouts by vLLM servers: started, kept in step with the student's weights, asked, watched and ended.

`exchange` and `worker` also run inside vLLM's interpreter, which may be another one than the trainer's: they import
torch, and `worker` vLLM, alone.
"""
