"""Erasure requests over time: who asked, what was forgotten, which expert holds it, the evidence, and revoking."""
