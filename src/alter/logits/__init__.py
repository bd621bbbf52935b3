"""What is computed on logits without holding them whole: token entropies, and a head that works in pieces."""
