"""The ranks of one distributed run, as `accelerate launch` and `torchrun` start them.

Every rank reads the data and, unless training shards the model, holds all of its weights. `spread` divides work over the
ranks, `count` and `total` sum over them (all-reduce), and rank 0 alone writes files. Without a launcher there is one
process, and every function here acts as its single-process form.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from alter.core import forked
from alter.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=7)
"""Timeout of collectives: how long ranks wait while one works alone. A rank that dies is noticed at once regardless."""


@dataclass(frozen=True)
class _Joined:
    """This rank within its process group; `peers` holds host, pid and start time of each rank."""

    rank: int
    size: int
    group: Any
    peers: list[tuple[str, int, float]]


_joined: _Joined | None = None


def start(device: str | None = None) -> None:
    """Join the launch's process group (gloo, beside accelerate's own); a no-op without a launcher or once joined.

    Args:
        device: what the command was asked to run on; None: the GPU of this process, if there are GPUs.

    Raises:
        UserError: the launch asks for a sharded model where accelerate cannot shard one, or all processes for one GPU.
    """
    global _joined
    if _joined is not None or launched() < 2:
        return
    if device is not None and ":" in device:
        raise UserError(
            f"`device` {device} would put {launched()} processes on one GPU: leave it out, each takes its own."
        )
    import psutil
    import torch
    import torch.distributed as dist
    from accelerate import DistributedType, PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if launch() != "ddp" and state.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            "The launch asks for a sharded model, and accelerate shards over GPUs only: launch with "
            "recipes/accelerate/ddp.yaml on CPUs."
        )
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    own = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
    peers: list[Any] = [None] * state.num_processes
    dist.all_gather_object(peers, own, group)
    _joined = _Joined(state.process_index, state.num_processes, group, peers)


def stop() -> None:
    """Wait at a barrier for every rank, then destroy the process group."""
    global _joined
    if _joined is None:
        return
    import torch.distributed as dist

    gather(None)
    dist.destroy_process_group()
    _joined = None


def launched() -> int:
    """Return the number of processes that the launcher started (`WORLD_SIZE`); 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch() -> str:
    """Return how the launch divides the model while training: fsdp2, zero3, or ddp (not at all), as recipes/accelerate."""
    for name, kind in (("FSDP", "fsdp2"), ("DEEPSPEED", "zero3")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            return kind
    return "ddp"


def rank() -> int:
    """Return this process's rank, from 0."""
    if _joined is not None:
        return _joined.rank
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def size() -> int:
    """Return the number of ranks that `start` has joined; 1 before and without it."""
    return 1 if _joined is None else _joined.size


def first() -> bool:
    """Tell whether this is rank 0, which prints and writes files."""
    return rank() == 0


def place() -> str:
    """Return the GPU of this process: cuda, or cuda:N where several processes share a machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() > 1 and "LOCAL_RANK" in os.environ else "cuda"


# Work ----------------------------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """All-gather a pickled value: those of all ranks, in rank order. Every rank must call it."""
    if _joined is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _joined.size
    dist.all_gather_object(values, value, _joined.group)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result; the other ranks wait.

    Raises:
        UserError: the one that `work` raised there, on every rank.
    """
    outcome: Any = None
    if first():
        try:
            outcome = work()
        except UserError as error:
            if size() == 1:
                raise
            outcome = error
    outcome = gather(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    result: T = outcome
    return result


def in_turn(work: Callable[[], T]) -> T:
    """Run `work` on rank 0, then on the other ranks, which find the files that rank 0 wrote."""
    kept: list[T] = []
    from_first(lambda: kept.append(work()))
    return kept[0] if kept else work()


def spread(items: Sequence[T], work: Callable[[T], R], model: Any = None, *, apart: bool = False) -> Iterator[R]:
    """Yield `work(item)` of every item, in order, on every rank; each rank computes its share, and results are gathered.

    Args:
        items: the same on every rank.
        work: a function of the item alone, so that results equal those of one process.
        model: what `work` runs, if anything. FSDP and ZeRO-3 gather a sharded model's weights in a forward pass that all
            ranks make together, so each rank then computes all items.
        apart: `work` has no effect but its result, and takes no gradients: where there is one rank, forks of this process may
            compute it (`alter.core.forked`).

    Raises:
        UserError: the one that `work` raised for the earliest failing item, on every rank.
    """
    if size() == 1 or (model is not None and sharded(model)):
        forks = forked.number(len(items), model) if apart and size() == 1 else 1
        yield from map(work, items) if forks == 1 else forked.mapped(items, work, forks)
        return
    for begin in range(0, len(items), size()):
        outcome: Any = None
        if begin + rank() < len(items):
            try:
                outcome = work(items[begin + rank()])
            except UserError as error:
                outcome = error
        outcomes = gather(outcome)[: len(items) - begin]
        for found in outcomes:
            if isinstance(found, UserError):
                raise found
        yield from outcomes


def sharded(model: Any) -> bool:
    """Tell whether a model's weights are sharded over the ranks (FSDP2, DeepSpeed ZeRO-3)."""
    return any(type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id") for weight in model.parameters())


def total(values: Tensor) -> Tensor:
    """All-reduce (sum) a tensor over the ranks, without gradient; every rank must call it."""
    values = values.detach().clone()
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def count(n: int, like: Tensor) -> Tensor | int:
    """All-reduce `n` for use as a divisor: its sum over the ranks, at least 1; a tensor on the device of `like`."""
    if size() == 1:
        return max(n, 1)
    import torch

    return total(torch.tensor(float(n), device=like.device)).clamp_min(1.0)


# Ends ----------------------------------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """The launcher sent SIGTERM."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def lost(wait: float = 0.0) -> list[int]:
    """Return ranks of this machine whose process has ended; polls until there is one or `wait` seconds are over."""
    if _joined is None:
        return []
    import psutil

    until = time.monotonic() + wait
    while True:
        found = []
        for number, (host, pid, began) in enumerate(_joined.peers):
            if host != socket.gethostname():
                continue
            try:
                process = psutil.Process(pid)
                gone = process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - began) > 1
            except psutil.NoSuchProcess:
                gone = True
            if gone:
                found.append(number)
        if found or time.monotonic() > until:
            return found
        time.sleep(0.05)


@contextlib.contextmanager
def together(remedy: str, device: str | None = None) -> Iterator[None]:
    """Join the process group; if a rank ends inside the block, the others end with one line that names it.

    A process alone may spread work over forks of it inside the block (`spread`).

    Args:
        remedy: what the user can do then.
        device: see `start`.

    Raises:
        UserError: another rank is gone, or the launcher sent SIGTERM.
    """
    start(device)
    if size() == 1:
        with forked.allowed():
            yield
        return
    watched = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if watched else None
    try:
        yield
    except UserError:
        raise
    except (Exception, _Terminated) as error:
        if watched:
            # the launcher sends SIGTERM to all ranks once one is gone; the message must be out before
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gone = lost(3.0)
        peers = _joined.peers if _joined is not None else []
        if gone:
            named = ", ".join(f"{number} (pid {peers[number][1]})" for number in gone)
            raise UserError(
                f"Of {size()} processes, this one has ended before its work was done: {named}. {remedy}"
            ) from None
        if isinstance(error, _Terminated):
            raise UserError(f"The launcher has ended this process (SIGTERM). {remedy}") from None
        elsewhere = sorted({host for host, _, _ in peers} - {socket.gethostname()})
        if elsewhere and isinstance(error, RuntimeError) and "onnection" in str(error):
            raise UserError(
                f"A process on another machine ({', '.join(elsewhere)}) has ended or is cut off. {remedy}"
            ) from None
        raise
    finally:
        if watched and signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what ranks other than 0 print inside the block; exceptions pass through."""
    if first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            # the launcher ends all ranks once one is gone: rank 0 needs time to print why
            time.sleep(3)
            raise


def speaks() -> bool:
    """Tell whether this rank prints the error that ends the run: true for the first rank that asks the launch's store."""
    if launched() < 2:
        return True
    import torch.distributed as dist

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        return store.add("alter/said", 1) == 1
    except (KeyError, RuntimeError):
        # no store, or the rank that served it is gone
        return _joined is not None or first()
