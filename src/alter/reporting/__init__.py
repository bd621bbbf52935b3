"""How results are drawn: tables in the terminal, figures, HTML."""
