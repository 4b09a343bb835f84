"""Dense checkpoint to MoE checkpoint."""
