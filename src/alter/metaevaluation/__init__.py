"""Which metrics to trust: pools of models that know or do not know, and every metric tried on them."""
