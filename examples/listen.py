"""Follow a run from a service: notes arrive at a logger, steps at a callback. `python examples/listen.py`."""

import logging
import tempfile

from transformers import TrainerCallback

import alter

logging.basicConfig(level=logging.WARNING)


class Steps(TrainerCallback):
    """Prints the number of each step that has ended."""

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step} of {state.max_steps}")


with tempfile.TemporaryDirectory() as folder:
    alter.unlearn(
        "builtin:tofu-mini/original",
        forget="builtin:forget10[:10]",
        retain="builtin:retain90[:40]",
        method="npo",
        max_steps=2,
        batch_size=4,
        device="cpu",
        out=f"{folder}/run",
        callbacks=[Steps()],
    )
