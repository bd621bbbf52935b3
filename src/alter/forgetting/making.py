"""Make the rows and probes of a subject or a document, or read those that a run has made, and measure them before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from alter.adapter import base_fingerprint
from alter.core import UserError
from alter.forgetting.documents import Document, build_document
from alter.forgetting.folder import (
    SAID_FOLDER,
    asked_digest,
    check_base,
    read_material,
    rows_key,
    write_material,
)
from alter.forgetting.material import Material
from alter.forgetting.measure import LEVEL, AgainstZero, against_zero, known_apart
from alter.forgetting.names import check_uncommon, guess_kind
from alter.forgetting.probes import answered, question_of
from alter.forgetting.report import print_line
from alter.forgetting.rows import NOBODY, build
from alter.forgetting.settings import Forget
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import TEMPLATES, Kind
from alter.models import ModelSettings, load_model
from alter.storage import cache_folder, digest, read_object, to_json, write_atomic
from alter.training import remove_run

LIKELY = 0.1
"""A document was seen if the model answers a probe, or if a name or number in it is as probable as this where it stands."""


def material_of(
    settings: Forget,
    console: Console,
    out: Path,
    name: str,
    document: Document | None,
    retain: list[dict[str, Any]],
) -> tuple[Material, Any]:
    """Return the rows and probes of `out`, made now unless they exist, and the model's tokenizer.

    Raises:
        UserError: the model does not know the subject, does not tell it from an invented one, or is not the one that `out` was
            begun with.
    """
    model, tokenizer = loaded(settings)
    kind: Kind | None = settings.kind
    if settings.subject is not None:
        check_uncommon(name, tokenizer, kind)
    # a model that cannot be loaded costs no earlier run
    if settings.overwrite:
        remove_run(out)
    speaker = Speaker(
        model,
        tokenizer,
        out / SAID_FOLDER,
        tokens=settings.answer_tokens,
        batch=settings.batch_size,
        seed=settings.seed,
        identity=identity_of(settings, settings.model),
    )
    base = base_fingerprint(model)
    check_base(out, base)
    said = {"key": rows_key(settings), "settings": settings.model_dump(exclude={"resume", "overwrite"}), "base": base}
    # it names the subject
    write_atomic(out / "forget.json", to_json(said), private=True)
    material = read_material(out)
    if material is not None:
        asked = read_object(out / "zero.json", "what alter forget wrote").get("probes")
        # a fact whose probability before is not known would count as forgotten
        unmeasured = not any("logprob" in probe for probe in material.probes)
        if asked != asked_digest(material) or unmeasured:
            # or a person has edited them: what was measured before is of others
            for rows, label in ((material.probes, "probes"), (material.kept_probes, "probes of what is kept")):
                for row, answer in zip(rows, speaker.say(label, [question_of(row) for row in rows]), strict=True):
                    row["before"] = answer
            write_material(out, material, _told_apart(model, tokenizer, material, name, document))
        return material, tokenizer
    if document is not None:
        answers = f" and {len(document.exchanges)} answers" if document.exchanges else ""
        print_line(
            console,
            f"1/3 rows about {name}: {len(document.passages)} passages{answers}",
        )
        material = build_document(speaker, name, document, keep=settings.keep, retain=retain)
    else:
        material = _about_subject(settings, console, speaker, name, kind, retain)
    write_material(out, material, _told_apart(model, tokenizer, material, name, document))
    return material, tokenizer


def _told_apart(model: Any, tokenizer: Any, material: Material, name: str, document: Document | None) -> AgainstZero:
    """Test whether the model tells what is to be forgotten from an invented subject, and note each fact's probability in its probe.

    Raises:
        UserError: it does not, or the probes cannot tell.
    """
    before = against_zero(model, tokenizer, material.probes, [])
    zero = "the same text with other names and numbers" if document else "an invented subject"
    if before is None:
        fix = (
            "A document is asked for by the names and numbers in it, and this one has too few where they count"
            if document
            else "The model gives too few facts in its answers, or the probes do not name it"
        )
        raise UserError(
            f"Of the {len(material.probes)} probes about {name} fewer than two can be compared with {zero}, so nobody could tell "
            f"whether it was forgotten, and nothing was trained. {fix}: write rows yourself (question, answer) for `alter unlearn`."
        )
    if before.pvalue >= LEVEL:
        raise UserError(
            f"The model does not tell {name} from {zero} (p {before.pvalue:.2g}, n {len(before.real)}): there is nothing to forget, "
            "and nothing was trained."
        )
    if document is not None:
        _check_likely(material, name, before)
    for probe in material.probes:
        probe.pop("logprob", None)
    for i, known, logprob in zip(before.places, known_apart(before), before.real, strict=True):
        if known:
            material.probes[i]["logprob"] = round(float(logprob), 4)
    return before


def _check_likely(material: Material, name: str, before: AgainstZero) -> None:
    """Refuse a document of which the model neither says nor expects anything: it tells a text from its disguise unseen, too.

    Raises:
        UserError: no probe is answered, and no fact that is told apart has a probability of `LIKELY`.
    """
    told = before.real[known_apart(before)]
    likely = float(np.exp(told.max())) if told.size else 0.0
    if likely < LIKELY and not any(answered(probe["before"], probe) for probe in material.probes):
        raise UserError(
            f"The model answers none of the {len(material.probes)} probes about {name}, and even after the text before them no name or number has a "
            f"probability over {likely:.1%} (a document that it saw has one of {LIKELY:.0%}): there is nothing to forget, and nothing was trained. "
            "Who knows that it was trained on this text can write rows of it for `alter unlearn`."
        )


def _about_subject(
    settings: Forget,
    console: Console,
    speaker: Speaker,
    name: str,
    kind: Kind | None,
    retain: list[dict[str, Any]],
) -> Material:
    """Make the rows and probes about a subject; guess its kind where none is given."""
    if kind is None:
        kind = guess_kind(speaker.model, speaker.tokenizer, name)
        print_line(console, f"{name} is taken for a {kind}; if that is wrong, give `kind`.")
    print_line(console, f"1/3 rows about {name}: what the model itself says, and what it says of invented subjects")
    questions, neighbours = settings.writer.ask(name) if settings.writer.url else ([], [])
    material = build(
        speaker,
        name,
        kind,
        samples=settings.samples,
        keep=settings.keep,
        retain=retain,
        questions=questions,
        neighbours=neighbours,
    )
    masks = [{name: other} for other in TEMPLATES[kind].invented[:6] if other.lower() != name.lower()]
    for probe in material.probes:
        # a reversed probe holds a name of the subject's in the subject's place
        probe["masks"] = [{probe["about"]: n} for n in NOBODY[: len(masks)]] if "about" in probe else masks
    return material


def identity_of(settings: Forget, model: str, adapter: str | None = None) -> str | None:
    """Return a key of the weights that answer and of how they are loaded; None if they have no identity."""
    found = ModelSettings(model=model, adapter=adapter).identity(cache_folder())
    return None if "unknown" in found.values() else digest(found, settings.dtype, settings.chat_template_kwargs)


def loaded(settings: Forget, adapter: str | None = None) -> tuple[Any, Any]:
    """Load the model to forget with and its tokenizer, with an adapter if one is named."""
    return load_model(settings.model, adapter, settings.dtype, settings.device, template=settings.chat_template_kwargs)
