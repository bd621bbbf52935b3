"""`alter attack`: can what was forgotten be brought back, and by whom?

Every attack is run on the unlearned model and, as the honest zero, on a model retrained without the forget rows: what it
brings out of that one was never forgotten knowledge. Two figures per row tell it: ROUGE-L recall of the greedy reply
against the true answer, and the probability of the true answer (TOFU's, per token). Of both, the recovered fraction is

    (unlearned under attack - retrained under attack) / (original - retrained)      (`alter.metrics.recovered_fraction`)

with the original and the retrained model not under attack, all on the same rows.

Rows of plain text have no question: their first half is the prompt and their second half the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from alter import metrics
from alter.attacks import depth, pruning, searching, states, talking, weights, wording
from alter.attacks.base import PLAIN, Array, Attack, Bench, paraphrases, split_rows
from alter.core import console
from alter.core.cache import cache_folder
from alter.core.console import warn
from alter.core.errors import UserError, nearest
from alter.core.files import digest, write_atomic
from alter.core.plugins import Registry
from alter.core.provenance import code_digest, stamped, versions
from alter.core.records import VERSION, Record, read_records, write_records
from alter.data.examples import Example, data_hash, load_examples, row_hash
from alter.models.loading import Subject
from alter.reporting.figures import AFTER, BEFORE, LINE, figure

MEASURES = {"attack_rouge": "ROUGE", "attack_probability": "prob.", "attack_probe": "read", "attack_lens": "lens"}
BY_DEPTH = ("attack_probe", "attack_lens")
"""Measures of which there is one per depth, and whose plain figure is that of the same reading of the other model."""
COMMON = ("forget", "rows", "seed", "max_new_tokens")
"""Settings that every measurement depends on, and so it does on `relearn.rows`: the attacker's rows are not measured."""


def _always(settings: Attack, rows: Sequence[Example]) -> str | None:
    return None


def _no_question(settings: Attack, rows: Sequence[Example]) -> str | None:
    return "the rows are text without questions" if any(row.prompt is None for row in rows) else None


def _no_talk(settings: Attack, rows: Sequence[Example]) -> str | None:
    if any(row.kind == "completion" for row in rows):
        return "the rows are completions, not questions"
    return _no_question(settings, rows)


def _few_rows(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.relearn.rows < weights.SEARCHED:
        return f"it needs --relearn.rows {weights.SEARCHED} or more: a part of them tells which rate is best"
    return None


def _no_paraphrase(settings: Attack, rows: Sequence[Example]) -> str | None:
    if paraphrases(settings.forget, rows) is not None:
        return None
    return "the rows have no column 'paraphrased_question' (TOFU's perturbed splits have it)"


def _no_adapter(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.adapter is None:
        return "there is no adapter to take off"
    return "the adapter is merged into the weights" if settings.merged else None


def _not_all_three(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.retrained is None or (settings.original is None and settings.adapter is None):
        return "it needs --retrained, and --original where there is no adapter"
    return None


@dataclass(frozen=True)
class Technique:
    """An attack: what the attacker needs, how it is run, settings it depends on besides `COMMON`, why it cannot be run."""

    needs: str
    run: Callable[[Bench], list[Record]]
    settings: tuple[str, ...] = ()
    missing: Callable[[Attack, Sequence[Example]], str | None] = _always


def plain(bench: Bench) -> list[Record]:
    """Measure without any attack, on the measured rows and on the attacker's."""
    model, _ = bench.shared()
    measured = bench.items(bench.measured)
    encoded = digest([item.ids for item in measured])
    return [
        *bench.measure(PLAIN, model, measured, part="other", encoded=encoded),
        *bench.measure(PLAIN, model, bench.items(bench.attacker), part="relearned"),
    ]


def same_tokens(records: Sequence[Record]) -> None:
    """Refuse models that cut the same rows into other tokens: probabilities per token are then not of the same things.

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


CHAT = "a chat with the model"
ATTACKS: Registry[Technique] = Registry(
    "attack",
    {
        "relearn": Technique(
            "weights, gradients, forget rows", lambda b: weights.relearn(b, lora=False, benign=False), ("relearn",)
        ),
        "relearn_lora": Technique(
            "weights, gradients, forget rows", lambda b: weights.relearn(b, lora=True, benign=False), ("relearn",)
        ),
        "benign": Technique("weights, gradients", lambda b: weights.relearn(b, lora=False, benign=True), ("relearn",)),
        "benign_lora": Technique(
            "weights, gradients", lambda b: weights.relearn(b, lora=True, benign=True), ("relearn",)
        ),
        "relearn_searched": Technique(
            "weights, gradients, forget rows", weights.relearn_searched, ("relearn", "budget"), _few_rows
        ),
        "quantize_8": Technique("weights", lambda b: weights.quantized(b, bits=8)),
        "quantize_4": Technique("weights", lambda b: weights.quantized(b, bits=4)),
        "prune_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=False)),
        "prune_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=False)),
        "wanda_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=True), ("relearn",)),
        "wanda_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=True), ("relearn",)),
        "paraphrase": Technique(CHAT, lambda b: wording.ask(b, name="paraphrase"), missing=_no_paraphrase),
        "telegram": Technique(CHAT, lambda b: wording.ask(b, name="telegram"), missing=_no_question),
        "reversed": Technique(CHAT, lambda b: wording.ask(b, name="reversed"), missing=_no_question),
        "upper_case": Technique(CHAT, lambda b: wording.ask(b, name="upper_case"), missing=_no_question),
        "foreign_frame": Technique(CHAT, lambda b: wording.ask(b, name="foreign_frame"), missing=_no_question),
        "languages": Technique(CHAT, talking.languages, missing=_no_question),
        "jailbreak": Technique(CHAT, talking.jailbreak, missing=_no_question),
        "dialogue": Technique(CHAT, talking.dialogue, missing=_no_talk),
        "hint": Technique("a chat with the model; the answer's initials", talking.hint, missing=_no_question),
        "few_shot": Technique("a chat with the model; forget rows", talking.few_shot, missing=_no_talk),
        "evolve": Technique(
            "a chat with the model; likelihoods of forget rows", searching.evolve, ("budget",), _no_question
        ),
        "beginning": Technique("to begin the reply", talking.beginning, missing=_no_question),
        "prefill": Technique("to begin the reply; the answer's first tokens", wording.prefill, ("prefill_tokens",)),
        "sample": Technique("many replies; to know the best", wording.sample, ("samples", "temperature")),
        "soft_prompt": Technique(
            "weights, gradients, forget rows; no weight is changed",
            searching.soft_prompt,
            ("budget", "soft_tokens", "relearn"),
            _no_question,
        ),
        "strip": Technique("the base weights", weights.strip, missing=_no_adapter),
        "probe": Technique("hidden states; half the forget rows", states.probe, ("probe_rows", "probe_tokens")),
        "lens": Technique("hidden states", depth.lens),
        "uds": Technique("hidden states; the original (a diagnosis)", lambda bench: [], missing=_not_all_three),
        "cka": Technique("hidden states (no evidence)", lambda bench: [], ("probe_rows",)),
    },
)
"""Every attack by name, in the order of the table. `uds` and `cka` compare the models once all are there."""
COMPARING = ("uds", "cka")
UNRELATED = {"benign", "benign_lora", "wanda_20", "wanda_50"}
"""Attacks that need rows of something else."""
TRAINING = ("relearn", "relearn_lora", "relearn_searched", "benign", "benign_lora")
SEARCHING = ("soft_prompt", "relearn_searched")
"""Attacks that train within a budget."""
PLACES = ("step", "depth", "variant")
"""What tells several measurements of one attack apart; of them the attacker takes the best."""


def chosen(settings: Attack, rows: Sequence[Example]) -> tuple[list[str], dict[str, str]]:
    """Return the attacks to run, and by name why others cannot be.

    Raises:
        UserError: an unknown name, or an attack that was asked for by name and cannot be run on these rows and models.
    """
    names = [name.strip() for part in settings.attacks for name in part.split(",") if name.strip()]
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"No attack {name!r}; expected of {', '.join(ATTACKS)}.{nearest(name, ATTACKS)}")
    reasons = {name: why for name in names or ATTACKS if (why := ATTACKS[name].missing(settings, rows)) is not None}
    for name in names:
        if name in reasons:
            raise UserError(f"The attack {name!r} is not possible: {reasons[name]}. Leave it out of --attacks.")
    wanted = dict.fromkeys(names or ATTACKS)
    return [name for name in ATTACKS if name in wanted and name not in reasons], reasons


def subjects(settings: Attack) -> dict[str, Subject]:
    """Return the models that take part, by what the records call them; the original only if it is known."""
    found: dict[str, Subject] = {}
    if settings.original is not None or settings.adapter is not None:
        found["original"] = settings.alike(settings.original or settings.model)
    if settings.retrained is not None:
        found["retrained"] = settings.alike(settings.retrained)
    found["unlearned"] = settings.alike(settings.model, settings.adapter).model_copy(
        update={"merged": settings.merged}
    )
    return found


# Running -------------------------------------------------------------------------------------------------------------


def _stored(path: Path, key: str) -> list[Record] | None:
    """Return the records of a file if they were measured under this key; nothing was under an empty one."""
    if not key or not path.is_file():
        return None
    try:
        found = read_records(path)
    except UserError as error:
        warn(f"{error} Running that attack again.")
        return None
    return found if found and all(record.provenance.get("key") == key for record in found) else None


def _stored_states(path: Path, key: str) -> np.ndarray | None:
    """Return the hidden states in a file if they were computed under this key; none were under an empty one."""
    if not key or not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("states") if (file.metadata() or {}).get("key") == key else None
    except SafetensorError as error:
        warn(f"{path} cannot be read ({error}); computing the hidden states again.")
        return None


def attack(settings: Attack) -> list[Record]:
    """Run `alter attack`: every attack on every model that takes part; print the table, write records and the curves.

    Each attack's records are written to `out/ATTACK.MODEL.json` as soon as it is done, and used again if models, data,
    settings, code and versions are the same. Files of models and adapters are only read; an attack that changes weights
    does so on a copy of its own, loaded for it.

    Raises:
        UserError: an unknown or impossible attack, models or rows that are not there, or an output folder that is a file.
    """
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {settings.out!r}, which is a file: give a folder.")
    rows = load_examples(settings.forget)
    names, reasons = chosen(settings, rows)
    measured, attacker = split_rows(len(rows), settings.rows, settings.relearn.rows, settings.seed)
    unrelated = load_examples(settings.relearn.benign) if UNRELATED & set(names) else []
    models = subjects(settings)
    identities = {name: subject.identity(cache_folder()) for name, subject in models.items()}
    texts = Texts.of(rows, unrelated)
    if settings.retrained is None:
        warn(f"No recovered fractions: {NO_RETRAINED}")
    for name, why in reasons.items():
        warn(f"Not run: {name}, {why}.")

    found: list[Record] = []
    pooled: dict[str, np.ndarray] = {}
    for model, subject in models.items():
        bench = Bench(settings, model, subject, rows, measured, attacker, unrelated)
        # in the original there is nothing to relearn: it tells how much an attack lets any model say; and from a retrained
        # model nothing can be taken off
        here = {
            "original": [name for name in names if name not in (*TRAINING, "strip", *COMPARING)],
            "retrained": [name for name in names if name not in ("strip", *COMPARING)],
            "unlearned": [name for name in names if name not in COMPARING],
        }[model]
        for name in [PLAIN, *here]:
            found += _measured(bench, name, identities[model], texts)
            if name == PLAIN:
                same_tokens(found)
        if "cka" in names:
            pooled[model] = _pooled_states(bench, identities[model], texts)
    deep = []
    if "uds" in names:
        benches = {
            name: Bench(settings, name, subject, rows, measured, attacker, unrelated)
            for name, subject in models.items()
        }
        deep = _by_depth(settings, benches, identities, texts)
    made = [*deep, *states.cka(pooled), *(record for name in names for record in compare(found, name))]
    made = stamped(made, settings=settings.model_dump(mode="json"), seed=settings.seed, data=texts.forget)
    everything = [*found, *made]
    write_records(out / "records.json", everything)
    show(everything, names)
    if any("step" in record.extra for record in found):
        draw_curves(everything, out / "relearning.png")
    console.show(f"records: {out}", stderr=True, markup=False, highlight=False)
    return everything


@dataclass(frozen=True)
class Texts:
    """Digests of what attacks read: the forget rows, unrelated rows, and (`asked`) the hash that certificates state."""

    forget: str
    unrelated: str
    asked: str

    @classmethod
    def of(cls, rows: Sequence[Example], unrelated: Sequence[Example]) -> Texts:
        """Those of these rows."""
        return cls(
            digest([row.row for row in rows]),
            digest([row.row for row in unrelated]),
            data_hash([row_hash(row) for row in rows]),
        )


def _measured(bench: Bench, name: str, identity: dict[str, str | None], texts: Texts) -> list[Record]:
    """Records of an attack (PLAIN: of none) on one model: kept ones if nothing has changed, else made and kept."""
    settings, method = bench.settings, ATTACKS.get(name)
    depends = (*COMMON, *(method.settings if method else ()))
    read = [texts.forget, texts.unrelated] if name in UNRELATED else [texts.forget]
    key = _key(settings, depends, identity, read, bench.subject, name)
    path = Path(settings.out) / f"{name}.{bench.name}.json"
    records = _stored(path, key)
    if records is None:
        started = time.monotonic()
        records = plain(bench) if method is None else method.run(bench)
        seconds = round(time.monotonic() - started, 1)
        records = stamped(
            records, key=key, settings=settings.model_dump(mode="json"), seed=settings.seed, seconds=seconds,
            **identity, data=texts.forget, rows=texts.asked, device=bench.subject.place(),
        )  # fmt: skip
        write_records(path, records)
        warn(f"{bench.name}: {name}, {seconds:.0f} s")
    return records


def _pooled_states(bench: Bench, identity: dict[str, str | None], texts: Texts) -> np.ndarray:
    """Hidden states for CKA of one model: kept ones if nothing has changed, else made and kept."""
    key = _key(bench.settings, (*COMMON, "probe_rows"), identity, [texts.forget], bench.subject, "states")
    path = Path(bench.settings.out) / f"states.{bench.name}.safetensors"
    kept = _stored_states(path, key)
    if kept is None:
        kept = states.pooled(bench)
        write_atomic(path, save({"states": kept}, metadata={"key": key}))
    return kept


def _by_depth(
    settings: Attack, benches: dict[str, Bench], identities: dict[str, dict[str, str | None]], texts: Texts
) -> list[Record]:
    """The unlearning depth score, which takes all models at once: kept if nothing has changed, else made and kept."""
    path = Path(settings.out) / "uds.json"
    keys = [_key(settings, COMMON, identities[name], [texts.forget], b.subject, "uds") for name, b in benches.items()]
    # a model that cannot be identified is measured again
    records = _stored(path, digest(keys)) if all(keys) else None
    if not records:
        found = [depth.unlearning_depth(benches)]
        records = stamped(found, key=digest(keys), **identities["unlearned"], data=texts.forget)
        write_records(path, records)
    return records


def _key(
    settings: Attack,
    depends: Sequence[str],
    identity: dict[str, str | None],
    texts: list[str],
    subject: Subject,
    name: str,
) -> str:
    """Digest of all that a measurement depends on; empty if a model's contents cannot be known (a hub without answer)."""
    if "unknown" in identity.values():
        return ""
    own = settings.model_dump(mode="json", include=set(depends)) | {"attacker": settings.relearn.rows}
    loading = [subject.merged, subject.dtype, subject.quantization, subject.chat_template_kwargs, subject.place()]
    return digest([name, own, identity, texts, loading, VERSION, code_digest(), versions()])


# Comparing -----------------------------------------------------------------------------------------------------------

NO_RETRAINED = (
    "they need a model that never saw the forget rows. Make one once with `alter finetune --model BASE --data RETAIN "
    "--out retrained` (BASE: the model before it learned the forget rows; RETAIN: the rows without them), then add "
    "`--retrained retrained`."
)
NO_ORIGINAL = "they need the model before unlearning: give it with `--original`."


def _on(record: Record, rows: Sequence[int]) -> Array:
    """Per-row values of a record for the rows of these numbers."""
    assert record.per_item is not None
    value = dict(zip(record.extra["rows"], record.per_item, strict=True))
    return np.array([value[row] for row in rows], dtype=np.float64)


def _select(records: Sequence[Record], model: str, attack_name: str, metric: str) -> list[Record]:
    return [
        r
        for r in records
        if (r.model, r.metric) == (model, metric)
        and r.extra.get("attack") == attack_name
        and r.extra.get("part", "other") == "other"
    ]


def compare(records: Sequence[Record], name: str) -> list[Record]:
    """Return the recovered fractions of an attack: one record per figure, whose value is None where it is refused.

    Of several numbers of steps, depths or variants the attacker takes the one at which the fraction is largest;
    `extra` says which, and `curve` holds all. Everything is on the rows that all models were measured on, but
    `original_attacked`, the original's own figure under the attack: what the attack can bring out of a model that knows.
    """
    found = []
    for metric in MEASURES:
        # under stripping a retrained model, which has no adapter, is what it is; a probe has no before but the others' own
        zero_name = PLAIN if name == "strip" else name
        plain_name = name if metric in BY_DEPTH else PLAIN
        candidates = []
        for after in _select(records, "unlearned", name, metric):
            same: dict[str, Any] = {key: after.extra[key] for key in PLACES if key in after.extra}
            zero = next(
                (r for r in _select(records, "retrained", zero_name, metric) if same.items() <= r.extra.items()), None
            )
            plains = {
                model: r
                for model in ("original", "retrained", "unlearned")
                for r in _select(records, model, plain_name, metric)
                if metric not in BY_DEPTH or same.items() <= r.extra.items()
            }
            one = _fraction(after, zero, plains, same)
            reach = next(
                (r for r in _select(records, "original", name, metric) if same.items() <= r.extra.items()), None
            )
            one.extra["original_attacked"] = None if reach is None else reach.value
            candidates.append(one)
        if not candidates:
            continue
        known = [candidate for candidate in candidates if candidate.value is not None]
        best = max(known, key=lambda candidate: candidate.value or 0.0) if known else candidates[-1]
        extra = {**best.extra, "attack": name, "needs": ATTACKS[name].needs}
        if len(candidates) > 1:
            shown = (*PLACES, "after", "retrained", "original")
            extra["curve"] = [
                {key: c.extra[key] for key in shown if key in c.extra} | {"fraction": c.value} for c in candidates
            ]
        found.append(Record("unlearned", best.metric, best.value, best.n, "strict", False, None, extra))
    return found


def _fraction(after: Record, zero: Record | None, plains: dict[str, Record], same: dict[str, Any]) -> Record:
    """Return the recovered fraction of one measurement as a record, or in `extra.refused` why there is none."""
    rows = after.extra["rows"] if zero is None else [r for r in after.extra["rows"] if r in set(zero.extra["rows"])]
    values = {model: _on(record, rows) for model, record in plains.items()}
    mean = {model: float(value.mean()) for model, value in values.items()}
    attacked, attacked_retrained = _on(after, rows), None if zero is None else _on(zero, rows)
    extra: dict[str, Any] = {
        **same,
        "rows": rows,
        "before": None if after.metric in BY_DEPTH else mean["unlearned"],
        "after": float(attacked.mean()),
        "retrained": None if attacked_retrained is None else float(attacked_retrained.mean()),
        "original": mean.get("original"),
        "retrained_before": mean.get("retrained"),
    }
    value = None
    if attacked_retrained is None:
        extra["refused"] = NO_RETRAINED
    elif "original" not in mean:
        extra["refused"] = NO_ORIGINAL
    else:
        try:
            value = metrics.recovered_fraction(extra["after"], extra["retrained"], mean["original"], mean["retrained"])
            gap = mean["original"] - mean["retrained"]
            extra["interval"] = list(metrics.recovered_interval(attacked, attacked_retrained, gap))
        except ValueError as error:
            extra["refused"] = str(error)
    metric = after.metric.replace("attack_", "attack_recovered_")
    return Record("unlearned", metric, value, len(rows), extra=extra)


# Showing -------------------------------------------------------------------------------------------------------------


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show(records: Sequence[Record], names: Sequence[str]) -> None:
    """Print what each attack recovered, and the hidden states by depth; say on stderr what was refused or trained badly."""
    table = Table(
        title="What can be brought back",
        caption="after, original, retrained: under the attack; recovered: 1 all, 0 no more than from the retrained model; "
        "± half the 95 % interval; @ step, depth or variant",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("attack", no_wrap=True)
    for column in ("figure", "before", "after", "original", "retrained", "recovered"):
        table.add_column(column, justify="left" if column == "figure" else "right", no_wrap=True)
    refusals: dict[str, list[str]] = {}
    for name in names:
        own = [r for r in records if r.extra.get("attack") == name and r.metric.startswith("attack_recovered_")]
        for place, record in enumerate(own):
            extra = record.extra
            share = "-"
            if record.value is not None:
                low, high = extra["interval"]
                share = f"{record.value:.2f} ± {(high - low) / 2:.2f}"
            label = MEASURES[record.metric.replace("recovered_", "")]
            step = "".join(f" @{extra[key]}" for key in PLACES if key in extra)
            figures = (_figure(extra[key]) for key in ("before", "after", "original_attacked", "retrained"))
            table.add_row("" if place else name, f"{label}{step}", *figures, share, end_section=place == len(own) - 1)
            if "refused" in extra:
                refusals.setdefault(extra["refused"], []).append(f"{name} ({label})")
    console.show(table)
    needs: dict[str, list[str]] = {}
    for name in names:
        needs.setdefault(ATTACKS[name].needs, []).append(name)
    console.show("What the attacker needs", style="italic")
    for need, where in needs.items():
        console.show(f" {', '.join(where)}: {need}", style="dim", highlight=False)
    depths = _depths(records)
    if depths is not None:
        console.show(depths)
    for record in records:
        if record.metric == "attack_uds":
            console.show(
                f"UDS {_figure(record.value)} on {record.n} rows ({record.extra['left_out']} left out): 1, at every block as "
                "little is left as in the retrained model; 0, all of it."
            )
    for why, where in refusals.items():
        if why != NO_RETRAINED:
            warn(f"No recovered fraction for {', '.join(where)}: {why}")
    for note in untrained(records):
        warn(note)


def untrained(records: Sequence[Record]) -> list[str]:
    """Say which training attacks did not even learn their own rows: what they did not recover is no evidence."""
    losses: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if "losses" in record.extra:
            losses[record.extra["attack"], record.model] = record.extra["losses"]
    notes = []
    for (name, model), values in losses.items():
        width = max(1, len(values) // 5)
        first, last = float(np.mean(values[:width])), float(np.mean(values[-width:]))
        if values[0] < KNOWN:
            fix = "give text that it does not know with --relearn.benign."
            notes.append(
                f"{name} had nothing to learn ({model}: loss {values[0]:.2f} at the start): no evidence; {fix}"
            )
        elif last > 0.7 * first:
            rate = "--relearn.lora-learning-rate" if name.endswith("lora") else "--relearn.learning-rate"
            remedy = "--budget" if name in SEARCHING else f"{rate} or --relearn.steps"
            notes.append(
                f"{name} hardly learned its own rows ({model}: loss {first:.2f} to {last:.2f}), so what it did not recover "
                f"is no evidence: raise {remedy}."
            )
    return notes


KNOWN = 0.1
"""Rows with a loss below this at the attacker's first step, in nats, are known already."""


def _depths(records: Sequence[Record]) -> Table | None:
    """Return the table of hidden states: a row for each depth, 0 the embeddings, d what the d-th block gives."""
    columns: dict[str, dict[int, float | None]] = {}
    for record in records:
        if record.metric in BY_DEPTH:
            columns.setdefault(f"{MEASURES[record.metric]}\n{record.model}", {})[record.extra["depth"]] = record.value
    for record in records:
        if record.metric == "attack_uds":
            for name, values in record.extra["falls"].items():
                columns[f"fall\n{name}"] = dict(enumerate(values, 1))
        if record.metric == "attack_cka":
            columns["CKA\n" + record.extra["pair"].replace(" ", "\n")] = dict(enumerate(record.extra["depths"]))
    if not columns:
        return None
    table = Table(
        title="Hidden states by depth",
        caption="read: next tokens of answers that a probe reads right; lens: probability of the answer that the model's own "
        "head reads; fall: of the original's log-probability with these states in it (UDS); CKA: alike (1) or not, no "
        "evidence of forgetting",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("depth", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for at in sorted({at for column in columns.values() for at in column}):
        table.add_row(str(at), *(_figure(column.get(at)) for column in columns.values()))
    return table


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Write the relearning curves: a column for each attack, ROUGE-L recall above and probability below."""
    names = list(dict.fromkeys(r.extra["attack"] for r in records if "step" in r.extra and "part" in r.extra))
    shown = [metric for metric in MEASURES if metric not in BY_DEPTH]
    with figure(path, rows=len(shown), columns=len(names), width=3.4, height=2.6) as axes:
        for row, metric in enumerate(shown):
            for column, name in enumerate(names):
                plot = axes[row][column]
                for model, color in (("unlearned", AFTER), ("retrained", BEFORE)):
                    for part, style in (("other", "-"), ("relearned", ":")):
                        points = {
                            r.extra.get("step", 0): r.value
                            for r in records
                            if (r.model, r.metric, r.extra.get("part")) == (model, metric, part)
                            and r.extra["attack"] in (PLAIN, name)
                        }
                        if len(points) > 1:
                            label = f"{model}, {part} rows"
                            plot.plot(list(points), list(points.values()), style, color=color, label=label, marker=".")
                original = _select(records, "original", PLAIN, metric)
                if original and original[0].value is not None:
                    plot.axhline(original[0].value, color=LINE, lw=1, ls="--", label="original")
                plot.set_ylim(0, 1.02)
                if row == 0:
                    plot.set_title(name)
                else:
                    plot.set_xlabel("steps")
                if column == 0:
                    plot.set_ylabel(MEASURES[metric])
        axes[0][0].legend(fontsize=7)


__all__ = ["ATTACKS", "Attack", "attack"]
