"""Forget rows held in memory with a model held in memory: `python examples/forget_in_memory.py`, under a minute."""

import tempfile

import alter
from alter.data import read_rows

model, tokenizer = alter.load("builtin:tofu-mini/original", device="cpu")
author = read_rows("builtin:forget10")[:10]
kept = read_rows("builtin:retain90")[:40]

with tempfile.TemporaryDirectory() as folder:
    run = alter.unlearn(
        model,
        tokenizer=tokenizer,
        forget=author,
        retain=kept,
        num_forget_experts=1,
        objective={"kind": "without_truth", "hinge": 2.0},
        learning_rate_experts=7e-3,
        batch_size=10,
        max_steps=5,
        device="cpu",
        out=f"{folder}/run",
    )
    print(f"{run.record['steps']} steps; the adapter would be in {run.adapter}")
