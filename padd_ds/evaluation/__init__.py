"""Benchmarks, perplexity, reports."""
