"""`alter forget`: from a subject or a document to rows, probes, an adapter, and a measure of what changed."""
