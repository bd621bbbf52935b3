"""Erasure requests over time: who asked, what was forgotten, which expert holds it, what the evidence is; and undo."""
