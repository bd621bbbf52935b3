"""Presentation of results: tables in the terminal, figures, HTML."""
