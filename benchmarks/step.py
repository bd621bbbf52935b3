"""Training: step time, tokens a second, peak memory and time of a whole run, of ALTER and of what people do instead.

    python benchmarks/step.py                                            # tiny shape on the CPU
    python benchmarks/step.py --shape 8b --device cuda --dtype bfloat16
    python benchmarks/step.py growth                                     # cost against experts and against forget rows

All variants see the same rows in one process, and take turns step by step, so that whatever else the machine does hits
all of them; ratios are medians of ratios within a round. With one thread on the CPU the time is CPU time. A step is
everything between two batches: collating the rows, forward, loss, backward, clipping to norm 1, AdamW. Weights are random
and tokens too (each sub-domain draws its own), the second half of each row is labelled. Peak memory is measured in a
fresh process for each variant, weights included. The variants:

* lora: PEFT's LoRA on all linear layers of the frozen base, `model(**batch).loss` on the forget and retain rows.
* lora_same_loss: the same adapter through `UnlearnTrainer`, with ALTER's forget and retain objectives.
* asym_lora: HydraLoRA, one A, N + 1 matrices B, a router in every layer, through `UnlearnTrainer` with the same
  objectives.
* alter: ALTER with N forget experts and the retention expert, so as many matrices B, through `UnlearnTrainer`: objectives,
  gradient isolation, gates and entropies as `trace_run` gives them.
* alter_experts: the same with `experts_only`, as requests over time are trained: the forget rows alone.
* npo_full: NPO with a retain term as people run it: all weights, gradients and AdamW's state in float32, a second frozen
  copy of the model that runs at every step, float32 logits of the whole vocabulary at all positions, and a forward of
  its own for the forget and for the retain rows. With --dtype bfloat16 there is also npo_full_mixed, the same under
  autocast; npo_full then stays in float32.

With --from-layer ALTER's experts are in the blocks from that one on, and steps begin with the states that the frozen pass has
kept of the blocks below; three variants more:

* alter_plain: the same, but every step runs all blocks (trunk_gib 0).
* lora_upper: lora on ALTER's blocks alone; lora_upper_kept: with the same loss and the states below kept, as ALTER's.

With --dtype bfloat16 the LoRA variants have a bfloat16 base and float32 adapters, under autocast.

`useful` is the share of the machine's matmul rate (float operations a second of a large matmul in the same dtype, taken
in the same rounds) that the 4 P T operations of training with a frozen base amount to: forward and backward through the
blocks' weights for all tokens, through the head for the labelled ones; attention scores are left out.

A whole run is `--epochs` passes over `--dataset` forget rows and as many retain rows. ALTER's one-off part (entropies,
router, gates) is measured and counted; loading a model is not, on either side.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.utils import logging

import results
from alter.data.batching import Collator
from alter.data.encoding import Encoded
from alter.methods.adapters import Beginning
from alter.training.batches import PairCollator, Pairs, RunRows
from alter.training.frozenpass import trace_run
from alter.training.loss import UnlearnTrainer
from alter.training.settings import Unlearn

SHAPES: dict[str, dict[str, Any]] = {
    "pico": dict(hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, vocab=300, tied=True, rows=8, length=16),
    "tiny": dict(hidden=256, intermediate=704, layers=4, heads=4, kv_heads=4, vocab=2048, tied=True, rows=32, length=96),
    "small": dict(hidden=768, intermediate=2048, layers=8, heads=12, kv_heads=12, vocab=32000, tied=True, rows=4, length=64),
    "1b": dict(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True, rows=4, length=512),
    "8b": dict(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256, tied=False, rows=4, length=512),
}  # fmt: skip
"""Sizes; `rows` of a step are half forget, half retain rows. 1b and 8b are Llama 3's."""

DATASHEET = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bfloat16 operations a second that the vendor states."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROWTH_EXPERTS, GROWTH_ROWS = (1, 4, 16, 64), (16, 32, 64, 128, 256)


@dataclass
class Variant:
    """One way to take a training step on the same rows."""

    loss: Callable[[], Tensor]
    model: Any
    optimizer: Any
    autocast: torch.dtype | None
    device: str
    # seconds before the first step, and rows of each kind that a step takes
    one_off: float = 0.0
    kinds: tuple[str, ...] = ("forget", "retain")

    def step(self) -> float:
        """Take one step; return its loss."""
        inside = (
            nullcontext() if self.autocast is None else torch.autocast(torch.device(self.device).type, self.autocast)
        )
        with inside:
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


# Models and rows -----------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(2048, args.length),
        tie_word_embeddings=args.tied,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(args.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def sharing(base: Any) -> Any:
    """A second model with the same weights in memory, for another adapter."""
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def make_rows(args: argparse.Namespace, count: int, experts: int, only: int | None = None) -> RunRows:
    """`count` forget and retain rows; forget row i belongs to sub-domain i mod `experts`, or all to `only`.

    Each sub-domain has its own slice of the vocabulary's upper half, so that the router can learn to tell them apart.
    """
    generator = torch.Generator().manual_seed(0)
    low = args.vocab // 2
    width = (args.vocab - low) // experts

    def row(start: int, end: int) -> Encoded:
        ids = torch.randint(start, end, (args.length,), generator=generator).tolist()
        half = args.length // 2
        return Encoded(ids, [-100] * half + ids[half:], half)

    of = [i % experts if only is None else only for i in range(count)]
    forget = [row(low + d * width, low + (d + 1) * width) for d in of]
    return RunRows(forget, [row(3, low) for _ in of], [1 + d for d in of])


def settings_of(args: argparse.Namespace, kind: str, upper: bool = False, **options: Any) -> Unlearn:
    """ALTER's objectives on an adapter of this kind."""
    # random weights and no tokenizer: nothing to read ordinary text with
    fit = {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None}
    options["router_fit"] = {**fit, **options.get("router_fit", {})}
    adapter: dict[str, Any] = {"kind": kind, "r": args.rank, "target_modules": TARGETS}
    objective = {"kind": "inverted_hinge", "only_low": kind == "alter"}
    if kind == "alter":
        # random models are unsure of everything: the threshold is set so that both kinds of token occur
        adapter["entropy_quantile"] = args.low
        if args.from_layer is not None:
            adapter["from_layer"] = first_of(args)
    if kind == "asym_lora":
        adapter["experts"] = args.experts + 1
    if upper:
        adapter["depth"] = (first_of(args) / args.layers, 1.0)
    return Unlearn(model="", forget="", retain="", out="", adapter=adapter, objective=objective, **options)


# Variants ------------------------------------------------------------------------------------------------------------


def plain_batch(rows: Sequence[Encoded], device: str) -> dict[str, Tensor]:
    batch = Collator(0, multiple_of=16)([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    return {name: value.to(device) for name, value in batch.items()}


def first_of(args: argparse.Namespace) -> int:
    """The first block with experts."""
    given = args.from_layer or 0
    return int(given) if given >= 1 else int(given * args.layers)


def plain_lora(
    args: argparse.Namespace, base: Any, rows: RunRows, autocast: torch.dtype | None, upper: bool = False
) -> Variant:
    blocks = list(range(first_of(args) if upper else 0, args.layers))
    lora = LoraConfig(r=args.rank, lora_alpha=16, target_modules=TARGETS, layers_to_transform=blocks)
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    chosen = rows.forget[: args.rows // 2] + rows.retain[: args.rows // 2]
    return Variant(lambda: model(**plain_batch(chosen, args.device)).loss, model, optimizer, autocast, args.device)


def through_trainer(
    args: argparse.Namespace,
    model: Any,
    run: Unlearn,
    rows: RunRows,
    autocast: torch.dtype | None,
    folder: Path,
    experts: int = 0,
    steps_on: slice | None = None,
) -> Variant:
    """A step of `UnlearnTrainer` with an adapter that is on the model already.

    The frozen base's pass and the router's fit are of all rows, and timed; steps are on the rows `steps_on`.
    """
    order = [(i, i) for i in range(len(rows.forget))]
    cache = Path(tempfile.mkdtemp(dir=folder)) / "frozen.safetensors"
    started = now(args)
    traced, found, below = trace_run(model, SimpleNamespace(pad_token_id=0), run, rows, order, cache)
    one_off = now(args) - started
    data = Pairs(order, rows, traced, trunk=None if below is None else below.of)
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=args.device == "cpu", max_steps=1)
    trainer = UnlearnTrainer(
        run,
        found.get("entropy_threshold", math.inf),
        experts,
        trunk=None if below is None else below.trunk,
        model=model,
        args=arguments,
    )
    trainer.state.max_steps = 1
    pairs = [data[i] for i in range(len(data))[steps_on or slice(args.rows // 2)]]
    collate = PairCollator(0)

    def loss() -> Tensor:
        return trainer.compute_loss(model, {"batch": collate(pairs)["batch"].to(args.device)})

    return Variant(
        loss, model, trainer.create_optimizer(), autocast, args.device, one_off, ("forget",) if run.experts_only else ("forget", "retain"),
    )  # fmt: skip


def npo_loss(logits: Tensor, reference: Tensor, labels: Tensor, beta: float = 0.1) -> Tensor:
    """NPO as it is commonly written, from all logits [B, T, V] of the policy and of the reference model."""
    nll = []
    for each in (logits, reference):
        shifted = each[:, :-1].float().contiguous()
        token = F.cross_entropy(shifted.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        nll.append(token.sum(-1))
    return -2 / beta * F.logsigmoid(beta * (nll[0] - nll[1])).mean()


def npo_full(args: argparse.Namespace, rows: RunRows, autocast: torch.dtype | None) -> Variant:
    model = build(args, torch.float32)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    half = args.rows // 2

    def loss() -> Tensor:
        forget, retain = plain_batch(rows.forget[:half], args.device), plain_batch(rows.retain[:half], args.device)
        labels = forget.pop("labels")
        logits = model(**forget).logits.float()
        with torch.no_grad():
            other = reference(**forget).logits.float()
        return npo_loss(logits, other, labels) + model(**retain).loss

    return Variant(loss, model, optimizer, autocast, args.device)


def make(name: str, args: argparse.Namespace, base: Callable[[], Any], rows: RunRows, folder: Path) -> Variant:
    """A variant by name; `base` gives the frozen base for one more adapter."""
    autocast = None if args.dtype == "float32" else getattr(torch, args.dtype)
    if name in ("lora", "lora_upper"):
        return plain_lora(args, base(), rows, autocast, upper=name == "lora_upper")
    if name.startswith("npo_full"):
        return npo_full(args, rows, autocast if name == "npo_full_mixed" else None)
    if name in ("lora_same_loss", "lora_upper_kept", "asym_lora"):
        upper = name == "lora_upper_kept"
        run = settings_of(args, "asym_lora" if name == "asym_lora" else "lora", upper, epochs=args.epochs)
        return through_trainer(args, run.adapter.attach(base(), run, Beginning()), run, rows, autocast, folder)
    run = settings_of(
        args, "alter", experts_only=name == "alter_experts", trunk_gib=0 if name == "alter_plain" else 64
    )
    model = run.adapter.attach(base(), run, Beginning([str(d) for d in range(args.experts)]))
    return through_trainer(args, model, run, rows, autocast, folder, args.experts + 1)


def variants_of(args: argparse.Namespace) -> list[str]:
    mixed = [] if args.dtype == "float32" else ["npo_full_mixed"]
    upper = [] if args.from_layer is None else ["lora_upper", "lora_upper_kept", "alter_plain"]
    return ["lora", *upper, "lora_same_loss", "asym_lora", "alter", "alter_experts", "npo_full", *mixed]


# Measuring -----------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def now(args: argparse.Namespace) -> float:
    """Seconds on the clock once all work is done: of one thread on the CPU its own time, else wall time."""
    synchronize(args.device)
    # other processes do not lengthen CPU time
    alone = args.device == "cpu" and args.threads == 1
    return time.process_time() if alone else time.perf_counter()


def matmul(args: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """Large matmuls in the run's dtype, and their operations; several, so that a short pause does not decide."""
    # a CPU without instructions for bfloat16 would take minutes for larger ones
    small = 1024 if args.dtype == "float32" else 256
    size = 8192 if args.device != "cpu" else small if args.shape != "pico" else 64
    a, b = (torch.randn(size, size, device=args.device, dtype=getattr(torch, args.dtype)) for _ in "ab")
    return lambda: [a @ b for _ in range(8)], 8 * 2 * size**3


def rounds(
    works: dict[str, Callable[[], Any]], count: int, args: argparse.Namespace, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn; every round starts with another one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(count + warm):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = now(args)
            works[name]()
            if number >= warm:
                times[name].append(now(args) - started)
    return times


def own_memory(field: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most since the mark was cleared (VmHWM); Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: peak memory on the CPU is measured on Linux only")


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Peak MiB of a few steps of one variant, its weights included, above the process with all libraries loaded."""
    cuda = args.device != "cpu"
    before = 0 if cuda else own_memory("VmRSS")
    rows = make_rows(args, args.rows // 2, args.experts)
    with tempfile.TemporaryDirectory() as folder:
        variant = make(name, args, lambda: build(args, getattr(torch, args.dtype)), rows, Path(folder))
        gc.collect()
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(3):
            variant.step()
        return (torch.cuda.max_memory_allocated(args.device) if cuda else own_memory("VmHWM") - before) / 2**20


def peak_memory_alone(name: str, args: argparse.Namespace, argv: Sequence[str]) -> float | None:
    """The same in a fresh process; None where the device's memory does not suffice."""
    # glibc would keep freed tensors below its threshold, and count what no step needs
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *argv, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parameters(args: argparse.Namespace) -> tuple[int, int]:
    """Weights of the blocks' linear layers, and of the head."""
    kv = args.hidden * args.kv_heads // args.heads
    block = 2 * args.hidden**2 + 2 * args.hidden * kv + 3 * args.hidden * args.intermediate
    return args.layers * block, args.vocab * args.hidden


def states_mib(args: argparse.Namespace) -> float:
    """What full fine-tuning with NPO keeps without any activation: weights, gradients, two moments, reference; MiB."""
    blocks, head = parameters(args)
    return 20 * (blocks + head * (1 if args.tied else 2)) / 2**20


def steps(args: argparse.Namespace, argv: Sequence[str]) -> list[dict[str, Any]]:
    """All variants beside each other."""
    names = [name for name in variants_of(args) if args.variants is None or name in args.variants]
    memory: dict[str, float | None] = {}
    if args.memory:
        memory = {name: peak_memory_alone(name, args, argv) for name in names}
    rows = make_rows(args, max(args.dataset, args.rows // 2), args.experts)
    fitting = [name for name in names if memory.get(name, 0.0) is not None]
    with tempfile.TemporaryDirectory() as folder:
        shared = build(args, getattr(torch, args.dtype))
        made = {name: make(name, args, lambda: sharing(shared), rows, Path(folder)) for name in fitting}
        reference_matmul, operations = matmul(args)
        works: dict[str, Callable[[], Any]] = {name: variant.step for name, variant in made.items()}
        times = rounds({**works, "matmul": reference_matmul}, args.steps, args)
    peak = [operations / taken for taken in times["matmul"]]
    stated = next((rate for name, rate in DATASHEET.items() if name in results.hardware(args.device)), None)
    blocks, head = parameters(args)
    found: list[dict[str, Any]] = [
        {"variant": "matmul", "metric": "tflops", **results.spread([rate / 1e12 for rate in peak])}
    ]

    def add(variant: str, metric: str, values: dict[str, Any]) -> None:
        found.append({"variant": variant, "metric": metric, **values})

    whole: dict[str, float] = {}
    for name in names:
        if name in made:
            variant, taken = made[name], times[name]
            count = args.rows // 2 * len(variant.kinds)
            tokens = count * args.length
            add(name, "step_ms", results.spread([1e3 * t for t in taken]))
            add(name, "tokens_per_s", results.spread([tokens / t for t in taken]))
            for other in ("lora", "lora_upper", "asym_lora", "npo_full", "npo_full_mixed"):
                if other in made and other != name:
                    add(name, f"time_over_{other}", results.ratios(taken, times[other]))
            if not name.startswith("npo_full") and args.from_layer is None:
                # a label's distribution is one position before it
                useful = 4 * (blocks * tokens + head * count * (args.length - args.length // 2))
                add(name, "useful", results.spread([useful / t / rate for t, rate in zip(taken, peak, strict=True)]))
                if stated and args.dtype == "bfloat16":
                    add(name, "useful_of_datasheet", results.spread([useful / t / stated for t in taken]))
            whole[name] = variant.one_off + statistics.median(taken) * args.epochs * args.dataset / (args.rows // 2)
            add(name, "whole_s", {"value": whole[name], "note": f"{variant.one_off:.1f} s before the first step"})
        if name in memory:
            mib = memory[name]
            if mib is None:
                add(
                    name,
                    "peak_mib",
                    {"value": "", "note": f"does not fit; needs more than {states_mib(args):.0f} MiB"},
                )
            else:
                add(name, "peak_mib", {"value": mib})
    for name in names:
        for other in ("npo_full", "npo_full_mixed"):
            if name.startswith("npo_full") or other not in names:
                continue
            if other in whole:
                add(name, f"whole_over_{other}", {"value": whole[name] / whole[other]})
            if memory.get(name) is not None:
                least = memory[other] is None
                bound = "of what its weights, gradients, moments and reference alone need" if least else ""
                add(name, f"memory_over_{other}", {"value": memory[name] / (memory[other] or states_mib(args)), "note": bound})  # fmt: skip
    return found


# Growth --------------------------------------------------------------------------------------------------------------


def grown(args: argparse.Namespace, base: Any, experts: int, folder: Path) -> Variant:
    """A step on one request whose expert is the last of `experts`, the others being earlier requests' and frozen."""
    half = args.rows // 2
    earlier, newest = make_rows(args, 2 * experts, experts), make_rows(args, half, experts, only=experts - 1)
    # a short fit: the router must know all experts, how well does not matter here
    run = settings_of(args, "alter", experts_only=True, router_fit={"steps": 200})
    model = run.adapter.attach(base, run, Beginning([str(d) for d in range(experts)]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".alter_B." in name:
                parameter.normal_(std=0.01)
    rows = RunRows(earlier.forget + newest.forget, earlier.retain + newest.retain, earlier.expert + newest.expert)
    autocast = None if args.dtype == "float32" else getattr(torch, args.dtype)
    steps_on = slice(2 * experts, None)
    return through_trainer(args, model, run, rows, autocast, folder, experts + 1, steps_on)


def whole_request(args: argparse.Namespace, base: Any, count: int, folder: Path) -> None:
    """One request of `count` forget rows from nothing: frozen pass, router, and one epoch of steps."""
    run = settings_of(args, "alter", experts_only=True)
    model = run.adapter.attach(base, run, Beginning(["0"]))
    autocast = None if args.dtype == "float32" else getattr(torch, args.dtype)
    variant = through_trainer(args, model, run, make_rows(args, count, 1), autocast, folder, 2)
    for _ in range(math.ceil(count / (args.rows // 2))):
        variant.step()


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Step time against the number of experts, and the time of a whole request against the number of its rows."""
    found: list[dict[str, Any]] = []
    base = build(args, getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {str(n): grown(args, sharing(base), n, folder) for n in args.growth_experts}
        works: dict[str, Callable[[], Any]] = {n: variant.step for n, variant in made.items()}
        times = rounds(works, args.steps, args)
        first = times[str(args.growth_experts[0])]
        for n, taken in times.items():
            found.append({"variant": n, "metric": "step_ms_by_experts", **results.spread([1e3 * t for t in taken])})
            found.append({"variant": n, "metric": "ratio_by_experts", **results.ratios(taken, first)})
        del made, works
        requests: dict[str, Callable[[], Any]] = {
            str(n): lambda n=n: whole_request(args, sharing(base), n, folder) for n in args.growth_rows
        }
        times = rounds(requests, max(args.steps // 8, 2), args, warm=1)
    for n, taken in times.items():
        found.append({"variant": n, "metric": "request_s_by_rows", **results.spread(taken)})
    x = np.array(args.growth_rows, dtype=float)
    y = np.array([statistics.median(taken) for taken in times.values()])
    slope, start = np.polyfit(x, y, 1)
    rest = ((y - start - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    found.append({"variant": "line", "metric": "seconds_per_row", "value": slope})
    found.append({"variant": "line", "metric": "seconds_at_zero_rows", "value": start})
    found.append({"variant": "line", "metric": "r_squared", "value": 1 - rest})
    return found


# Command -------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=("step", "growth"), default="step")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in every variant")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4, help="N, the forget experts")
    for name in ("hidden", "intermediate", "heads", "kv-heads", "layers", "rows", "length", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--from-layer", type=float, help="first block with experts, or a share of the depth below 1")
    parser.add_argument("--low", type=float, default=0.6, help="share of the retain rows' tokens of low entropy")
    parser.add_argument("--steps", type=int, default=24, help="rounds that are measured")
    parser.add_argument("--dataset", type=int, default=400, help="forget rows of a whole run, and as many retain rows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--growth-experts", type=int, nargs="+", default=GROWTH_EXPERTS)
    parser.add_argument("--growth-rows", type=int, nargs="+", default=GROWTH_ROWS)
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in SHAPES[args.shape].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    unknown = sorted(set(args.variants or []) - set(variants_of(args)))
    if unknown:
        parser.error(f"--variants {unknown[0]}: unknown; expected some of {', '.join(variants_of(args))}")
    for name in ("layers", "rows", "length", "vocab", "rank", "experts", "steps", "dataset", "epochs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.from_layer is not None and not 0 < first_of(args) < args.layers:
        parser.error(
            f"--from-layer {args.from_layer:g}: expected a block from 1 to {args.layers - 1}, or a share below 1"
        )
    if not 0 < args.low < 1:
        parser.error(f"--low {args.low:g}: expected a share between 0 and 1")
    if args.rows % 2:
        parser.error(f"--rows {args.rows}: expected an even number, half of them forget rows")
    if args.length < 4:
        parser.error(f"--length {args.length}: expected at least 4 tokens, half of them labelled")
    if min(args.growth_experts) < 1 or min(args.growth_rows) < 1 or len(set(args.growth_rows)) < 3:
        parser.error(
            "--growth-experts and --growth-rows: expected numbers from 1, and at least three of rows for a line"
        )
    most = max(args.growth_experts) if args.what == "growth" else args.experts
    if args.vocab < 4 * most or args.vocab < 8:
        parser.error(f"--vocab {args.vocab}: expected at least 4 tokens for each of {most} experts, and 8")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: expected cpu or cuda, or cuda:1 for the second GPU")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this machine has no GPU that torch {torch.__version__} can use")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    logging.set_verbosity_error()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    if args.memory_of:
        try:
            print(json.dumps(peak_memory(args.memory_of, args)))
        except torch.OutOfMemoryError:
            print(json.dumps(None))
        return
    found = steps(args, argv) if args.what == "step" else growth(args)
    settings = (
        f"hidden {args.hidden}, layers {args.layers}, vocab {args.vocab}, rows {args.rows} x {args.length}, "
        f"rank {args.rank}"
    )
    if args.what == "step":
        settings += f", experts {args.experts}, {args.epochs} epochs of {args.dataset} rows"
    if args.from_layer is not None:
        settings += f", experts from block {first_of(args)}"
    if args.low != 0.6:
        settings += f", low {args.low:g}"
    if args.checkpointing:
        settings += ", checkpointing"
    common = {
        "benchmark": args.what, "hardware": results.hardware(args.device), "torch": torch.__version__,
        "shape": args.shape, "dtype": args.dtype, "settings": settings,
    }  # fmt: skip
    results.add([{**common, **row} for row in found], args.csv)
    print(f"{common['hardware']}, torch {common['torch']}, {args.dtype}: {settings}")
    for row in found:
        value = row["value"] if row["value"] == "" else f"{row['value']:.4g}"
        between = f" [{row['low']:.4g}, {row['high']:.4g}]" if "low" in row else ""
        print(f"{row['variant']:>15}  {row['metric']:<26} {value}{between} {row.get('note', '')}".rstrip())


if __name__ == "__main__":
    main()
