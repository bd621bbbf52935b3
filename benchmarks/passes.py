"""Memory and time of a distillation step whose rows go through the student in passes of bounded size (`tokens_per_pass`).

python benchmarks/passes.py                    # each bound in a process of its own; two minutes

A student of SmolLM2-135M's shape with random weights, 16 rows of 256 tokens, the divergence at every token, bfloat16 on one thread.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alter.distillation.trainer import passes_of
from alter.logits import Part, measuring

ROWS, LENGTH, VOCABULARY = 16, 256, 49_152


def peak() -> float:
    """Return the largest memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(bound: int) -> None:
    """Take two steps' gradients, print the second one's time and the memory of both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip
    before = peak()
    places = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    places[:, -1] = False
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "positions": places,
    }
    for _ in range(2):
        begun = time.process_time()
        for part in passes_of(batch, bound):
            true = part["input_ids"].roll(-1, 1)[part["positions"]]

            def lost(logits: Tensor, at: slice, true: Tensor = true) -> Tensor:
                return torch.nn.functional.cross_entropy(logits.float(), true[at], reduction="none")[:, None]

            kept = [Part(len(true), lost)]
            with torch.autocast("cpu", dtype=torch.bfloat16), measuring(model, part["positions"], kept):
                ids, mask = part["input_ids"], part["attention_mask"]
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits.mean().backward()
        spent = time.process_time() - begun
    print(
        f"{bound:>8} tokens a pass: {spent:5.1f} s of processor time, {peak():.2f} GiB ({before:.2f} before)",
        flush=True,
    )


def main() -> None:
    """Measure each bound in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bounds", type=int, nargs="+", default=[ROWS * LENGTH, 2048, 1024, 512])
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    args = parser.parse_args()
    for bound in args.bounds:
        if args.alone:
            step(bound)
        else:
            subprocess.run([sys.executable, __file__, "--alone", "--bounds", str(bound)], check=True)


if __name__ == "__main__":
    main()
