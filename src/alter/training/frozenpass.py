"""The frozen base's passes over the rows of a run (entropies, gates, references, router's fit), cached in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from alter.adapter import base_fingerprint
from alter.core import processes
from alter.data import Encoded, batches_by_length
from alter.groundwork import frozen
from alter.logits import Depth
from alter.storage import digest
from alter.training.batches import Order, RunRows, Traced
from alter.training.router import fit_router
from alter.training.settings import BRANCHES, Unlearn, batches_of_step, branch_needs, steps_of
from alter.training.states import States
from alter.training.trunk import TRUNK_FILE, KeptStates, Sink, plain_because, say_plain, trunk_of


def trace_run(
    model: Any,
    tokenizer: Any,
    run: Unlearn,
    rows: RunRows,
    order: Order,
    cache: Path,
    views: Mapping[str, frozen.View] | None = None,
    depth: Depth | None = None,
    limit: int | None = None,
) -> tuple[Traced, dict[str, Any], KeptStates | None]:
    """Compute all that training needs from the frozen base (router, entropies, gates, references); kept in `cache`.

    The output of the blocks below the adapter, the last value returned, is cached beside `cache`.
    """
    needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
    of_forget, of_retain = {f for f, _ in order}, {r for _, r in order if r is not None}
    drawn = {"forget": of_forget, "alternative": of_forget, "retain": of_retain}
    used = {name: sorted(drawn[name]) for name in BRANCHES if needs[name].rows}
    alter = model.peft_config["default"] if run.adapter.routes else None
    router, probe = None, None
    if alter is not None and alter.routed:
        host = model.base_model.router_host[1]
        router = host.alter_router["default"]
        probe = host.alter_probe["default"] if alter.probed else None
    key = _key_of(model, run, rows, used, router, limit)
    pairs = steps_of(run, rows.epoch)[0] * run.batch_size * batches_of_step(run, rows.epoch)
    twice = pairs > len(rows.forget)
    below = _below(model, run, rows, used, depth, cache.with_name(TRUNK_FILE), key, twice)
    kept = frozen.restore(cache, key)
    if kept is None or not (below is None or below.read()):
        passing = FrozenPass(model, tokenizer.pad_token_id, run, rows, used, views or {}, depth, below)
        found = {} if alter is None else fit_router(model, run, rows, tokenizer, passing.for_fit, limit)
        traced, below = passing.all()
        weights = {} if router is None else {name: p.detach().cpu() for name, p in router.named_parameters()}
        if probe is not None:
            weights |= {f"probe.{name}": p.detach().cpu() for name, p in probe.named_parameters()}
        kept = frozen.Frozen(traced, weights, found)
        if processes.first():
            frozen.store(cache, kept, key)
    if router is not None:
        router.load_state_dict({n: w for n, w in kept.router.items() if not n.startswith("probe.")})
        if probe is not None:
            probe.load_state_dict({n: kept.router[f"probe.{n}"] for n in probe.state_dict()})
        router.requires_grad_(False)
    if alter is not None:
        alter.entropy_threshold = kept.found["entropy_threshold"]
        alter.router_memory = kept.found.get("router_memory", alter.router_memory)
    left = iter(kept.rows)
    return {name: {i: next(left) for i in used[name]} for name in used}, kept.found, below


def _below(
    model: Any,
    run: Unlearn,
    rows: RunRows,
    used: Mapping[str, list[int]],
    depth: Depth | None,
    path: Path,
    key: str,
    more_than_once: bool,
) -> KeptStates | None:
    """Open the cache of the trunk's states for the rows used of each branch; None, with the reason printed, without one.

    None too where nothing else asks for a frozen pass and no row is trained on twice: that pass is what it costs.
    """
    trunk = trunk_of(model)
    if trunk is None or not (run.adapter.routes or more_than_once):
        return None
    place = {(name, i): number for number, (name, i) in enumerate((name, i) for name in used for i in used[name])}
    lengths = [len(rows.of(name)[i].input_ids) for name, i in place]
    why = plain_because(run, model, trunk, depth, sum(lengths), path.parent)
    if why is not None:
        say_plain(why)
        return None
    return KeptStates(trunk, States(path, key, lengths), place)


def _key_of(
    model: Any, run: Unlearn, rows: RunRows, used: Mapping[str, list[int]], router: Any, limit: int | None
) -> str:
    """Return the key of everything that the frozen passes depend on."""
    needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
    return digest(
        base_fingerprint(model),
        run.model_dump(include={"adapter", "router_fit", "reference_top_k", "seed", "reinforcement"}),
        [part.model_dump() for part in (run.objective, run.retain_objective) if part.needs.views],
        [repr(needs[name]) for name in used],
        [[rows.of(name)[i].input_ids for i in used[name]] for name in used],
        [[rows.of(name)[i].labels for i in used[name]] for name in used],
        rows.expert,
        # an adapter to grow brings a router with it, and the retain rows that are not trained on still fit the new one
        None if run.start_from is None or router is None else [weight.sum().item() for weight in router.parameters()],
        [row.input_ids for row in rows.retain] if run.experts_only else None,
        limit,
    )


class FrozenPass:
    """The frozen base's pass over the rows of a run: each row passes once, whether or not the router's fit asks first.

    Args:
        model: with the adapter.
        pad_token_id: fills up shorter rows of a batch.
        run: the settings.
        rows: the rows.
        used: of each branch the rows that training takes.
        views: further passes by name.
        depth: where the objectives read hidden states, if they do.
        below: where the trunk's states are to be kept, if they are.
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        run: Unlearn,
        rows: RunRows,
        used: Mapping[str, list[int]],
        views: Mapping[str, frozen.View],
        depth: Depth | None,
        below: KeptStates | None,
    ) -> None:
        self.model, self.pad_token_id, self.run, self.rows, self.used = model, pad_token_id, run, rows, used
        self.views, self.depth, self.below = views, depth, below
        self._needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
        self._sink = None if below is None else Sink(below)
        self._seen: dict[tuple[str, int], frozen.FrozenRow] = {}

    def _reads(self, name: str) -> bool:
        """Tell whether anything but the trunk's states is wanted of the rows of a branch."""
        needs = self._needs[name]
        return bool(self.run.adapter.routes or needs.views or needs.base_logp or needs.base_hidden)

    def _branch(self, name: str, members: Sequence[int], **kept: bool) -> None:
        """Trace rows of a branch, with everything that its objective needs."""
        needs, run = self._needs[name], self.run
        objective = run.retain_objective if name == "retain" else run.objective
        traced = frozen.trace_rows(
            self.model,
            [self.rows.of(name)[i] for i in members],
            pad_token_id=self.pad_token_id,
            reference_k=run.reference_top_k if needs.views else 0,
            needs=needs,
            target=objective.target,
            views={view: made for view, made in self.views.items() if view in needs.views},
            depth=self.depth,
            each=None if self.below is None else partial(self.below.trunk.reading, alone=not self._reads(name)),
            take=None if self._sink is None else self._sink.of(name, members),
            label=f"{name} rows",
            **kept,
        )
        self._seen |= {(name, i): row for i, row in zip(members, traced, strict=True)}

    def for_fit(self, wanted: Sequence[Encoded], features: bool) -> list[frozen.FrozenRow]:
        """Return entropies and router features of rows; those that training uses are then traced but for their gates."""
        own = {id(self.rows.of(name)[i]): (name, i) for name in self.used for i in self.used[name]}
        asked = [own.get(id(row)) for row in wanted]
        for name in self.used:
            members = sorted({place[1] for place in asked if place is not None and place[0] == name})
            if members:
                self._branch(name, members, features=features)
        others = [row for row, place in zip(wanted, asked, strict=True) if place is None]
        traced = iter(
            frozen.trace_rows(self.model, others, pad_token_id=self.pad_token_id, label="router", features=features)
            if others
            else ()
        )
        return [next(traced) if place is None else self._seen[place] for place in asked]

    def all(self) -> tuple[list[frozen.FrozenRow], KeptStates | None]:
        """Return the traced rows used of each branch, branch after branch, and the cached trunk states."""
        traced = []
        for name, members in self.used.items():
            if not self._reads(name) and self.below is None:
                traced += [frozen.FrozenRow() for _ in members]
                continue
            left = [i for i in members if (name, i) not in self._seen]
            self._route([self._seen[name, i] for i in members if (name, i) in self._seen])
            if left:
                self._branch(name, left, gates=self.run.adapter.routes)
            traced += [self._seen[name, i] for i in members]
        return traced, self._kept()

    @torch.no_grad()
    def _route(self, rows: Sequence[frozen.FrozenRow]) -> None:
        """Compute the gates of rows with the fitted router, and drop the features that it read."""
        entropies = [row.entropy for row in rows if row.entropy is not None]
        lengths = [len(entropy) for entropy in entropies]
        for group in batches_by_length(lengths, frozen.TOKENS_PER_BATCH):
            beside = partial(pad_sequence, batch_first=True)
            entropy = beside([entropies[i] for i in group], padding_value=torch.inf)
            read = [features for i in group if (features := rows[i].features) is not None]
            mask = torch.arange(entropy.shape[1]) < torch.tensor([lengths[i] for i in group])[:, None]
            gates = self.model.base_model.route(entropy, beside(read) if read else None, mask).half()
            for place, i in enumerate(group):
                rows[i].gates, rows[i].features = gates[place, : lengths[i]].clone(), None

    def _kept(self) -> KeptStates | None:
        """Return the trunk's states if all of them were written and a step reproduces with them."""
        if self.below is None or self._sink is None or not self._sink.end():
            return None
        name, i = min(self.below.place, key=lambda place: len(self.rows.of(place[0])[place[1]].input_ids))
        if self.below.agrees(self.model, name, i, self.rows.of(name)[i].input_ids):
            return self.below
        say_plain("later blocks of this architecture need more of them than hidden states")
        self.below.states.path.unlink()
        return None
