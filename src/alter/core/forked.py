"""Spread work over forked processes of this machine, each with one thread: threads of a small model mostly wait for each other.

A fork has everything in memory already, at no cost while nobody writes to it. It computes results and nothing else: it ends without
the clean-up of an interpreter, an interrupt is its parent's to handle, and it does not outlive its parent.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from alter.core.console import is_silent
from alter.core.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")
R = TypeVar("R")

SMALL = 500_000_000
"""Most weights of a model whose threads mostly wait for each other."""
ROOM = 2**30
"""Bytes of free memory for each process: its batch's activations, keys and values."""
PATIENCE = 1.0
"""Seconds after which a wait for forks looks up."""
_PR_SET_PDEATHSIG = 1

_allowed: ContextVar[bool] = ContextVar("forks_allowed", default=False)


@contextmanager
def allowed() -> Iterator[None]:
    """Inside the block work may be spread over forks; not where the package is used as a library, in a process of others."""
    token = _allowed.set(not is_silent())
    try:
        yield
    finally:
        _allowed.reset(token)


def number(items: int, model: Any) -> int:
    """Return how many processes to spread so many items over: one for each of torch's threads, or 1, which forks none.

    So it is on Linux (on macOS a fork does not survive the system's libraries) for a small model on the CPU, if there is an item
    and room for each. Where CUDA has been started nothing is forked, since its driver does not outlive that.
    """
    if not _allowed.get() or items < 2 or sys.platform != "linux":
        return 1
    import psutil
    import torch

    threads = torch.get_num_threads()
    if threads > items or torch.cuda.is_initialized():
        return 1
    weights = list(model.parameters())
    if any(weight.device.type != "cpu" for weight in weights) or sum(weight.numel() for weight in weights) > SMALL:
        return 1
    return threads if psutil.virtual_memory().available >= threads * ROOM else 1


def mapped(items: Sequence[T], work: Callable[[T], R], count: int) -> Iterator[R]:
    """Yield `work(item)` of every item, in order, computed by `count` forks; a fork takes the next item when it is done with one.

    Args:
        items: of which the processes have their own already.
        work: returns what can be pickled; nothing else that it does is seen here. No gradients, since a fork has no threads for them.
        count: number of processes; where the system refuses some there are fewer, and without any this one works.

    Raises:
        UserError: a process was ended by others.
        Exception: what `work` raised for the earliest failing item.
    """
    # here, where a help text does not come by
    from multiprocessing.connection import wait

    forks: list[_Fork] = []
    found: dict[int, list[Any]] = {}
    left = iter(range(len(items)))
    try:
        for _ in range(count):
            try:
                forks.append(_Fork(items, work))
            except OSError:
                # a limit of processes, files or memory: those that there are do all of it
                break
            forks[-1].give(next(left, None))
        if not forks:
            yield from map(work, items)
            return
        for place in range(len(items)):
            while place not in found:
                # an interrupt just before the system waits is seen only once it has waited
                ready = wait([fork.pipe for fork in forks], PATIENCE)
                for fork in [fork for fork in forks if fork.pipe in ready]:
                    done, *found[done] = fork.take()
                    fork.give(next(left, None))
            good, result = found.pop(place)
            if not good:
                raise result
            yield result
    finally:
        for fork in forks:
            fork.end()


class _Fork:
    """A process that computes items by their numbers, until it is ended."""

    def __init__(self, items: Sequence[T], work: Callable[[T], R]) -> None:
        import ctypes
        from multiprocessing.connection import Pipe

        self.pipe, own = Pipe()
        control, parent = ctypes.CDLL(None).prctl, os.getpid()
        # an interrupt in between would go on as the parent does, in the fork
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with warnings.catch_warnings():
                # Python warns of locks that other threads hold; of those a fork here takes none, as torch's data loaders do
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
            if self.pid == 0:
                _compute(items, work, own, parent, control)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        own.close()

    def give(self, item: int | None) -> None:
        """Ask for an item, if there is one."""
        if item is None:
            return
        try:
            self.pipe.send_bytes(str(item).encode())
        except OSError:
            self._died()

    def take(self) -> tuple[int, bool, Any]:
        """Wait for an item's number, whether it was computed, and its result or the error."""
        try:
            told = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self._died()
        outcome: tuple[int, bool, Any] = pickle.loads(told)
        return outcome

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.pipe.close()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._code()

    def _died(self) -> NoReturn:
        """Raise an error that says what ended the process."""
        code = self._code()
        how = "ended" if code is None else f"ended with status {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        raise UserError(
            f"A process that computed a share of the work {how} before it was done, as happens where memory runs out: free some, or "
            "set OMP_NUM_THREADS=1 in the environment, and one process does all of it."
        ) from ChildProcessError(how)  # the system's doing, not a result (`passing`)

    def _code(self) -> int | None:
        """Wait for the end and return the exit status, negative for a signal's number; None where SIGCHLD is ignored."""
        pid, self.pid = self.pid, 0
        with suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None


def _compute(
    items: Sequence[T], work: Callable[[T], R], pipe: Connection, parent: int, control: Callable[[int, int], int]
) -> NoReturn:
    """In a fork: compute each item that is asked for; `control` is the system's call about processes."""
    try:
        control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # the parent may have ended before the kernel was asked to tell
        if os.getppid() != parent:
            os._exit(1)
        # a collection would touch, and so copy, all that is shared
        gc.freeze()
        # a progress bar of the parent may stand before these, with a lock that nobody here gives back
        sys.stdout = sys.stderr = sys.__stderr__
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        sys.modules["torch"].set_num_threads(1)
        _allowed.set(False)
        while True:
            item = int(pipe.recv_bytes())
            pipe.send_bytes(_outcome(item, items, work))
    finally:
        os._exit(1)


def _outcome(item: int, items: Sequence[T], work: Callable[[T], R]) -> bytes:
    """Return the pickled number of an item, whether it was computed, and its result or the error."""
    try:
        return pickle.dumps((item, True, work(items[item])), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        trace = traceback.format_exc()
        try:
            # some errors can be written and not read
            pickle.loads(whole := pickle.dumps((item, False, error)))
        except Exception:
            whole = pickle.dumps((item, False, RuntimeError(trace)))
        return whole
