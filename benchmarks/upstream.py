"""What is lost where the router chooses one LoRA for a whole request (`alter serve --upstream`) instead of one for each token.

    python benchmarks/upstream.py ADAPTER [--model builtin:tofu-mini/original] [--forget builtin:forget10]
        [--retain builtin:retain90[:400]] [--domain author]

Each row's true answer follows its question, as in a reply that says it; routes are those of a plain forward pass. Printed of
each set: questions by what is chosen for them, answer tokens that the router itself would give to another expert, and rows
in which any does.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from alter.data.encoding import encode, encode_prompt
from alter.data.rows import load_examples
from alter.models.loading import load_model
from alter.serving.upstream import Chooser


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--model", default="builtin:tofu-mini/original")
    parser.add_argument("--forget", default="builtin:forget10")
    parser.add_argument("--retain", default="builtin:retain90[:400]")
    parser.add_argument("--domain", default="author")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, given.adapter)
    chooser = Chooser(model, tokenizer)
    domains = list(model.active_peft_config.domains or [])
    print("| set | rows | base | right expert | another expert | answer tokens elsewhere | rows with one |")
    print("|---|---|---|---|---|---|---|")
    for name, source in (("forget", given.forget), ("retain", given.retain)):
        chosen: Counter[str] = Counter()
        tokens = elsewhere = rows = touched = 0
        to: Counter[str] = Counter()
        for example in load_examples(source):
            expert = chooser.choose(encode_prompt(tokenizer, example))
            own = str(example.row.get(given.domain))
            right = expert and (not domains or domains[expert - 1] == own)
            chosen["base" if not expert else "right" if right else "another"] += 1
            encoded = encode(tokenizer, example)
            with torch.no_grad():
                trace = model.base_model.trace(torch.tensor([encoded.input_ids]))
                gates = model.base_model.route(trace.entropy, trace.features)[0, :, 1:]
            answer = torch.tensor([label != -100 for label in encoded.labels])
            taken = torch.where(gates.amax(-1) > 0, gates.argmax(-1) + 1, 0)[answer]
            other = taken != expert
            tokens, elsewhere = tokens + len(taken), elsewhere + int(other.sum())
            rows, touched = rows + 1, touched + bool(other.any())
            to["base" if expert else "expert"] += int((other & ((taken == 0) == bool(expert))).sum())
        shares = [f"{chosen[each] / rows:.1%}" for each in ("base", "right", "another")]
        print(
            f"| {name} | {rows} | {' | '.join(shares)} | {elsewhere / tokens:.1%} | {touched / rows:.1%} |", flush=True
        )
        print(
            f"  of {elsewhere} tokens {to['base']} to the base instead of an expert, {to['expert']} the other way round"
        )


if __name__ == "__main__":
    main()
