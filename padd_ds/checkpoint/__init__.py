"""Checkpoints of a run on disk, and their export; without DeepSpeed."""
