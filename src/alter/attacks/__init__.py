"""Attempts to bring the forgotten back."""
