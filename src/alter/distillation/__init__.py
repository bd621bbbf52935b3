"""`alter distill`: what an adapter hides, plain weights no longer know."""
