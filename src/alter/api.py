"""The commands as functions: settings objects or keywords in, results out, nothing printed.

Notes and progress go to the logger `alter` (see `alter.core.console.silent`). Every setting of a command is a keyword of
its function; a settings object may be given in place of keywords, or with keywords that override it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from alter.core import UserError, ignore_known_warnings, memory, nearest, silent
from alter.data import named_rows
from alter.settings import in_words, refusal
from alter.storage import digest, read_run

if TYPE_CHECKING:
    from alter.attacks import Attack
    from alter.comparison import Compare
    from alter.data import GivenRows
    from alter.distillation import Distill
    from alter.evaluation import Evaluation
    from alter.storage import Record
    from alter.training import Unlearn

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Run:
    """A finished unlearning run: a folder, as `alter unlearn` leaves it.

    Attributes:
        folder: the run's folder.
    """

    folder: Path

    @classmethod
    def at(cls, folder: str | PathLike[str]) -> Run:
        """Return the run in a folder.

        Raises:
            UserError: the folder holds no finished run.
        """
        path = Path(folder)
        if not (path / "run.json").is_file():
            raise UserError(
                f"{folder} is no finished run: run.json is missing. Expected the out folder of an unlearn run."
            )
        return cls(path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `run.json` says: settings, router, steps, seconds, losses, provenance."""
        return read_run(self.folder)

    @property
    def base(self) -> str:
        """Name of the model that the run started from."""
        return str(self.record["settings"]["model"])

    @property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter; None if the run changed the model's own weights."""
        path = self.folder / "adapter"
        return path if path.is_dir() else None

    @property
    def model(self) -> str:
        """The model to load: the base that the adapter goes on, or the changed weights."""
        path = self.folder / "model"
        return str(path) if path.is_dir() else self.base

    @property
    def template(self) -> list[str]:
        """Variables of the chat template that the run's rows were written with, each NAME=VALUE."""
        return list(self.record["settings"].get("chat_template_kwargs") or [])


def _settings(kind: type[S], given: BaseModel | None, keywords: Mapping[str, Any]) -> S:
    """Make settings of a kind from an object, keywords, or both; keywords win.

    Raises:
        UserError: an object of another kind, an unknown setting, or a value that the settings refuse.
    """
    if given is not None and not isinstance(given, kind):
        raise UserError(f"`settings` is of {type(given).__name__}; expected {kind.__name__}.")
    for name in keywords:
        if name not in kind.model_fields:
            raise UserError(f"{kind.__name__} has no setting {name!r}.{nearest(name, kind.model_fields)}")
    # its parts as they are: what a part was made of does not say of which kind it is
    below = {} if given is None else {name: getattr(given, name) for name in given.model_fields_set}
    try:
        return kind.model_validate({**below, **{name: in_words(value) for name, value in keywords.items()}})
    except ValidationError as error:
        raise UserError(refusal(error, kind, kind.__name__)) from None


@contextlib.contextmanager
def _named_model(model: Any, tokenizer: Any, *, bare: bool) -> Iterator[str]:
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


@contextlib.contextmanager
def _as_library() -> Iterator[None]:
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


def unlearn(
    model: Any = None,
    *,
    forget: GivenRows | None = None,
    retain: GivenRows | None = None,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: Unlearn | None = None,
    callbacks: Sequence[Any] = (),
    **keywords: Any,
) -> Run:
    """Make a model forget, as `alter unlearn` does.

    Args:
        model: folder, hub id, builtin:NAME, or a causal model of transformers in memory, without an adapter, which is copied and stays
            as it is.
        forget: the forget set.
        retain: the retain set; None: the untouched model's own answers to ordinary questions, and texts of its own.
        out: folder of the run.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        callbacks: transformers' TrainerCallback objects, called while it trains.
        keywords: further settings of `alter.training.settings.Unlearn`, such as `method="npo"`.

    Returns:
        the run, whose `adapter` (or `model`) is the result.

    Raises:
        UserError: bad settings or data, a folder in use, a loss that is not finite.
    """
    from alter.methods import with_default
    from alter.models import check_callbacks
    from alter.training import Unlearn as Kind
    from alter.training import unlearn as train

    check_callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        if model is not None:
            keywords["model"] = stack.enter_context(_named_model(model, tokenizer, bare=True))
        for name, rows in (("forget", forget), ("retain", retain)):
            if rows is not None:
                keywords[name] = stack.enter_context(named_rows(rows))
        if out is not None:
            keywords["out"] = str(out)
        if settings is None:
            keywords = with_default(keywords)
        chosen = _settings(Kind, settings, keywords)
        stack.enter_context(_as_library())
        return Run.at(train(chosen, callbacks))


def distill(
    run: Any = None,
    *,
    out: str | PathLike[str] | None = None,
    settings: Distill | None = None,
    callbacks: Sequence[Any] = (),
    **keywords: Any,
) -> Run:
    """Make plain weights that say what an unlearned model says, as `alter distill` does.

    Args:
        run: a `Run` or its folder, the teacher; or leave it out and give `model=`, `adapter=`, `forget=` and `retain=`.
        out: folder of the new run.
        settings: all settings in one object, which what else is given overrides.
        callbacks: transformers' TrainerCallback objects, called while it trains.
        keywords: further settings of `alter.distillation.settings.Distill`, such as `form="lora"`.

    Returns:
        the new run, whose `model` (or `adapter`, a plain LoRA) is the result.

    Raises:
        UserError: bad settings, rows or models, a folder in use, too little disk, a divergence that is not finite.
    """
    from alter.distillation import Distill as Kind
    from alter.distillation import distill as train
    from alter.models import check_callbacks

    check_callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        if run is not None:
            keywords["run"] = str(run.folder if isinstance(run, Run) else run)
        for name in ("forget", "retain"):
            if keywords.get(name) is not None:
                keywords[name] = stack.enter_context(named_rows(keywords[name]))
        if out is not None:
            keywords["out"] = str(out)
        chosen = _settings(Kind, settings, keywords)
        stack.enter_context(_as_library())
        return Run.at(train(chosen, callbacks))


def _subject(
    model: Any,
    tokenizer: Any,
    settings: Evaluation | Attack | None,
    keywords: dict[str, Any],
    stack: contextlib.ExitStack,
) -> None:
    """Add the model to the keywords; a run gives its model, its adapter and its chat template's variables."""
    if isinstance(model, Run):
        keywords.setdefault("adapter", None if model.adapter is None else str(model.adapter))
        if model.template:
            keywords.setdefault("chat_template_kwargs", model.template)
        model = model.model
    if model is not None:
        bare = keywords.get("adapter", settings and settings.adapter) is not None
        keywords["model"] = stack.enter_context(_named_model(model, tokenizer, bare=bare))


def evaluate(
    model: Any = None,
    *,
    benchmark: str = "tofu",
    tokenizer: Any = None,
    settings: Evaluation | None = None,
    **keywords: Any,
) -> list[Record]:
    """Measure a model, as `alter evaluate` does.

    Args:
        model: a `Run`, a folder, hub id or builtin:NAME (with `adapter=` if there is one), or a model in memory.
        benchmark: which benchmark; the settings' own if `settings` is given.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of the benchmark; `forget`, `retain` and `holdout` may be rows.

    Returns:
        its records, one a metric.

    Raises:
        UserError: an unknown benchmark, bad settings, data or models.
    """
    from alter.evaluation import evaluate as measure
    from alter.plugins import benchmark_of

    with contextlib.ExitStack() as stack:
        _subject(model, tokenizer, settings, keywords, stack)
        kind = type(settings) if settings is not None else benchmark_of(benchmark)
        for name in ("forget", "retain", "holdout"):
            if keywords.get(name) is not None:
                keywords[name] = stack.enter_context(named_rows(keywords[name]))
        chosen = _settings(kind, settings, keywords)
        stack.enter_context(_as_library())
        return measure(chosen)


def attack(
    model: Any = None, *, tokenizer: Any = None, settings: Attack | None = None, **keywords: Any
) -> list[Record]:
    """Try to bring the forgotten back, as `alter attack` does.

    Args:
        model: a `Run`, whose forget set is attacked unless `forget` says otherwise; or a model, as in `evaluate`.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings, such as `attacks=["relearn"]` and `retrained="folder"`.

    Returns:
        records of every attack on every model that takes part.

    Raises:
        UserError: an unknown or impossible attack, bad settings, models or rows.
    """
    from alter.attacks import Attack as Kind
    from alter.attacks import attack as run

    with contextlib.ExitStack() as stack:
        if isinstance(model, Run):
            keywords.setdefault("forget", model.record["settings"]["forget"])
            keywords.setdefault("out", str(model.folder / "attack"))
        _subject(model, tokenizer, settings, keywords, stack)
        if keywords.get("forget") is not None:
            keywords["forget"] = stack.enter_context(named_rows(keywords["forget"]))
        chosen = _settings(Kind, settings, keywords)
        stack.enter_context(_as_library())
        return run(chosen)


def compare(
    settings: Compare | Mapping[str, Any] | None = None,
    *,
    forget: GivenRows | None = None,
    retain: GivenRows | None = None,
    holdout: GivenRows | None = None,
    **keywords: Any,
) -> list[Any]:
    """Compare methods with an equal budget, as `alter compare` does.

    Args:
        settings: all settings in one object, which what else is given overrides; or, as the comparison's own setting of that name,
            each row's.
        forget: rows of your own to forget in the place of TOFU's splits; they need `retain`. Those in memory become files under
            `out`/rows, which the cells' own processes read.
        retain: what every run keeps.
        holdout: questions and answers that no model saw.
        keywords: further settings of the comparison, such as `methods=["alter", "npo"]`.

    Returns:
        the rows of the table; `out` holds the table, the plot and the page.

    Raises:
        UserError: bad settings or models.
    """
    from alter.comparison import Compare as Kind
    from alter.comparison import compare as run

    if isinstance(settings, Mapping):
        keywords, settings = {**keywords, "settings": settings}, None
    with contextlib.ExitStack() as stack:
        for name, rows in (("forget", forget), ("retain", retain), ("holdout", holdout)):
            if rows is not None:
                keywords[name] = stack.enter_context(named_rows(rows))
        chosen = _settings(Kind, settings, keywords)
        stack.enter_context(_as_library())
        return list(run(chosen))


def load(
    model: str | PathLike[str] | Run,
    adapter: str | PathLike[str] | None = None,
    *,
    dtype: Any = "auto",
    device: Any = None,
    quantization: Any = None,
    chat_template_kwargs: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with an adapter of any kind that `alter unlearn` makes.

    Args:
        model: folder, hub id, builtin:NAME, or a `Run`, which brings its adapter.
        adapter: folder or hub id of the adapter.
        dtype: auto, float32, bfloat16 or float16; or the torch.dtype.
        device: cpu, cuda, cuda:0, mps, or the torch.device; the GPU by default if there is one.
        quantization: "4bit" or "8bit".
        chat_template_kwargs: variables of the chat template, each NAME=VALUE (enable_thinking=false); by default those of a `Run`.

    Returns:
        model, ready for inference, and tokenizer.

    Raises:
        UserError: no such model or adapter, or one that does not fit the other.
    """
    from alter.models import load_model

    if isinstance(model, Run):
        adapter = adapter or model.adapter
        chat_template_kwargs = chat_template_kwargs or model.template
        model = model.model
    for name, value in {"model": model, "adapter": "" if adapter is None else adapter}.items():
        if not isinstance(value, (str, PathLike)):
            raise UserError(f"`{name}` is of {type(value).__name__}; expected the name of what is to be loaded.")
    with _as_library():
        return load_model(
            in_words(model), in_words(adapter), in_words(dtype), in_words(device), quantization, chat_template_kwargs
        )
