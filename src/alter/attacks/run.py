"""`alter attack`: can what was forgotten be recovered, and by whom?

Every attack is run on the unlearned model and, as a baseline, on a model retrained without the forget rows: what it
recovers from that one is no forgotten knowledge. It is measured by two figures per row: ROUGE-L recall of the greedy reply
against the true answer, and the probability of the true answer (TOFU's, per token). Of both, the recovered fraction is

    (unlearned under attack - retrained under attack) / (original - retrained)      (`alter.metrics.recovery.recovered_fraction`)

with the original and the retrained model not under attack, all on the same rows.

Rows of plain text have no question: their first half is the prompt and their second half the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from alter.attacks import depth, states
from alter.attacks.base import PLAIN, Bench, Impossible, paraphrases, split_rows
from alter.attacks.fractions import NO_ORIGINAL, NO_RETRAINED, recovered_fractions
from alter.attacks.settings import Attack
from alter.attacks.showing import draw_curves, show_recovered
from alter.attacks.techniques import ATTACKS, COMPARING, TRAINING_ATTACKS, UNRELATED
from alter.core import UserError, console, forked, held, nearest, warn
from alter.data import Example, data_hash, load_examples, row_hash, row_key
from alter.models import ModelSettings, is_local
from alter.storage import (
    VERSION,
    Record,
    cache_folder,
    code_digest,
    digest,
    read_records,
    stamped,
    versions,
    write_atomic,
    write_records,
)

ALWAYS_COUNT = ("forget", "rows", "seed", "max_new_tokens")
"""Settings that every measurement depends on, beside the rows that are measured."""


def without_attack(bench: Bench) -> list[Record]:
    """Measure without any attack, on the measured rows and on the attacker's, if any."""
    model, _ = bench.shared()
    measured = bench.items(bench.measured)
    encoded = digest([item.ids for item in measured])
    found = bench.measure(PLAIN, model, measured, part="other", encoded=encoded)
    if bench.attacker:
        found += bench.measure(PLAIN, model, bench.items(bench.attacker), part="relearned")
    return found


def same_tokens(records: Sequence[Record]) -> None:
    """Refuse models that tokenise the rows differently: probabilities per token would not be comparable.

    Raises:
        UserError: names the two models.
    """
    found = {record.extra["encoded"]: record.model for record in records if "encoded" in record.extra}
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"The {one} and the {other} model have different tokenizers or chat templates: their probabilities per token cannot "
            "be compared. Give models of one tokenizer."
        )


def chosen(settings: Attack, rows: Sequence[Example]) -> tuple[list[str], dict[str, str]]:
    """Return the attacks to run and, by name, why others cannot be run.

    Raises:
        UserError: an unknown name, or an attack that was asked for by name and cannot be run on these rows and models.
    """
    names = [name.strip() for part in settings.attacks for name in part.split(",") if name.strip()]
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"No attack {name!r}; expected of {', '.join(ATTACKS)}.{nearest(name, ATTACKS)}")
    reasons = {name: why for name in names or ATTACKS if (why := ATTACKS[name].impossible(settings, rows)) is not None}
    for name in names:
        if name in reasons:
            raise UserError(f"The attack {name!r} is not possible: {reasons[name]}. Leave it out of `attacks`.")
    wanted = dict.fromkeys(names or ATTACKS)
    return [name for name in ATTACKS if name in wanted and name not in reasons], reasons


def models_attacked(settings: Attack) -> dict[str, ModelSettings]:
    """Return the models that take part, by their names in the records; the original only if it is known."""
    found: dict[str, ModelSettings] = {}
    if settings.original is not None or settings.adapter is not None:
        found["original"] = settings.alike(settings.original or settings.model)
    if settings.retrained is not None:
        found["retrained"] = settings.alike(settings.retrained)
    found["unlearned"] = settings.alike(settings.model, settings.adapter).model_copy(
        update={"merged": settings.merged}
    )
    return found


def _check_whole(what: str, name: str | None) -> None:
    """Refuse the folder of an adapter where a whole model is expected.

    Raises:
        UserError: names the setting, and how to make a model of it.
    """
    folder = Path(name or "").expanduser()
    if name and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"`{what}` {name} is an adapter, and a whole model is expected: fold it into the model it was made for (PEFT's "
            "merge_and_unload) and save that."
        )


def once(given: Sequence[Example]) -> list[Example]:
    """Return rows without repetitions: of one that is given twice the attacker would be trained on what is then measured.

    Each is numbered by its place among all that were given: the turns of one chat have the number of their row in common.
    """
    first: dict[str, Example] = {}
    for number, row in enumerate(given):
        first.setdefault(row_key(row), replace(row, index=number))
    if len(first) < len(given):
        warn(f"{len(given) - len(first)} of {len(given)} forget rows are given more than once: each counts once.")
    return list(first.values())


# Running -------------------------------------------------------------------------------------------------------------


def _stored(path: Path, key: str) -> list[Record] | None:
    """Return the records of a file if they were measured under this key; an empty key matches nothing."""
    if not key or not path.is_file():
        return None
    try:
        found = read_records(path)
    except UserError as error:
        warn(f"{error} Running that attack again.")
        return None
    return found if found and all(record.provenance.get("key") == key for record in found) else None


def _stored_states(path: Path, key: str) -> np.ndarray | None:
    """Return the hidden states in a file if they were computed under this key; an empty key matches nothing."""
    if not key or not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("states") if (file.metadata() or {}).get("key") == key else None
    except SafetensorError as error:
        warn(f"{path} cannot be read ({error}); computing the hidden states again.")
        return None


@forked.allowed()
def attack(settings: Attack) -> list[Record]:
    """Run `alter attack`: every attack on every model that takes part; print the table, write records and the curves.

    Each attack's records are written to `out/ATTACK.MODEL.json` as soon as it is done, and used again if models, data,
    settings, code and versions are the same. Files of models and adapters are only read; an attack that changes weights
    does so on a copy of its own, loaded for it.

    Raises:
        UserError: an unknown or impossible attack, models or rows that are not there, the attacked model or the original as `retrained`, or an
            output folder that is a file.
            Of an attack asked for by name that only a loaded model shows to be impossible: after all others have run.
    """
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` is {settings.out!r}, which is a file: give a folder.")
    given = load_examples(settings.forget)
    rows = once(given)
    names, reasons = chosen(settings, rows)
    # rows that no attack takes are there to be measured
    taken = settings.relearn.rows if any(ATTACKS[name].takes_rows for name in names) else 0
    measured, attacker = split_rows(len(rows), settings.rows, taken, settings.seed)
    unrelated = load_examples(settings.relearn.benign) if UNRELATED & set(names) else []
    for what in ("retrained", "original"):
        _check_whole(what, getattr(settings, what))
    models = models_attacked(settings)
    identities = {name: source.identity(cache_folder()) for name, source in models.items()}
    for name, source in models.items():
        unknown = identities[name]["weights"] == "unknown"
        if unknown and held(source.model) is None and not is_local(source.model):
            raise UserError(
                f"No {name} model at {source.model}: no folder has this name, and the hub does not answer for it."
            )
    own = identities["unlearned"]
    if identities.get("retrained") == own and "unknown" not in own.values():
        raise UserError(
            f"`retrained` is {settings.retrained!r}, which has the weights of the model that is attacked: no attack would ever recover "
            "more than from it. Give one that was trained without the rows, or leave it out."
        )
    if identities.get("retrained") == identities.get("original", own) and "unknown" not in own.values():
        raise UserError(
            f"`retrained` is {settings.retrained!r}, which has the weights of the original: nothing lies between the two that an "
            "attack could bring back. Give one that was trained without the rows, or leave it out."
        )
    texts = Texts.of(given, unrelated)
    if settings.retrained is None:
        warn(f"No recovered fractions: {NO_RETRAINED}")
    elif "original" not in models:
        warn(f"No recovered fractions: {NO_ORIGINAL}")
    if len(measured) < min(settings.rows, len(attacker)):
        warn(
            f"{len(measured)} of {len(rows)} forget rows are measured, since {len(attacker)} are the attacker's: lower `relearn.rows` "
            "to measure more."
        )
    for name, why in reasons.items():
        warn(f"Not run: {name}, {why}.")

    found: list[Record] = []
    pooled: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    benches = {
        name: Bench(settings, name, source, rows, measured, attacker, unrelated) for name, source in models.items()
    }
    plain: list[Record] = []
    for model, bench in benches.items():
        # all of them before the first attack: a model that does not fit to the others is noticed here
        plain += _measured(bench, PLAIN, identities[model], texts)
        same_tokens(plain)
        bench.release()
    for model, bench in benches.items():
        found += [record for record in plain if record.model == model]
        for name in _applicable(names, model):
            with _if_possible(failed, name, model):
                found += _measured(bench, name, identities[model], texts)
        if "cka" in names:
            with _if_possible(failed, "cka", model):
                pooled[model] = _pooled_states(bench, identities[model], texts)
        bench.release()
    deep: list[Record] = []
    if "uds" in names:
        with _if_possible(failed, "uds", "unlearned"):
            deep = _by_depth(settings, benches, identities, texts)
    alike = []
    with _if_possible(failed, "cka", "unlearned"):
        alike = states.cka(pooled)
    made = [*deep, *alike, *(record for name in names for record in recovered_fractions(found, name))]
    made = stamped(made, settings=settings.model_dump(mode="json"), seed=settings.seed, data=texts.forget)
    everything = [*found, *made]
    _write(out, everything, names)
    asked = {name.strip() for part in settings.attacks for name in part.split(",")}
    if lost := [why for name, why in failed.items() if name in asked]:
        raise UserError(" ".join([*lost, "All other attacks have run."]))
    return everything


def _write(out: Path, records: Sequence[Record], names: Sequence[str]) -> None:
    """Write the records and the relearning curves, if there are any, and print the tables."""
    write_records(out / "records.json", records)
    show_recovered(records, names)
    if any("step" in record.extra for record in records):
        draw_curves(records, out / "relearning.png")
    console.show(f"records: {out}", stderr=True, markup=False, highlight=False)


def _applicable(names: Sequence[str], model: str) -> list[str]:
    """Return the attacks to run on one of the models; those that compare models are run once all are measured.

    The original has nothing to relearn: under other attacks it tells how much any model says. From a retrained model
    nothing can be stripped.
    """
    left_out = {
        "original": (*TRAINING_ATTACKS, "strip", *COMPARING),
        "retrained": ("strip", *COMPARING),
        "unlearned": COMPARING,
    }
    return [name for name in names if name not in left_out[model]]


@contextmanager
def _if_possible(failed: dict[str, str], name: str, model: str) -> Iterator[None]:
    """Go on with the next attack where this one turns out to be impossible on a model; note why, and say it at once."""
    try:
        yield
    except Impossible as error:
        failed.setdefault(name, f"The attack {name!r} is not possible on the {model} model: {error}")
        warn(f"Not run: {name} on the {model} model. {error}")


@dataclass(frozen=True)
class Texts:
    """Digests of what attacks read: the forget rows, unrelated rows, and (`asked`) the hash that certificates state."""

    forget: str
    unrelated: str
    asked: str

    @classmethod
    def of(cls, rows: Sequence[Example], unrelated: Sequence[Example]) -> Texts:
        """Return the digests of these rows."""
        return cls(
            digest([row.row for row in rows]),
            digest([row.row for row in unrelated]),
            data_hash([row_hash(row) for row in rows]),
        )


def _measured(bench: Bench, name: str, identity: dict[str, str | None], texts: Texts) -> list[Record]:
    """Return the records of an attack (PLAIN: of none) on one model, stored ones if nothing has changed."""
    settings, method = bench.settings, ATTACKS.get(name)
    depends = (*ALWAYS_COUNT, *(method.settings if method else ()))
    read = [texts.forget, texts.unrelated] if name in UNRELATED else [texts.forget]
    if name == "paraphrase":
        # they may be of another file than the rows
        read.append(digest(paraphrases(settings.forget, bench.rows)))
    own = bench.attacker if method is None or method.takes_rows else []
    key = _key(bench, depends, identity, read, name, own)
    path = Path(settings.out) / f"{name}.{bench.name}.json"
    records = _stored(path, key)
    if records is None:
        started = time.monotonic()
        records = without_attack(bench) if method is None else method.run(bench)
        seconds = round(time.monotonic() - started, 1)
        records = stamped(
            records, key=key, settings=settings.model_dump(mode="json"), seed=settings.seed, seconds=seconds,
            **identity, data=texts.forget, rows=texts.asked, device=bench.source.place(),
        )  # fmt: skip
        write_records(path, records)
        warn(f"{bench.name}: {name}, {seconds:.0f} s")
    return records


def _pooled_states(bench: Bench, identity: dict[str, str | None], texts: Texts) -> np.ndarray:
    """Return one model's hidden states for CKA, stored ones if nothing has changed."""
    key = _key(bench, (*ALWAYS_COUNT, "probe_rows"), identity, [texts.forget], "states")
    path = Path(bench.settings.out) / f"states.{bench.name}.safetensors"
    kept = _stored_states(path, key)
    if kept is None:
        kept = states.pooled(bench)
        write_atomic(path, save({"states": kept}, metadata={"key": key}), private=True)
    return kept


def _by_depth(
    settings: Attack, benches: dict[str, Bench], identities: dict[str, dict[str, str | None]], texts: Texts
) -> list[Record]:
    """Return the unlearning depth score, which takes all models at once; the stored one if nothing has changed."""
    path = Path(settings.out) / "uds.json"
    keys = [_key(b, ALWAYS_COUNT, identities[name], [texts.forget], "uds") for name, b in benches.items()]
    # a model that cannot be identified is measured again
    records = _stored(path, digest(keys)) if all(keys) else None
    if not records:
        found = [depth.unlearning_depth(benches)]
        records = stamped(found, key=digest(keys), **identities["unlearned"], data=texts.forget)
        write_records(path, records)
    return records


def _key(
    bench: Bench,
    depends: Sequence[str],
    identity: dict[str, str | None],
    texts: list[str],
    name: str,
    attacker: Sequence[int] = (),
) -> str:
    """Return the digest of everything that a measurement depends on; empty if a model's contents cannot be known (a hub
    that does not answer).

    `attacker`: the attacker's rows, of a measurement that reads them; others stay valid when an attack that takes rows joins.
    """
    if "unknown" in identity.values():
        return ""
    source = bench.source
    own = bench.settings.model_dump(mode="json", include=set(depends))
    loading = [source.merged, source.dtype, source.quantization, source.chat_template_kwargs, source.place()]
    rows = [list(bench.measured), list(attacker)]
    return digest([name, own, rows, identity, texts, loading, VERSION, code_digest(), versions()])


__all__ = ["Attack", "attack"]
