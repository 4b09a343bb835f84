"""Responses leave vLLM's engine when they are whole."""

from tests.vllm.scripts import run_script


def test_tokens_wait_for_their_responses_last() -> None:
    assert "WHOLE" in run_script("left_whole.py")
