"""One run: settings, rows and batches, the router, the loss, checkpoints; `run.unlearn` reads downwards."""
