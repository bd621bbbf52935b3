"""One pass of the frozen base over a fixed data set: entropies, router features, reference distributions.

The base never changes while an adapter trains, so nothing here is computed during training: one pass over the rows that
the run will see, kept next to the run in safetensors, and reused when the run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alter.adapter import Trace, alter_of
from alter.core import processes, progress
from alter.data import Collator, Encoded, batches_by_length
from alter.logits import Depth, Head, chunk_rows, states_of
from alter.methods import Emitted, Needs, Reference
from alter.storage import keep, kept

TOKENS_PER_BATCH = 8192


@dataclass
class FrozenRow:
    """One row under the frozen base: T tokens, of which n are labelled, N forget experts, D router features.

    `entropy` [T], `features` [T, D] and `gates` [T, N + 1] belong to each token's generating step (see
    `AlterModel.trace`); `reference` holds the distributions an objective compares with, and `base_logp` [n] the
    log-probabilities of the labels, at the n labelled tokens; `hidden` [T, H] the hidden states after one block; `named` [T]
    whether a token is part of a name (`alter.groundwork.recognition`), which no pass is needed for.
    """

    entropy: Tensor | None = None
    features: Tensor | None = None
    gates: Tensor | None = None
    reference: Reference | None = None
    base_logp: Tensor | None = None
    hidden: Tensor | None = None
    named: Tensor | None = None

    def apart(self) -> FrozenRow:
        """Copy the row's tensors: a view into a batch would keep, and pickle, the whole batch."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reference"}
        reference = self.reference and Reference(self.reference.ids.clone(), self.reference.logp.clone())
        return FrozenRow(
            reference=reference, **{name: None if value is None else value.clone() for name, value in tensors.items()}
        )


@dataclass(frozen=True)
class View:
    """One more frozen pass over the same rows: with `prefix` tokens before each, or with `inside` around the pass.

    The prefix comes after a row's first token where that is `bos`.
    """

    prefix: tuple[int, ...] = ()
    bos: int | None = None
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def extend(self, row: Encoded) -> dict[str, list[int]]:
        """Insert the prefix into a row, for a collator."""
        start = int(self.bos is not None and row.input_ids[0] == self.bos)
        ids = [*row.input_ids[:start], *self.prefix, *row.input_ids[start:]]
        return {"input_ids": ids, "labels": ids}


def labelled(labels: Tensor) -> Tensor:
    """Return [B, T] bool: the position whose distribution gives a labelled token is one before that token."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def top_k(logp: Tensor, k: int) -> Reference:
    """Keep the k most likely tokens of [n, V] log-probabilities."""
    values, ids = logp.topk(min(k, logp.shape[-1]), dim=-1)
    return Reference(ids.to(torch.int32), values)


def frozen_pass(model: Any, ids: Tensor, mask: Tensor) -> Trace:
    """Run the base once, without any adapter; entropies and features only where ALTER routes."""
    tuner = alter_of(model)
    if tuner is not None:
        return tuner.trace(ids, mask)
    head = Head(model)

    def off() -> AbstractContextManager[Any]:
        return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()

    def logits(states: Tensor) -> Tensor:
        with off():
            return head.logits(states)

    with off(), head.reading() as read:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return Trace(torch.zeros(ids.shape, device=ids.device), None, read[0], logits)


def _log_softmax_of_base(views: Mapping[str, Tensor], along: Tensor) -> Tensor:
    return torch.log_softmax(views["base"], dim=-1)


Target = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def _at_labels(
    seen: Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]],
    labels: Tensor,
    counts: Sequence[int],
    k: int,
    target: Target | None,
    with_base: bool,
    rows_at_once: int,
) -> tuple[list[Reference], list[Tensor]]:
    """Compute references and log-probabilities at the labels of rows with `counts` labels each, a chunk of logits at a time.

    `seen` holds, for every view, the states [n, D] that its head reads and what makes logits of them.
    """
    if target is None and not with_base:
        return [], []
    along = torch.cat([torch.arange(n, dtype=torch.float64) / max(n - 1, 1) for n in counts]).to(labels.device)
    references, logp = [], []
    for start in range(0, max(len(labels), 1), rows_at_once):
        at = slice(start, start + rows_at_once)
        logits = {name: logits_of(states[at]).float() for name, (states, logits_of) in seen.items()}
        if target is not None:
            kept = top_k(target(logits, along[at]), k)
            references.append(Reference(kept.ids.cpu(), kept.logp.cpu()))
        if with_base:
            logp.append(-Emitted(logits["base"], labels[at]).nll.cpu())
    ids, values = (
        torch.cat([getattr(part, name) for part in references]).split(counts) if references else ()
        for name in ("ids", "logp")
    )
    return list(map(Reference, ids, values)), list(torch.cat(logp).split(counts)) if logp else []


@dataclass(frozen=True)
class _Tracing:
    """Options of one `trace_rows` call; its arguments explain each field."""

    model: Any
    rows: Sequence[Encoded]
    collate: Collator
    features: bool
    gates: bool
    reference_k: int
    needs: Needs
    target: Target
    views: Mapping[str, View]
    depth: Depth | None
    each: Callable[[], AbstractContextManager[Any]]
    take: Callable[[int, Tensor], None] | None

    @property
    def routed(self) -> bool:
        """Whether an ALTER adapter reads entropies and features."""
        return alter_of(self.model) is not None

    def run(self, group: Sequence[int]) -> list[FrozenRow]:
        """Run the rows with these numbers as one batch, through the base and through every view."""
        device = next(self.model.parameters()).device
        batch = self.collate([{"input_ids": self.rows[i].input_ids, "labels": self.rows[i].labels} for i in group])
        batch = {name: value.to(device) for name, value in batch.items()}
        alone = not (self.routed or self.reference_k or self.needs.base_logp)
        with states_of(self.depth if self.needs.base_hidden else None, alone) as hidden, self.each() as below:
            traced = frozen_pass(self.model, batch["input_ids"], batch["attention_mask"])
        references, base_logp = self._labels(group, traced, batch["labels"])
        opened = None
        if self.gates:
            opened = self.model.base_model.route(traced.entropy, traced.features, batch["attention_mask"]).half().cpu()
        made = []
        for place, i in enumerate(group):
            at = place, slice(len(self.rows[i].input_ids))
            row = FrozenRow(
                entropy=traced.entropy[at].float().cpu() if self.routed else None,
                features=traced.features[at].cpu() if self.features and traced.features is not None else None,
                gates=None if opened is None else opened[at],
                hidden=hidden[0][at].cpu() if self.needs.base_hidden else None,
                reference=references[place] if self.reference_k else None,
                base_logp=base_logp[place] if self.needs.base_logp else None,
            )
            made.append(row.apart())
            if self.take is not None and below:
                self.take(i, below[0][at])
        return made

    def _labels(self, group: Sequence[int], traced: Trace, labels: Tensor) -> tuple[list[Reference], list[Tensor]]:
        """Run the views; return references and log-probabilities at the labels [B, T] of a batch."""
        positions = labelled(labels)
        seen = {"base": (traced.states[positions], traced.logits)}
        for name, view in self.views.items():
            longer = self.collate([view.extend(self.rows[i]) for i in group])
            ids, mask = (longer[part].to(labels.device) for part in ("input_ids", "attention_mask"))
            with view.inside():
                other = frozen_pass(self.model, ids, mask)
            seen[name] = other.states[:, len(view.prefix) :][positions], other.logits
        # the logits of all views exist side by side
        vocabulary = self.model.config.get_text_config().vocab_size
        rows_at_once = max(1, chunk_rows(vocabulary) // (1 + len(self.views)))
        truth = labels[:, 1:][positions[:, :-1]]
        target = self.target if self.reference_k else None
        counts = positions.sum(1).tolist()
        return _at_labels(seen, truth, counts, self.reference_k, target, self.needs.base_logp, rows_at_once)


def trace_rows(
    model: Any,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    features: bool = False,
    gates: bool = False,
    reference_k: int = 0,
    needs: Needs | None = None,
    target: Target = _log_softmax_of_base,
    views: Mapping[str, View] | None = None,
    depth: Depth | None = None,
    each: Callable[[], AbstractContextManager[list[Tensor]]] | None = None,
    take: Callable[[int, Tensor], None] | None = None,
    label: str = "frozen base",
) -> list[FrozenRow]:
    """Run the frozen base once over `rows`, and once more for each further view that the reference needs.

    Several processes (`alter.core.processes`) share the rows, and each gets them all.

    Args:
        model: the base, or a `PeftModel` around it, whose base is what runs.
        rows: encoded rows, any lengths.
        pad_token_id: fills up shorter rows of a batch.
        features: keep the router's features, in the model's own numbers: routes follow from them.
        gates: keep the gates that the adapter's router gives now.
        reference_k: keep this many most likely tokens per labelled position; 0 keeps no reference.
        needs: what an objective needs; `base_logp` and `base_hidden` are kept where it says so.
        target: makes the reference of the logits [n, V] of all views at n labelled positions, and of how far each one
            is along its row's (see `objectives`).
        views: further passes by name, besides "base".
        depth: where hidden states are kept from with `needs.base_hidden`.
        each: a block that goes around every pass of the base, whose list then holds states [B, T, H].
        take: is given the number of each row and its states [T, H] in that list.

    Returns:
        one `Row` per input row, in order, on the CPU.
    """
    wanted = _Tracing(
        model, rows, Collator(pad_token_id), features, gates, reference_k, needs or Needs(),
        target, views or {}, depth, each or nullcontext, take,
    )  # fmt: skip
    groups = batches_by_length([len(row.input_ids) for row in rows], TOKENS_PER_BATCH)
    result: dict[int, FrozenRow] = {}
    with torch.no_grad():
        # what is taken on the way is taken in this process
        found = processes.spread(groups, wanted.run, model, apart=take is None)
        passes = zip(groups, found, strict=True)
        for group, made in progress(passes, total=len(groups), label=label):
            result.update(zip(group, made, strict=True))
    return [result[i] for i in range(len(rows))]


@dataclass
class Frozen:
    """Everything that a run takes from the frozen base: its rows, the fitted router's parameters, and the fit's findings."""

    rows: list[FrozenRow]
    router: dict[str, Tensor]
    found: dict[str, Any]


def store(path: Path, frozen: Frozen, key: str) -> None:
    """Write all traced rows and the router to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    for field in fields(FrozenRow):
        parts = [getattr(row, field.name) for row in frozen.rows]
        columns = {field.name: parts}
        if field.name == "reference":
            columns = {name: [part and getattr(part, name) for part in parts] for name in ("ids", "logp")}
        for name, values in columns.items():
            if any(value is not None for value in values):
                # a row without the field counts -1
                tensors[f"{name}.count"] = torch.tensor([-1 if v is None else len(v) for v in values])
                tensors[name] = torch.cat([value for value in values if value is not None])
    tensors["rows"] = torch.tensor(len(frozen.rows))
    tensors |= {f"router.{name}": value.contiguous() for name, value in frozen.router.items()}
    keep(path, tensors, key, found=json.dumps(frozen.found))


def restore(path: Path, key: str) -> Frozen | None:
    """Read what `store` wrote under the same key; None if it is missing, of another key, or damaged."""
    found = kept(path, key)
    if found is None:
        return None
    tensors, metadata = found

    def column(name: str) -> list[Tensor | None]:
        if name not in tensors:
            return [None] * int(tensors["rows"])
        counts = tensors[f"{name}.count"].tolist()
        parts = iter(tensors[name].split([count for count in counts if count >= 0]))
        return [next(parts) if count >= 0 else None for count in counts]

    known = [field.name for field in fields(FrozenRow) if field.name != "reference"]
    rows = [FrozenRow(**dict(zip(known, values, strict=True))) for values in zip(*map(column, known), strict=True)]
    for row, ids, logp in zip(rows, column("ids"), column("logp"), strict=True):
        if ids is not None and logp is not None:
            row.reference = Reference(ids, logp)
    router = {name.removeprefix("router."): value for name, value in tensors.items() if name.startswith("router.")}
    return Frozen(rows, router, json.loads(metadata["found"]))


READ_LATER = ("entropy", "gates", "rows")
"""Tensors of the frozen pass that a report shows: numbers of tokens, but not which tokens."""


def strip(path: Path, forget_rows: int) -> None:
    """Cut a file of `store` down to what is read after the run has ended; the rest would reveal the rows.

    Args:
        path: the file; nothing happens if there is none, and one that cannot be read is deleted.
        forget_rows: how many of the rows, the first ones, are forget rows or other answers to them.
    """
    if not path.exists():
        return
    try:
        with safe_open(str(path), "pt") as file:
            names = [name for name in file.keys() if name.removesuffix(".count") in READ_LATER]  # noqa: SIM118  not a dict
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError:
        path.unlink()
        return
    tensors["forget_rows"] = torch.tensor(forget_rows)
    # no run is resumed from what is left
    keep(path, tensors, "ended")
