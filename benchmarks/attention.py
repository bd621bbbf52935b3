"""A training step in 16 bits on a CPU: its attention in float32 (`alter.training.attention`) beside transformers' own.

    python benchmarks/attention.py --model builtin:tofu-mini/original --rows 20 --tokens 100

A step is the forward and backward pass of a plain LoRA on all linear layers over random tokens, in processor time, the two
in turns. Prints both with their ratio, and adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import results
from alter.models.loading import load_model
from alter.training.attention import attention_for_training


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin:tofu-mini/original")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base, _ = load_model(args.model, dtype="bfloat16", device="cpu")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    ids = torch.randint(10, base.config.get_text_config().vocab_size, (args.rows, args.tokens))
    # the last row is shorter, as in every real batch, so that there is a mask
    mask = torch.ones_like(ids)
    mask[-1, args.tokens // 2 :] = 0
    blocks = {"own": nullcontext, "float32": attention_for_training}
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    for step in range(args.steps + 1):
        for name, block in blocks.items():
            start = time.process_time()
            with block():
                model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            model.zero_grad()
            # the first of each warms up
            if step:
                taken[name].append(time.process_time() - start)
    figures = {f"{name}_ms": results.spread([1e3 * t for t in seconds]) for name, seconds in taken.items()}
    figures["time_over_own"] = results.ratios(taken["float32"], taken["own"])
    common = {
        "benchmark": "attention", "hardware": results.hardware("cpu"), "torch": torch.__version__,
        "shape": f"{Path(args.model).name if args.model.startswith('/') else args.model}, rows {args.rows} x {args.tokens}",
        "dtype": "bfloat16", "settings": "LoRA on all linear layers", "variant": "float32 attention",
    }  # fmt: skip
    results.add([{**common, "metric": metric, **figure} for metric, figure in figures.items()], args.csv)
    print(f"{common['shape']} ({common['hardware']})")
    for metric, figure in figures.items():
        print(f"  {metric:<20} {figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})")


if __name__ == "__main__":
    main()
