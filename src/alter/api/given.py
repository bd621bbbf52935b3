"""What a caller gives (keywords, settings, models and rows in memory) as the settings of a command."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from alter.api.runs import Run
from alter.core import UserError, ignore_known_warnings, memory, nearest, silent
from alter.data import named_rows
from alter.settings import check_outputs, in_words, refusal
from alter.storage import Record, digest

if TYPE_CHECKING:
    from alter.data import GivenRows

S = TypeVar("S", bound=BaseModel)

Sources = str | PathLike[str] | Iterable[Any]
"""Where a command takes several sources of rows: one of them, or a list of them; each may be rows in memory."""


def settings_of(kind: type[S], given: BaseModel | None, keywords: Mapping[str, Any]) -> S:
    """Make settings of a kind from an object, keywords, or both; keywords win.

    Raises:
        UserError: an object of another kind, an unknown setting, a value that the settings refuse, or an output that cannot be
            written.
    """
    if given is not None and not isinstance(given, kind):
        raise UserError(f"`settings` is of {type(given).__name__}; expected {kind.__name__}.")
    for name in keywords:
        if name not in kind.model_fields:
            raise UserError(f"{kind.__name__} has no setting {name!r}.{nearest(name, kind.model_fields)}")
    # its parts as they are: what a part was made of does not say of which kind it is
    below = {} if given is None else {name: getattr(given, name) for name in given.model_fields_set}
    try:
        made = kind.model_validate({**below, **{name: in_words(value) for name, value in keywords.items()}})
    except ValidationError as error:
        raise UserError(refusal(error, kind, kind.__name__)) from None
    check_outputs(made)
    return made


@contextlib.contextmanager
def named_model(model: Any, tokenizer: Any, *, bare: bool) -> Iterator[str]:
    """Yield a name under which the commands find the model while the block runs; `bare` is as in `alter.models.given`."""
    if isinstance(model, (str, PathLike)):
        if tokenizer is not None:
            raise UserError("`tokenizer` goes with a model in memory; one that is named brings its own.")
        yield str(model)
        return
    from alter.adapter import base_fingerprint
    from alter.models import check_given

    check_given(model, tokenizer, bare=bare)
    with memory.holding(f"model-{digest(base_fingerprint(model))[:16]}", (model, tokenizer)) as name:
        yield name


def add_model(
    keywords: dict[str, Any], model: Any, tokenizer: Any, stack: contextlib.ExitStack, *, bare: bool = True
) -> None:
    """Add the model to the keywords, if one is given, under a name that holds until the stack is closed.

    Raises:
        UserError: an object that is no model, a tokenizer that is missing, or one that nothing was given for.
    """
    if model is not None:
        keywords["model"] = stack.enter_context(named_model(model, tokenizer, bare=bare))
    elif tokenizer is not None:
        raise UserError("`tokenizer` goes with a model in memory, and none is given: give `model` as well.")


def add_subject(
    keywords: dict[str, Any], model: Any, tokenizer: Any, settings: Any, stack: contextlib.ExitStack
) -> None:
    """Add the model to the keywords; a run gives its model, its adapter and its chat template's variables.

    Raises:
        UserError: see `add_model`.
    """
    if isinstance(model, Run):
        keywords.setdefault("adapter", None if model.adapter is None else str(model.adapter))
        if model.template:
            keywords.setdefault("chat_template_kwargs", model.template)
        model = model.model
    bare = keywords.get("adapter", getattr(settings, "adapter", None)) is not None
    add_model(keywords, model, tokenizer, stack, bare=bare)


def add_rows(keywords: dict[str, Any], stack: contextlib.ExitStack, **given: GivenRows | None) -> None:
    """Add sets of rows to the keywords, each that is given, under names that hold until the stack is closed.

    Raises:
        UserError: they are no rows.
    """
    for name, rows in given.items():
        if rows is not None:
            keywords[name] = stack.enter_context(named_rows(rows))


def add_sources(keywords: dict[str, Any], stack: contextlib.ExitStack, **given: Sources | None) -> None:
    """Add lists of sources of rows to the keywords, each that is given.

    A name, and a list or dataset whose items are rows, is one source; of any other list each item is.

    Raises:
        UserError: one of them is no rows.
    """
    for name, sources in given.items():
        if sources is None:
            continue
        named: list[Any] = [sources]
        if isinstance(sources, Iterable) and not isinstance(sources, (str, bytes, PathLike, Mapping)):
            items = list(sources)
            named = [items] if not items or any(isinstance(item, Mapping) for item in items) else items
        keywords[name] = [stack.enter_context(named_rows(each)) for each in named]


def several(given: Any) -> list[Any]:
    """Return what was given once or as a list as a list; a run as its folder."""
    items = [given] if isinstance(given, (str, PathLike, Run)) or not isinstance(given, Iterable) else list(given)
    return [str(item.folder) if isinstance(item, Run) else item for item in items]


def add_results(
    keywords: dict[str, Any], given: str | PathLike[str] | Sequence[Any], stack: contextlib.ExitStack
) -> None:
    """Add `records` to the keywords: files, or records in memory, under names that hold until the stack is closed."""
    items = several(given)
    if items and all(isinstance(item, Record) for item in items):
        items = [items]
    named = []
    for item in items:
        if isinstance(item, Sequence) and item and all(isinstance(each, Record) for each in item):
            key = digest([asdict(record) for record in item])[:16]
            item = stack.enter_context(memory.holding(f"records-{key}", list(item)))
        named.append(item)
    keywords["records"] = named


@contextlib.contextmanager
def as_library() -> Iterator[None]:
    """Inside the block, neither alter nor transformers prints."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # it tells how it sorts checkpoints that were written within one tick of the clock
    checkpoints = logging.get_logger("transformers.trainer_utils")
    level = checkpoints.level
    checkpoints.setLevel(logging.ERROR)
    try:
        with silent(), warnings.catch_warnings():
            ignore_known_warnings()
            yield
    finally:
        checkpoints.setLevel(level)
        if shown:
            logging.enable_progress_bar()
