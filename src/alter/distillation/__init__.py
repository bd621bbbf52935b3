"""`alter distill`: train plain weights that no longer know what an adapter hides."""
