"""`alter compare`: methods side by side with an equal budget; the plan, its cells, the table."""
