"""Benchmarks, one file each, and how they are run, judged and cached."""
