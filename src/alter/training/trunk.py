"""The trunk: the blocks below the first adapted one, which training never changes. Its outputs for the rows are computed once.

The frozen pass writes the trunk's hidden states to a file, and every step starts from them at the first adapted block.
They are stored in the model's own dtype, so that a step gives the same numbers as one through the whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from alter.adapter import alter_of, base_fingerprint, block_of, first_block
from alter.core import processes, show
from alter.data import Encoded
from alter.groundwork import frozen_pass
from alter.logits import Depth, standing_in, states_of
from alter.storage import digest
from alter.training.states import States

if TYPE_CHECKING:
    from alter.training.settings import Unlearn

TRUNK_FILE = "trunk.safetensors"
"""File of the states, in the run's folder."""

WATCHED_FILE = "watched.safetensors"
"""File of the states of a watched run's rows."""


@dataclass
class Trunk:
    """The blocks of a model below the first one with an adapter.

    Attributes:
        blocks: at least one.
        above: the blocks that follow.
        tuple_length: 0 where a block puts out its hidden states alone, else the length of the tuple that begins with them.
    """

    blocks: Sequence[nn.Module]
    above: Sequence[nn.Module] = ()
    tuple_length: int = 0
    _depth: Depth = field(init=False)

    def __post_init__(self) -> None:
        self._depth = Depth(self.blocks[-1], tuple(self.above))

    @contextmanager
    def reading(self, alone: bool = False) -> Iterator[list[Tensor]]:
        """Inside the block, append the trunk's output [B, T, D] of every pass to the list; `alone`: the blocks above do not run."""

        def note(_: nn.Module, __: Any, output: Any) -> None:
            self.tuple_length = len(output) if isinstance(output, tuple) else 0

        handle = self.blocks[-1].register_forward_hook(note)
        try:
            with states_of(self._depth, alone) as seen:
                yield seen
        finally:
            handle.remove()

    @contextmanager
    def done(self, states: Tensor) -> Iterator[None]:
        """Inside the block, replace the trunk's output by these states [B, T, D]; its blocks do not run."""

        def given(*_: Any, **__: Any) -> Any:
            return (states, *[None] * (self.tuple_length - 1)) if self.tuple_length else states

        with standing_in(self.blocks, given):
            yield


def trunk_of(model: Any) -> Trunk | None:
    """Return the trunk of a model with an adapter; None where there is no block below it, or what trains is not in blocks alone."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        return None
    inner = model.get_base_model()
    if alter_of(model) is None:
        place = _first_adapted(inner)
    else:
        from_layer = model.peft_config["default"].from_layer
        # without it the router reads every block
        place = None if from_layer is None else first_block(inner, from_layer)
    return None if place is None or place[1] == 0 else trunk_below(inner, *place)


def trunk_below(inner: nn.Module, prefix: str, first: int) -> Trunk:
    """Return the blocks below number `first`, at least 1, of the list of blocks with this prefix."""
    listed = list(inner.get_submodule(prefix.rstrip(".")).children())
    return Trunk(listed[:first], listed[first:])


def _first_adapted(inner: nn.Module) -> tuple[str, int] | None:
    """Return the list of blocks and the number of the first one in which something is adapted or trains; None if that is elsewhere too."""
    names = [name for name, part in inner.named_modules() if isinstance(part, BaseTunerLayer)]
    names += [name for name, weight in inner.named_parameters() if weight.requires_grad]
    places = {block_of(f"{name}.") for name in names}
    lists = {None if place is None else place[0] for place in places}
    return min(place for place in places if place is not None) if len(lists) == 1 and None not in lists else None


def _dropout(model: Any, trunk: Trunk) -> bool:
    """Tell whether the trunk applies dropout in training mode, which makes its output random."""
    config = model.config.get_text_config()
    names = (
        "attention_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "hidden_dropout",
        "dropout",
        "embed_dropout",
    )
    return any(getattr(config, name, 0.0) for name in names) or any(
        isinstance(part, nn.Dropout) and part.p > 0 for block in trunk.blocks for part in block.modules()
    )


GIB = 2**30

MOST_ROUNDING = 0.02
"""Largest relative difference between the base's output with and without its trunk that 16-bit rounding explains."""


def plain_because(
    run: Unlearn, model: Any, trunk: Trunk, depth: Depth | None, tokens: int, folder: Path
) -> str | None:
    """Return why the trunk's states cannot be cached, so that every step runs it; None if they can."""
    size = model.config.get_text_config().hidden_size * model.dtype.itemsize * tokens
    if not run.trunk_gib:
        return "trunk_gib is 0"
    if processes.size() > 1:
        return "several processes train together"
    if processes.launch() != "ddp":
        return "the model is sharded"
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        return "upper blocks read keys and values of lower ones"
    if run.gradient_checkpointing:
        return "gradient_checkpointing is on"
    if run.quantization is not None:
        return "the base is quantised"
    if depth is not None and any(depth.block is block for block in trunk.blocks):
        return "the objective reads hidden states below the adapter"
    if _dropout(model, trunk):
        return "the model has dropout"
    if size > run.trunk_gib * GIB:
        return f"they take {size / GIB:.1f} GiB and trunk_gib is {run.trunk_gib:g}"
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        return f"they take {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB of the disk are free"
    return None


@dataclass(frozen=True)
class KeptStates:
    """A trunk with its cached output for the rows of each branch, by row number."""

    trunk: Trunk
    states: States
    place: dict[tuple[str, int], int]

    def of(self, branch: str, row: int) -> Tensor:
        """Return the states [T, D] of a row."""
        return self.states[self.place[branch, row]]

    def read(self) -> bool:
        """Tell whether the file exists and is complete."""
        found = self.states.read()
        if found:
            self.trunk.tuple_length = self.states.tuple_length
        return found

    def agrees(self, model: Any, branch: str, row: int, ids: Sequence[int]) -> bool:
        """Tell whether the base gives the same output from the cached states; not where later blocks read more than the
        trunk's output.
        """
        tokens = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            whole = frozen_pass(model, tokens, torch.ones_like(tokens)).states
            with self.trunk.done(self.of(branch, row)[None].to(model.device)):
                upper = frozen_pass(model, tokens, torch.ones_like(tokens)).states
        return float((upper - whole).float().norm()) <= MOST_ROUNDING * float(whole.float().norm())


class WatchedStates:
    """A trunk with its output for the rows of a run's checks: the first check writes it, later checks start from it.

    Args:
        trunk: of a model on which `KeptStates.agrees`.
        path: the file, for its owner alone.
        key: of the model, where it has one.
        rows: of the checks, with `input_ids`.
    """

    def __init__(self, trunk: Trunk, path: Path, key: str | None, rows: Sequence[Encoded]) -> None:
        self.trunk = trunk
        self.lengths = [len(row.input_ids) for row in rows]
        self.states = States(path, digest(key, [row.input_ids for row in rows]), self.lengths)
        self.wrong: str | None = None
        # a run that goes on finds those of its first check
        self.written = self.states.read()

    @contextmanager
    def around(self, batch: Sequence[int], length: int) -> Iterator[None]:
        """Wrap a pass over these rows, padded on the right to `length`: skip its trunk, or cache the trunk's output."""
        if self.written:
            device = next(self.trunk.blocks[0].parameters()).device
            states = pad_sequence([self.states[i] for i in batch], batch_first=True).to(device)
            with self.trunk.done(F.pad(states, (0, 0, 0, length - states.shape[1]))):
                yield
            return
        with self.trunk.reading() as seen:
            yield
        try:
            for place, i in enumerate(batch if self.wrong is None else ()):
                self.states.write(i, seen[0][place, : self.lengths[i]])
        except OSError as error:
            self._stop(error)

    def end(self) -> None:
        """End a check, after all rows have passed."""
        if self.written or self.wrong is not None:
            return
        try:
            self.states.close()
            self.written = True
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        self.wrong = f"{self.states.path} cannot be written ({error.strerror})"
        self.states.give_up()
        show(f"Every check runs the blocks below the adapter: {self.wrong}.", stderr=True, markup=False)


def watched_states(
    run: Unlearn, model: Any, kept: KeptStates | None, rows: Sequence[Encoded], folder: Path
) -> WatchedStates | None:
    """Return the trunk's states for a run's checks; None where training caches none, or the disk budget has no room left."""
    if kept is None or not rows:
        return None
    tokens = kept.states.tokens + sum(len(row.input_ids) for row in rows)
    if plain_because(run, model, kept.trunk, None, tokens, folder) is not None:
        return None
    return WatchedStates(kept.trunk, folder / WATCHED_FILE, base_fingerprint(model), rows)


def say_plain(why: str) -> None:
    """Report that every step runs all blocks, and why."""
    show(f"Every step runs the blocks below the adapter, whose states are not kept: {why}.", stderr=True)


class Sink:
    """Writes the trunk's outputs during the frozen pass; a full disk stops the writing, not the run."""

    def __init__(self, kept: KeptStates) -> None:
        self.kept = kept
        self.wrong: str | None = None

    def of(self, branch: str, rows: Sequence[int]) -> Callable[[int, Tensor], None]:
        """Return a function that stores the states [T, D] of the i-th of these rows of a branch."""

        def take(i: int, states: Tensor) -> None:
            if self.wrong is not None:
                return
            self.kept.states.tuple_length = self.kept.trunk.tuple_length
            try:
                self.kept.states.write(self.kept.place[branch, rows[i]], states)
            except OSError as error:
                self._stop(error)

        return take

    def end(self) -> bool:
        """Finish writing; return whether all states were written and can be read."""
        try:
            if self.wrong is None:
                self.kept.states.close()
        except OSError as error:
            self._stop(error)
        return self.wrong is None and self.kept.read()

    def _stop(self, error: OSError) -> None:
        self.wrong = f"{self.kept.states.path} cannot be written ({error.strerror})"
        self.kept.states.give_up()
        say_plain(self.wrong)
