"""Time of a training step: ALTER beside plain PEFT LoRA of equal rank and targets, on the same batch, in one run.

    python benchmarks/step.py --threads 2

The two alternate step by step, so that whatever else the machine does hits both. Prints the medians and their ratio, and
adds a row to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from alter import AlterConfig, frozen
from alter.data import Encoded
from alter.objectives import CrossEntropy, InvertedHinge
from alter.trainer import PairCollator, Unlearn, UnlearnTrainer

RESULTS = Path(__file__).parent / "results.csv"


def base(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=11 * args.hidden // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=max(args.hidden // 64, 1),
            tie_word_embeddings=True,
        )
    ).to(args.device, getattr(torch, args.dtype))


def batch_of(args: argparse.Namespace) -> list[dict[str, dict]]:
    """Pairs of rows as the trainer sees them, half of each row labelled; gates as a perfect router gives them."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(args.rows // 2):
        pair = []
        for expert in (1 + i % args.experts, 0):
            ids = torch.randint(3, args.vocab, (args.length,), generator=generator).tolist()
            half = args.length // 2
            gates = torch.zeros(args.length, args.experts + 1)
            gates[:, expert] = 1.0
            entropy = torch.rand(args.length, generator=generator) * 2
            row = frozen.Row(entropy, gates=gates)
            pair.append({"encoded": Encoded(ids, [-100] * half + ids[half:], half), "row": row, "expert": expert})
        pairs.append({"forget": pair[0], "retain": pair[1]})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 2048), ("rows", 32), ("length", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pairs = batch_of(args)
    batch = {name: value.to(args.device) for name, value in PairCollator(0)(pairs).items()}
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    lora = get_peft_model(base(args), LoraConfig(r=args.rank, lora_alpha=16, target_modules=targets))
    alter = get_peft_model(
        base(args),
        AlterConfig(r=args.rank, alter_alpha=16, target_modules=targets, num_forget_experts=args.experts),
    )
    alter.base_model.router_host[1].alter_router["default"].requires_grad_(False)
    run = Unlearn(model="", forget="", retain="", out="", objective=InvertedHinge(), retain_objective=CrossEntropy())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, report_to=[], use_cpu=args.device == "cpu", max_steps=1)
        trainer = UnlearnTrainer(run, 1.2, args.experts + 1, model=alter, args=arguments)
    trainer.state.max_steps = 1
    optimizers = {
        "lora": torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-4),
        "alter": torch.optim.AdamW([p for p in alter.parameters() if p.requires_grad], lr=1e-4),
    }
    losses = {"lora": lambda: lora(**plain).loss, "alter": lambda: trainer.compute_loss(alter, batch)}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for step in range(args.steps + 3):
        for name, loss in losses.items():
            started = time.perf_counter()
            loss().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if step >= 3:
                times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["alter"] / median["lora"]
    hardware = (
        torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()}, {args.threads} threads"
    )
    print(f"lora {median['lora'] * 1e3:.1f} ms, alter {median['alter'] * 1e3:.1f} ms, ratio {ratio:.3f} ({hardware})")
    row = {
        "benchmark": "step", "hardware": hardware, "torch": torch.__version__, "dtype": args.dtype,
        "hidden": args.hidden, "layers": args.layers, "vocab": args.vocab, "rows": args.rows, "length": args.length,
        "rank": args.rank, "experts": args.experts, "lora_ms": round(median["lora"] * 1e3, 2),
        "alter_ms": round(median["alter"] * 1e3, 2), "ratio": round(ratio, 3),
    }  # fmt: skip
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
