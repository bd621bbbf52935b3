"""Do words or a model's states part the rows of a forget set? Adjusted Rand index with the labels that the rows have.

python benchmarks/sub_domains.py --model builtin:tofu-mini/original --forget builtin:forget05 --label author
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from sklearn.metrics import adjusted_rand_score

from alter.data.domains import domains
from alter.data.rows import load_examples
from alter.models.loading import load_model
from alter.training.data import row_states

LIMIT = 256
"""Tokens of a piece that is read at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--forget", required=True, help="rows, as for alter unlearn")
    parser.add_argument("--label", required=True, help="column that says to what each row belongs")
    asked = parser.parse_args()
    labels = [str(example.domain) for example in load_examples(asked.forget, domain_column=asked.label)]
    rows = [replace(example, domain=None) for example in load_examples(asked.forget)]
    model, tokenizer = load_model(asked.model, device="cpu")
    states = row_states(model, tokenizer, rows, LIMIT)
    given = len(set(labels))
    print(f"{len(rows)} rows of {given} kinds | their number given | number chosen: index, number")
    for name, seen in (("words alone", None), ("words or states", states)):
        found = [domains(rows, n=n, states=seen)[0] for n in (given, None)]
        index = [adjusted_rand_score(labels, one) for one in found]
        print(f"{name} | {index[0]:.2f} | {index[1]:.2f}, {len(np.unique(found[1]))}", flush=True)


if __name__ == "__main__":
    main()
