"""Guards at inference: make one for a model and rows, and save it as a folder that `--adapter` takes."""
