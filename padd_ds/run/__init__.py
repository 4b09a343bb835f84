"""The folder that a run leaves, and the loop that fills it."""
