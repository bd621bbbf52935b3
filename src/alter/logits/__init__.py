"""Computations on logits that are never held whole: token entropies, and a head that works in chunks."""
