"""Reading, splitting, batching."""
