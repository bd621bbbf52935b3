"""The registry of guards, and how one is made of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from alter.core import UserError, nearest
from alter.models.guards.agents import Agents
from alter.models.guards.assistant import Subtracted
from alter.models.guards.corruption import Corrupted
from alter.models.guards.detector import Detected
from alter.models.guards.form import FORM_FILE, Guard, check_base
from alter.models.guards.neurons import Abstaining, Adjusted
from alter.plugins import Registry
from alter.storage import read_object

GUARDS: Registry[type[Guard]] = Registry(
    "guard", {cls.kind: cls for cls in (Detected, Subtracted, Corrupted, Agents, Adjusted, Abstaining)}
)
"""Guards by the `kind` in their `inference.json`; open to plugins."""

G = TypeVar("G", bound=type[Guard])


def guard(cls: G) -> G:
    """Register a plugin's guard by its `kind`; used as a decorator.

    Raises:
        UserError: another guard has the name.
    """
    GUARDS.add(cls.kind, cls)
    return cls


def load_form(base: Any, folder: str, tokenizer: Any = None) -> Guard:
    """Put the guard in `folder` on a loaded base, which gives the unlearned model; `tokenizer` is for guards that read text.

    Raises:
        UserError: the form was made for another base, by another version, or by a plugin that is not installed; or it reads text
            and there is no tokenizer.
    """
    path = Path(folder).expanduser()
    settings = read_object(path / FORM_FILE, "the settings of an inference form")
    check_base(settings, base, folder)
    if settings["kind"] not in GUARDS:
        raise UserError(
            f"{path / FORM_FILE} is of kind {settings['kind']!r}; expected one of {', '.join(GUARDS)}."
            f"{nearest(settings['kind'], GUARDS)} Install the plugin that it was made with."
        )
    if tokenizer is None and GUARDS[settings["kind"]].reads_text:
        raise UserError(
            f"{folder} is a guard of kind {settings['kind']!r}, which reads text: give the model's `tokenizer` too, or load it by `alter.load`."
        )
    made: Guard = GUARDS[settings["kind"]].read(base, path, settings).eval()
    made.tokenizer = tokenizer
    return made
