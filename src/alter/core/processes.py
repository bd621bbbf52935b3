"""Several processes that do one run together, as `accelerate launch` and `torchrun` start them.

Every process reads the data and, unless the model is sharded while it trains, holds all of the model. Work is divided
with `spread`, sums over all of them are taken with `count` and `total`, files are written by the first alone. Outside of
such a launch there is one process, and every function here does the plain thing.
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

from alter.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(days=7)
"""How long a process waits where another works alone. One that has died is noticed at once, whatever this says."""


@dataclass(frozen=True)
class _Joined:
    """The processes after they have met; `peers` holds machine, pid and start of each."""

    rank: int
    size: int
    group: Any
    peers: list[tuple[str, int, float]]


_joined: _Joined | None = None


def start(device: str | None = None) -> None:
    """Meet the other processes of the launch, if there are any and this has not happened yet.

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
            f"--device {device} would put {launched()} processes on one GPU: leave it out, each takes its own."
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
    """Part from the other processes when all have come this far."""
    global _joined
    if _joined is None:
        return
    import torch.distributed as dist

    gather(None)
    dist.destroy_process_group()
    _joined = None


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch() -> str:
    """How the launch divides the model while it trains: fsdp2, zero3, or ddp (not at all), as recipes/accelerate."""
    for name, kind in (("FSDP", "fsdp2"), ("DEEPSPEED", "zero3")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            return kind
    return "ddp"


def rank() -> int:
    """The number of this process, from 0."""
    if _joined is not None:
        return _joined.rank
    return int(os.environ.get("RANK", 0)) if launched() > 1 else 0


def size() -> int:
    """How many processes have met in `start`; 1 before and without it."""
    return 1 if _joined is None else _joined.size


def first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def place() -> str:
    """The GPU of this process: cuda, or cuda:N where several processes share a machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() > 1 and "LOCAL_RANK" in os.environ else "cuda"


# Work ----------------------------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; all must call it. Values are pickled."""
    if _joined is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _joined.size
    dist.all_gather_object(values, value, _joined.group)
    return values


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, for all of them; the others wait.

    Raises:
        UserError: the one that `work` raised there, in every process.
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
    return outcome


def in_turn(work: Callable[[], T]) -> T:
    """Do `work` in the first process, then in the others, which find the files that the first has written."""
    kept: list[T] = []
    from_first(lambda: kept.append(work()))
    return kept[0] if kept else work()


def spread(items: Sequence[T], work: Callable[[T], R], model: Any = None) -> Iterator[R]:
    """Yield `work(item)` of every item, in order, in every process; each does its share of them.

    Args:
        items: the same in every process.
        work: a function of the item alone: results are those of one process.
        model: what `work` runs, if anything: one that is sharded is whole only in a pass that all processes make
            together, so that each of them does all the items.

    Raises:
        UserError: the one that `work` raised for the earliest item that it fails on, in every process.
    """
    if size() == 1 or (model is not None and sharded(model)):
        yield from map(work, items)
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
    """Whether the weights of a model are divided between the processes (FSDP2, DeepSpeed ZeRO-3)."""
    return any(type(weight).__name__ == "DTensor" or hasattr(weight, "ds_id") for weight in model.parameters())


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient; all must call it."""
    values = values.detach().clone()
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def count(n: int, like: Tensor) -> Tensor | int:
    """The sum of `n` over all processes, but at least 1, to divide by; all must call it. A tensor is beside `like`."""
    if size() == 1:
        return max(n, 1)
    import torch

    return total(torch.tensor(float(n), device=like.device)).clamp_min(1.0)


# Ends ----------------------------------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """The launcher has told this process to end."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def lost(wait: float = 0.0) -> list[int]:
    """Numbers of the processes of this machine that have ended, looked for until there is one or `wait` s are over."""
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
    """Meet the other processes; if one of them ends inside the block, the rest end with one line that says so.

    Args:
        remedy: what to do then.
        device: see `start`.

    Raises:
        UserError: another process is gone, or the launcher tells this one to end.
    """
    start(device)
    if size() == 1:
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
            # the launcher ends everybody once one is gone; what happened must be said before
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
    """Let only the first process print inside the block; what is raised leaves it, and is heard."""
    if first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit:
            # the launcher ends everybody once one is gone: the first must come to say why
            time.sleep(3)
            raise


def speaks() -> bool:
    """Whether this process is the one to print why all of them end: of those that ask, the one that is first to."""
    if launched() < 2:
        return True
    import torch.distributed as dist

    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5))
        return store.add("alter/said", 1) == 1
    except (KeyError, RuntimeError):
        # there is no store, or whoever kept it is gone
        return _joined is not None or first()
