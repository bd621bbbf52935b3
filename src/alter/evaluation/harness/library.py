"""Access to lm-evaluation-harness: whether it is installed, its task index, its messages."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from alter.core import UserError


def check_installed() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        UserError: says how to install it.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            'This benchmark needs lm-evaluation-harness, which is not installed: pip install "alter-unlearning[eval]".'
        ) from None


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness's warnings and its progress bar for every task; errors are shown."""
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar
        logger.setLevel(level)


@functools.cache
def manager_of_tasks() -> Any:
    """Return the harness's index of its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def tasks_from_hub(manager: Any, names: Sequence[str]) -> Any:
    """Load tasks by name; whatever the hub client raises becomes a UserError."""
    try:
        return manager.load(list(names))
    except ValueError as error:
        raise UserError(f"Cannot load {', '.join(names)}: {' '.join(str(error).split())}") from error
    except (OSError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Cannot load the data of {', '.join(names)} from the hub: {reason} Check the network, or give local files "
            "of WMDP or MMLU with `data`."
        ) from error
