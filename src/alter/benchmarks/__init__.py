"""Benchmarks: splits, prompts, and which metric is read on which split; one file reads as one paper's table."""
