"""A single progress line during training: step, time left, last loss, instead of a line for each logged step."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from alter.core import LOG, is_silent


class Steps(TrainerCallback):
    """Shows the steps of a run on stderr, on rank 0; as a library, logs each as info (see `console.progress`)."""

    def __init__(self, label: str = "training") -> None:
        self.label = label
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar, at the step that a resumed run starts from."""
        if is_silent() or not state.is_world_process_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # a redirected stderr gets the finished bar as one line
        self.bar = Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True))
        self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step, loss="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        elif is_silent():
            fields = {"label": self.label, "done": state.global_step, "total": state.max_steps}
            LOG.info("%s: %d of %d", self.label, state.global_step, state.max_steps, extra=fields)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss beside the bar."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.update(self.bar.task_ids[0], loss=f"loss {float(logs['loss']):.3g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Close the bar; may be called twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
