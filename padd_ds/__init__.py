"""PADD: dense language models into mixture-of-experts students, on DeepSpeed."""

__version__ = "0.1.0"
