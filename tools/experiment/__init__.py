"""The experiment that holds PADD against its baselines and its own parts, on a teacher of a million parameters."""
