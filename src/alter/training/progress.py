"""Progress of training: one bar with step, time left and last loss; in a file or pipe a line now and then."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from alter.core import LOG, Beats, is_silent


class Steps(TrainerCallback):
    """Shows the steps of a run on stderr, on rank 0; as a library, logs each as info (see `console.progress`)."""

    def __init__(self, label: str = "training") -> None:
        self.label = label
        self.bar: Progress | None = None
        self.tell: Beats | None = None
        self.loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar, at the step that a resumed run starts from."""
        if is_silent() or not state.is_world_process_zero:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        # a redirected stderr gets the finished bar as one line, and lines on the way
        self.tell = None if console.is_interactive else Beats(self.label, state.max_steps, state.global_step)
        self.bar = Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
        self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step, loss="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
            if self.tell is not None:
                self.tell(state.global_step, self.loss)
        elif is_silent():
            fields = {"label": self.label, "done": state.global_step, "total": state.max_steps}
            LOG.info("%s: %d of %d", self.label, state.global_step, state.max_steps, extra=fields)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss beside the bar."""
        if self.bar is not None and logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3g}"
            self.bar.update(self.bar.task_ids[0], loss=self.loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Close the bar; may be called twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
