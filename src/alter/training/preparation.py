"""What is made before the first step: the adapter and its start, the frozen passes, the router, the penalties."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alter.adapter import AlterConfig
from alter.adapter.model import base_fingerprint
from alter.core import processes
from alter.core.errors import UserError
from alter.core.files import digest
from alter.data.encoding import Encoded
from alter.methods import frozen
from alter.methods.adapters import (
    AlterAdapter,
    AssistantLora,
    Lora,
    blocks,
    target_layers,
    target_names,
)
from alter.methods.alternatives import persona_views
from alter.methods.frozen import Depth
from alter.methods.initializers import Factors, Reglu, Zero
from alter.methods.objectives import Duet
from alter.methods.probes import low_rank, reinforce, starting_factors
from alter.models.guards import Form, Former, fit_detector
from alter.training.batches import Order, Rows, Traced
from alter.training.folder import kept_tensors
from alter.training.loss import Penalty
from alter.training.router import fit_router
from alter.training.settings import BRANCHES, Unlearn, branch_needs


def add_adapter(
    model: Any,
    run: Unlearn,
    names: list[str],
    start: Mapping[str, Factors] | None = None,
    former: Former | None = None,
) -> Any:
    """Put the run's adapter on a loaded model, or choose the weights to train.

    ALTER's adapter of `start_from`, which the model has then, gets room for `names`.

    Args:
        model: the base model.
        run: the settings.
        names: names of the sub-domains.
        start: where LoRA's factors start, with an initialiser that gives some.
        former: the LoRA of earlier requests that is trained on.

    Raises:
        UserError: the adapter to grow is not ALTER's, has other settings than asked for, or serves a name already.
    """
    adapter = run.adapter
    if run.start_from is not None and former is None:
        config = model.peft_config["default"]
        if not isinstance(config, AlterConfig) or not config.routed:
            raise UserError(f"start_from is {run.start_from!r}, which is no ALTER adapter with a router to grow.")
        for name in sorted(adapter.model_fields_set - {"kind", "isolation", "entropy_quantile"}):
            wanted, has = getattr(adapter, name), getattr(config, name)
            if isinstance(has, set) and isinstance(wanted, (list, tuple)):
                wanted, has = sorted(wanted), sorted(has)
            if wanted is not None and wanted != has:
                raise UserError(f"adapter.{name} is {wanted!r}, but {run.start_from} has {has!r}: leave it out.")
        own = config.domains or [f"expert {d + 1}" for d in range(config.num_forget_experts)]
        taken = [name for name in names if name in own]
        if taken:
            raise UserError(f"{run.start_from} has an expert for {taken[0]!r} already: nothing to add for it.")
        model.base_model.resize_experts("default", len(own) + len(names), own + names)
        config.inference_mode = False
        return model
    if isinstance(adapter, AlterAdapter):
        return adapter.attach(model, names, run.num_forget_experts or len(names))
    if isinstance(adapter, Lora):
        return adapter.attach(model, start, run.model, former)
    return adapter.attach(model)


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
) -> tuple[Traced, dict[str, Any]]:
    """Everything the training needs from the frozen base: router, entropies, gates, references; kept in `cache`."""
    needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
    of_forget, of_retain = {f for f, _ in order}, {r for _, r in order if r is not None}
    drawn = {"forget": of_forget, "alternative": of_forget, "retain": of_retain}
    used = {name: sorted(drawn[name]) for name in BRANCHES if needs[name].rows}
    alter = model.peft_config["default"] if isinstance(run.adapter, AlterAdapter) else None
    router, probe = None, None
    if alter is not None and alter.routed:
        host = model.base_model.router_host[1]
        router = host.alter_router["default"]
        probe = host.alter_probe["default"] if alter.probed else None
    key = digest(
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
    kept = frozen.restore(cache, key)
    if kept is None:
        found = {} if alter is None else fit_router(model, run, rows, tokenizer, limit)
        traced = []
        for name in used:
            members = [rows.of(name)[i] for i in used[name]]
            objective: Any = run.retain_objective if name == "retain" else run.objective
            if alter is None and not (needs[name].views or needs[name].base_logp or needs[name].base_hidden):
                traced += [frozen.Row() for _ in members]
                continue
            traced += frozen.trace_rows(
                model,
                members,
                pad_token_id=tokenizer.pad_token_id,
                gates=alter is not None,
                reference_k=run.reference_top_k if needs[name].views else 0,
                needs=needs[name],
                target=objective.target,
                views={view: made for view, made in (views or {}).items() if view in needs[name].views},
                depth=depth,
                label=f"{name} rows",
            )
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
    return {name: {i: next(left) for i in used[name]} for name in used}, kept.found


def _flat(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{side}.{name}": getattr(pair, side).cpu() for name, pair in factors.items() for side in "AB"}


def _factors(tensors: Mapping[str, Tensor], device: Any = None) -> dict[str, Factors]:
    names = [name.removeprefix("A.") for name in tensors if name.startswith("A.")]
    return {name: Factors(tensors[f"A.{name}"].to(device), tensors[f"B.{name}"].to(device)) for name in names}


def start_of(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> tuple[dict[str, Factors] | None, dict[str, Tensor]]:
    """Where LoRA's factors start, and the directions that B is kept away from, of each layer."""
    adapter, initializer = run.adapter, run.initializer
    if isinstance(initializer, Zero):
        return None, {}
    assert isinstance(adapter, Lora)
    key = digest(
        base_fingerprint(base),
        run.model_dump(include={"adapter", "initializer", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (forget, retain)],
    )
    # FILA and VILA compare one epoch of the schedule, with as many retain rows as forget rows
    count = initializer.rows if isinstance(initializer, Reglu) else len(forget)
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


def form_of(
    base: Any, run: Unlearn, forget: list[Encoded], pad_token_id: int, former: Former | None = None
) -> Form | None:
    """Settings and tensors of the run's inference form, if it makes one (see `alter.models.guards`).

    Raises:
        UserError: a detector is to be fitted on a single row.
    """
    common = {"base": base_fingerprint(base)}
    if isinstance(run.adapter, AssistantLora):
        return run.adapter.form(base) | common, {}
    if isinstance(run.adapter, Lora) and run.adapter.detector:
        settings, files = fit_detector(base, forget, pad_token_id=pad_token_id, seed=run.seed)
        form = settings | common | {"initializer": run.initializer.kind}, files
        return form if former is None else former.then(form)
    return None


def penalty_of(model: Any, run: Unlearn, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
    """REGLU's |B^T P|^2 over all layers, or O3's |A_earlier A^T|^2 over all earlier requests, averaged over the blocks."""
    adapter = run.adapter
    if not isinstance(adapter, Lora):
        return None
    by_layer: dict[str, dict[str, torch.nn.Parameter]] = {"lora_A": {}, "lora_B": {}}
    for name, parameter in model.named_parameters():
        for kind, found in by_layer.items():
            if f".{kind}." in name:
                found[name.removeprefix("base_model.model.").partition(f".{kind}.")[0]] = parameter
    if away and isinstance(run.initializer, Reglu):
        terms = [(away[name].t().to(p), p, False) for name, p in by_layer["lora_B"].items()]
        return Penalty(run.initializer.penalty, terms, adapter.r)
    if former is None:
        return None
    terms = [
        (earlier[f"base_model.model.{name}.lora_A.weight"].to(parameter), parameter, True)
        for earlier in former.snapshots
        for name, parameter in by_layer["lora_A"].items()
    ]
    return Penalty(adapter.orthogonality / blocks(model)[1], terms, adapter.r)


def instructed_view(run: Unlearn, tokenizer: Any, rows: list[Encoded], base: Any) -> dict[str, frozen.View]:
    """DUET's teacher: the rows after its instruction.

    Raises:
        UserError: the objectives instruct it differently, or the longest row does not fit into the context behind it.
    """
    said = {part.instruction for part in (run.objective, run.retain_objective) if isinstance(part, Duet)}
    if len(said) > 1:
        raise UserError(
            "objective.instruction and retain_objective.instruction differ, and there is one teacher: give the same words."
        )
    words = tuple(tokenizer(said.pop(), add_special_tokens=False)["input_ids"])
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
