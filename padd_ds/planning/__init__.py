"""What a run will need, before it runs: memory, communication, computation and time, from shapes alone."""
