"""What is made before the first step: the adapter and its start, the frozen passes, the router, the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alter.adapter.base import base_fingerprint
from alter.core import processes
from alter.core.console import show
from alter.core.errors import UserError
from alter.core.files import digest
from alter.data.batching import batches_by_length
from alter.data.encoding import Encoded, encode_all
from alter.data.examples import Example
from alter.methods import frozen
from alter.methods.adapters import Beginning, OneExpert, Penalty
from alter.methods.adapters.expert import attributed
from alter.methods.alternatives import alternatives, persona_views
from alter.methods.frozen import Depth
from alter.methods.initializers import Factors
from alter.methods.objectives import Codes
from alter.methods.places import block_at, blocks, target_layers, target_names
from alter.methods.probes import GradientPasses, low_rank, reinforce, starting_factors
from alter.methods.recognition import marked
from alter.methods.tracing import recovered
from alter.models.guards import Form, Former
from alter.models.loading import load_model
from alter.training.batches import Order, Rows, Traced, schedule
from alter.training.codes import at_autoencoder, check_codes, codes_of, reading_at
from alter.training.data import Data, clusters
from alter.training.folder import CODES, GRADIENT, TRACED, kept_tensors
from alter.training.router import fit_router
from alter.training.sampler import Kin
from alter.training.settings import BRANCHES, Unlearn, batches_of_step, branch_needs, hidden_depth, steps_of
from alter.training.trunk import FILE as TRUNK
from alter.training.trunk import KeptStates, Sink, States, plain_because, say_plain, trunk_of
from alter.training.watcher import KEPT, Watcher


@dataclass(frozen=True)
class Loaded:
    """The model of a run and its rows in tokens: all that is known before anything is computed or written.

    Attributes:
        base: the model; with an adapter to grow, that is on it.
        tokenizer: its tokenizer.
        limit: longest sequence.
        forget, retain: the rows; a long one has become several.
        alternative: the forget rows once more in the form that the objective asks for, if it does.
        examples: of each forget row the example that it comes from.
        domain: of each forget row its sub-domain.
        former: the earlier adapter that is trained on.
        alone: steps before retain rows join.
        kin: what rows are to each other, where the sampler asks for it.
    """

    base: Any
    tokenizer: Any
    limit: int | None
    forget: list[Encoded]
    retain: list[Encoded]
    alternative: list[Encoded]
    examples: list[Example]
    domain: list[int]
    former: Former | None
    alone: int
    kin: Kin | None = None


def load(run: Unlearn) -> tuple[Any, Any]:
    """Load the model and its tokenizer, with the adapter of earlier requests on it where that grows.

    Raises:
        UserError: there is no such model or adapter.
    """
    # an adapter that is trained on comes later, from its weights: all that is measured before sees the bare base
    grown = run.start_from if run.adapter.grows else None
    return load_model(
        run.model, grown, run.adapter.dtype(run.dtype), run.device, run.quantization, run.chat_template_kwargs
    )


def encode(run: Unlearn, data: Data, base: Any, tokenizer: Any, former: Former | None) -> Loaded:
    """Check what the model must have, and encode the rows.

    Raises:
        UserError: the model lacks what the settings name, or the rows do not fit it.
    """
    run.adapter.check_model(base, run, former)
    check_codes(run, base, data.forget)
    limit = run.max_length or getattr(base.config, "max_position_embeddings", None)
    forget, owner = encode_all(tokenizer, data.forget, max_length=limit, label="forget")
    retain, of_retain = encode_all(tokenizer, data.retain, max_length=limit, label="retain")
    if run.retain_objective.needs.prompts:
        retain = [replace(row, labels=list(row.input_ids)) for row in retain]
    examples = [data.forget[i] for i in owner]
    kin = run.sampler.kin(data.forget, data.retain)
    kin = None if kin is None else kin.at(owner, of_retain)
    _, alone = steps_of(run, run.sampler.epoch_length(kin, len(forget), len(retain)))
    other = alternatives(run.objective, tokenizer, base, examples, forget, seed=run.seed, max_length=limit)
    domain = [data.domain[i] for i in owner]
    return Loaded(base, tokenizer, limit, forget, retain, other, examples, domain, former, alone, kin)


@dataclass(frozen=True)
class Prepared:
    """All that training takes and saving writes.

    Attributes:
        model: what is trained, with the adapter on it.
        tokenizer: its tokenizer.
        names: of the sub-domains.
        rows, order, traced: the rows, the order in which they are trained on, and what the frozen base knows of them.
        found: what the router's fit found.
        depth: where the objectives read hidden states, if they do.
        penalty: of the weights alone, if there is one.
        form: what the result needs besides the adapter, if anything.
        watcher: looks at the adapter while it trains, if the run is watched.
        alone: steps before retain rows join.
        trained: how many numbers train.
        kept: what the blocks below the experts put out for the rows, if that is kept.
        measured: what the rule for gradients knows of each weight.
        codes: how the objective compares hidden states, if it does so in a sparse code.
    """

    model: Any
    tokenizer: Any
    names: list[str]
    rows: Rows
    order: Order
    traced: Traced
    found: dict[str, Any]
    depth: Depth | None
    penalty: Penalty | None
    form: Form | None
    watcher: Watcher | None
    alone: int
    trained: int
    kept: KeptStates | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)
    codes: Codes | None = None


TRACED_ROWS = 16
"""Forget rows that causal tracing looks at."""


def placed(run: Unlearn, loaded: Loaded, out: Path) -> Unlearn:
    """The settings with the blocks that causal tracing finds (`adapter.traced`), or the expert that forget rows go to most.

    Raises:
        UserError: nothing can be traced.
    """
    run = at_autoencoder(run, loaded.base)
    if isinstance(run.adapter, OneExpert) and run.adapter.target is None:
        return _on_expert(run, loaded, out)
    window = getattr(run.adapter, "traced", None)
    if window is None:
        return run
    rows = loaded.forget[:TRACED_ROWS]
    key = digest(base_fingerprint(loaded.base), window, run.seed, [[row.input_ids, row.labels] for row in rows])

    def trace() -> dict[str, Tensor]:
        found = recovered(loaded.base, rows, window, seed=run.seed, pad_token_id=loaded.tokenizer.pad_token_id)
        return {"recovered": torch.tensor(found, dtype=torch.float64)}

    found = kept_tensors(out / TRACED, key, trace)["recovered"]
    _, count = blocks(loaded.base)
    first = int(found.argmax())
    show(f"Causal tracing: blocks {first} to {first + window - 1} of {count} carry the answers.", stderr=True)
    span = (first / count, (first + window) / count)
    adapter = run.adapter.model_copy(update={"depth": span, "traced": None})
    return reading_at(run.model_copy(update={"adapter": adapter}), first + window - 1, count)


def _on_expert(run: Unlearn, loaded: Loaded, out: Path) -> Unlearn:
    key = digest(base_fingerprint(loaded.base), [row.input_ids for row in loaded.forget])

    def look() -> dict[str, Tensor]:
        found = attributed(loaded.base, loaded.forget, pad_token_id=loaded.tokenizer.pad_token_id)
        return {str(block): scores for block, scores in found.items()}

    scores = kept_tensors(out / TRACED, key, look)
    block, expert = max(
        ((int(block), int(value.argmax())) for block, value in scores.items()),
        key=lambda place: (float(scores[str(place[0])][place[1]]), -place[0]),
    )
    share = float(scores[str(block)][expert])
    show(f"Of all experts, expert {expert} of block {block} gets most of the forget rows: {share:.0%}.", stderr=True)
    adapter = run.adapter.model_copy(update={"target": (block, expert)})
    return run.model_copy(update={"adapter": adapter})


def prepare(run: Unlearn, data: Data, loaded: Loaded, out: Path) -> Prepared:
    """Make everything that the first step needs; passes over the frozen base are kept in `out`.

    Raises:
        UserError: the initializer or the adapter cannot work with these rows or this model.
    """
    base, tokenizer, former = loaded.base, loaded.tokenizer, loaded.former
    views = frozen_views(base, tokenizer, run, loaded.forget, loaded.retain, out / "reinforced.safetensors")
    start, away = start_of(base, tokenizer, run, loaded.forget, loaded.retain, out / "start.safetensors")
    form = run.adapter.form(base, run, loaded.forget, tokenizer.pad_token_id, former)
    depth = depth_of(base, run)
    named, codes = codes_of(run, base, tokenizer, data.forget, data.retain, depth, loaded.limit, out / CODES)
    # new experts come behind those of an adapter that grows
    grows = run.adapter.grows and run.start_from is not None
    first = run.adapter.routed_experts(base) if grows else 1
    numbered = grows and run.domain_column is None and not run.name_clusters
    names = clusters(first, len(data.names)) if numbered else data.names
    model = run.adapter.attach(base, run, Beginning(names, start, former))
    experts = [first + d for d in loaded.domain]
    paired = run.sampler.epoch_length(loaded.kin, len(loaded.forget), len(loaded.retain))
    rows = Rows(loaded.forget, loaded.retain, experts, loaded.alternative, loaded.examples, paired)
    watcher = None
    if data.watched is not None:
        device = next(base.parameters()).device
        watcher = Watcher(
            run.watch, data.watched, tokenizer, max_length=loaded.limit, folder=out / KEPT, device=device
        )
    order = order_of(run, rows, loaded.alone, loaded.kin)
    cache = out / "frozen.safetensors"
    traced, found, below = trace_run(model, tokenizer, run, rows, order, cache, views, depth, loaded.limit)
    penalty = run.adapter.penalty(model, run, away, former)
    measured = measured_of(model, tokenizer, run, rows, out / GRADIENT)
    if codes is not None:
        for i, row in traced["forget"].items():
            whole = loaded.examples[i].prompt is None
            row.named = torch.tensor(marked(tokenizer, loaded.forget[i], named, whole=whole))
    # the second half of an initialised adapter is frozen
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // (1 if start is None else 2)
    return Prepared(
        model,
        tokenizer,
        names,
        rows,
        order,
        traced,
        found,
        depth,
        penalty,
        form,
        watcher,
        loaded.alone,
        trained,
        below,
        measured,
        codes,
    )


def measured_of(model: Any, tokenizer: Any, run: Unlearn, rows: Rows, cache: Path) -> dict[str, Tensor]:
    """What the rule for gradients measures of the untouched weights before the first step, by parameter; kept in `cache`."""
    if not run.gradient.measures:
        return {}
    key = digest(
        base_fingerprint(model),
        run.model_dump(include={"adapter", "gradient", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (rows.forget, rows.retain)],
    )
    passes = GradientPasses(model, rows.forget, rows.retain, run.batch_size, run.seed, tokenizer.pad_token_id)
    found = kept_tensors(cache, key, lambda: {k: v.cpu() for k, v in run.gradient.measure(passes, run.seed).items()})
    return {name: value.to(next(model.parameters()).device) for name, value in found.items()}


def depth_of(base: Any, run: Unlearn) -> Depth | None:
    """The block whose hidden states the objectives read, if they do.

    Raises:
        UserError: they name different ones.
    """
    share = hidden_depth(run)
    if share is None:
        return None
    place, count = blocks(base)
    block, *behind = list(base.get_submodule(place))[block_at(share, count) :]
    return Depth(block, tuple(behind))


def order_of(run: Unlearn, rows: Rows, alone: int, kin: Kin | None = None) -> Order:
    """The order of training; with `max_steps` no more of it than is used.

    Args:
        run: the settings.
        rows: the rows.
        alone: steps before retain rows join.
        kin: what rows are to each other, where the sampler asks for it.
    """
    of_step = run.batch_size * batches_of_step(run, rows.epoch)
    steps, _ = steps_of(run, rows.epoch)
    if run.sampler.order != "mixed":
        pairs = steps * of_step if run.max_steps else math.ceil(run.epochs * rows.epoch)
        return run.sampler.take(
            kin, len(rows.forget), len(rows.retain), pairs=pairs, seed=run.seed, alone=alone * of_step
        )
    return schedule(
        [len(row.input_ids) for row in rows.forget],
        [len(row.input_ids) for row in rows.retain],
        # with max_steps the schedule would start again, and with it the steps without retain rows
        epochs=max(run.epochs, steps * of_step / len(rows.forget)) if alone and run.max_steps else run.epochs,
        batch=run.batch_size,
        seed=run.seed,
        alone=alone * of_step,
    )


def trace_run(
    model: Any,
    tokenizer: Any,
    run: Unlearn,
    rows: Rows,
    order: Order,
    cache: Path,
    views: Mapping[str, frozen.View] | None = None,
    depth: Depth | None = None,
    limit: int | None = None,
) -> tuple[Traced, dict[str, Any], KeptStates | None]:
    """Everything the training needs from the frozen base: router, entropies, gates, references; kept in `cache`.

    Beside `cache` lies what the blocks below the experts put out for the rows, which is the last that is returned.
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
    below = _below(model, run, rows, used, depth, cache.with_name(TRUNK), key)
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
    rows: Rows,
    used: Mapping[str, list[int]],
    depth: Depth | None,
    path: Path,
    key: str,
) -> KeptStates | None:
    """Where the trunk's states are to be kept, of the rows used of each branch; None, which is said, where they are not."""
    trunk = trunk_of(model) if run.adapter.routes else None
    if trunk is None:
        return None
    place = {(name, i): number for number, (name, i) in enumerate((name, i) for name in used for i in used[name])}
    lengths = [len(rows.of(name)[i].input_ids) for name, i in place]
    why = plain_because(run, model, trunk, depth, sum(lengths), path.parent)
    if why is not None:
        say_plain(why)
        return None
    return KeptStates(trunk, States(path, key, lengths), place)


def _key_of(
    model: Any, run: Unlearn, rows: Rows, used: Mapping[str, list[int]], router: Any, limit: int | None
) -> str:
    """Key of all that the frozen passes depend on."""
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
    """The frozen base's pass over the rows of a run: each goes through it once, whether the router's fit asks first or not.

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
        rows: Rows,
        used: Mapping[str, list[int]],
        views: Mapping[str, frozen.View],
        depth: Depth | None,
        below: KeptStates | None,
    ) -> None:
        self.model, self.pad_token_id, self.run, self.rows, self.used = model, pad_token_id, run, rows, used
        self.views, self.depth, self.below = views, depth, below
        self._needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
        self._sink = None if below is None else Sink(below)
        self._seen: dict[tuple[str, int], frozen.Row] = {}

    def _branch(self, name: str, members: Sequence[int], **kept: bool) -> None:
        """Trace some rows of a branch with all that its objective needs."""
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
            each=None if self.below is None else self.below.trunk.reading,
            take=None if self._sink is None else self._sink.of(name, members),
            label=f"{name} rows",
            **kept,
        )
        self._seen |= {(name, i): row for i, row in zip(members, traced, strict=True)}

    def for_fit(self, wanted: Sequence[Encoded], features: bool) -> list[frozen.Row]:
        """Entropies of rows, and what the router reads; those that training takes are then done but for their gates."""
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

    def all(self) -> tuple[list[frozen.Row], KeptStates | None]:
        """What is known of the rows used of each branch, one branch after the other; and where the trunk's states are kept."""
        traced = []
        for name, members in self.used.items():
            needs = self._needs[name]
            if not (self.run.adapter.routes or needs.views or needs.base_logp or needs.base_hidden):
                traced += [frozen.Row() for _ in members]
                continue
            left = [i for i in members if (name, i) not in self._seen]
            self._route([self._seen[name, i] for i in members if (name, i) in self._seen])
            if left:
                self._branch(name, left, gates=self.run.adapter.routes)
            traced += [self._seen[name, i] for i in members]
        return traced, self._kept()

    @torch.no_grad()
    def _route(self, rows: Sequence[frozen.Row]) -> None:
        """Give rows the gates of the router as it is now, in the place of what it read."""
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
        """Where the trunk's states are kept, if all of them were written and a step can begin with them."""
        if self.below is None or self._sink is None or not self._sink.end():
            return None
        name, i = min(self.below.place, key=lambda place: len(self.rows.of(place[0])[place[1]].input_ids))
        if self.below.agrees(self.model, name, i, self.rows.of(name)[i].input_ids):
            return self.below
        say_plain("later blocks of this architecture need more of them than hidden states")
        self.below.states.path.unlink()
        return None


def _flat(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{side}.{name}": getattr(pair, side).cpu() for name, pair in factors.items() for side in "AB"}


def _factors(tensors: Mapping[str, Tensor], device: Any = None) -> dict[str, Factors]:
    names = [name.removeprefix("A.") for name in tensors if name.startswith("A.")]
    return {name: Factors(tensors[f"A.{name}"].to(device), tensors[f"B.{name}"].to(device)) for name in names}


def start_of(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> tuple[dict[str, Factors] | None, dict[str, Tensor]]:
    """Where LoRA's factors start, and the directions that B is kept away from, of each layer."""
    adapter: Any = run.adapter
    initializer = run.initializer
    if not initializer.gives_factors:
        return None, {}
    key = digest(
        base_fingerprint(base),
        run.model_dump(include={"adapter", "initializer", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (forget, retain)],
    )
    count = initializer.retain_rows(len(forget))
    drawn = np.random.default_rng(run.seed).permutation(len(retain))[:count].tolist()

    def make() -> dict[str, Tensor]:
        start, away = starting_factors(
            base,
            adapter.layers(base),
            initializer,
            forget,
            [retain[i] for i in drawn],
            r=adapter.r,
            scaling=adapter.alpha / adapter.r,
            batch=run.batch_size,
            seed=run.seed,
            pad_token_id=tokenizer.pad_token_id,
        )
        return _flat(start) | {f"P.{name}": value for name, value in away.items()}

    tensors = kept_tensors(cache, key, make)
    away = {name.removeprefix("P."): value for name, value in tensors.items() if name.startswith("P.")}
    return _factors(tensors), away


def instructed_view(run: Unlearn, tokenizer: Any, rows: list[Encoded], base: Any) -> dict[str, frozen.View]:
    """DUET's teacher: the rows after its instruction.

    Raises:
        UserError: the objectives instruct it differently, or the longest row does not fit into the context behind it.
    """
    said = {part.needs.instruction for part in (run.objective, run.retain_objective)} - {None}
    if len(said) > 1:
        raise UserError(
            "objective.instruction and retain_objective.instruction differ, and there is one teacher: give the same words."
        )
    words = tuple(tokenizer(str(said.pop()), add_special_tokens=False)["input_ids"])
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.input_ids) for row in rows)
    if limit is not None and longest + len(words) > limit:
        raise UserError(
            f"objective.instruction has {len(words)} tokens and the longest row {longest}; together they exceed the model's "
            f"context of {limit}: give max_length of at most {limit - len(words)}, or a shorter instruction."
        )
    return {"instructed": frozen.View(words, tokenizer.bos_token_id)}


def frozen_views(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> dict[str, frozen.View]:
    """The frozen passes besides the base's own that the objectives ask for."""
    wanted = {*run.objective.needs.views, *run.retain_objective.needs.views}
    views: dict[str, frozen.View] = {}
    if "instructed" in wanted:
        views |= instructed_view(run, tokenizer, [*forget, *retain], base)
    if "expert" in wanted:
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        views |= persona_views(run.objective, tokenizer, forget, context)
    if "reinforced" in wanted:
        layers = target_layers(base, target_names(base, None), None)
        key = digest(
            base_fingerprint(base),
            run.model_dump(include={"reinforcement", "batch_size", "seed"}),
            [row.input_ids for row in forget],
        )

        def make() -> dict[str, Tensor]:
            return _flat(
                reinforce(
                    base,
                    layers,
                    forget,
                    r=16,
                    scaling=2.0,
                    epochs=run.reinforcement.epochs,
                    learning_rate=run.reinforcement.learning_rate,
                    batch=run.batch_size,
                    seed=run.seed,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )

        factors = _factors(kept_tensors(cache, key, make), next(base.parameters()).device)
        views["reinforced"] = frozen.View(inside=lambda: low_rank(layers, factors, 2.0))
    return views
