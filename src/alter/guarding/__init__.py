"""`alter guard`: make an inference-time guard from a model and rows, and save it as a folder for `--adapter`."""
