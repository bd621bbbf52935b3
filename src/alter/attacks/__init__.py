"""Attacks that try to recover what was forgotten."""
