"""From rows to batches: where rows come from, their one form, token ids with labels, sub-domains."""
