"""Run configuration without torch."""
