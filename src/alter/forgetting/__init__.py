"""From a subject or a document to an adapter: rows, probes, training, and what changed."""
