"""Peak memory and time of head and loss, forward and backward: chunk by chunk, as training does it, beside all at once.

    python benchmarks/loss.py --vocab 128256 --tokens 1024

All at once means fp32 logits of every labelled token over the whole vocabulary and autograd, as people do it. Memory is measured
in a process for each, the peak above what the model and its inputs take: resident memory on a CPU, allocated memory on a
GPU. Time is measured in one process, where the two alternate, so that whatever else the machine does hits
both. Prints the two beside each other, with their ratios and the largest difference of the gradients, and adds to
benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import results
from alter.logits.head import Head, Part
from alter.methods.objectives import CrossEntropy, Emitted, InvertedHinge, Reference
from alter.methods.objectives.retain import KeepBase

OBJECTIVES = {"cross_entropy": CrossEntropy(), "inverted_hinge": InvertedHinge(), "keep_base": KeepBase()}


def straightforward(name: str, logits: Tensor, labels: Tensor, reference: Reference) -> Tensor:
    """The objective's mean of fp32 logits [n, V] by the functions that torch has."""
    if name == "cross_entropy":
        return torch.nn.functional.cross_entropy(logits, labels)
    if name == "inverted_hinge":
        p = logits.softmax(-1)
        at = labels[:, None]
        return (1 + p.gather(-1, at)[:, 0] - p.scatter(-1, at, -1.0).max(-1).values).mean()
    logp = logits.log_softmax(-1)
    q = reference.logp.exp()
    tail = 1 - q.sum(-1)
    rest = logp.scatter(-1, reference.ids, -torch.inf).logsumexp(-1)
    return ((q * (reference.logp - logp.gather(-1, reference.ids))).sum(-1) + tail * (tail.log() - rest)).mean()


def resident(field: str) -> int:
    """Bytes of this process's resident memory: now (VmRSS), or the most since `forget_peak` (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def forget_peak(device: str) -> int:
    """Start measuring the peak anew; returns the bytes in use."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(args: argparse.Namespace) -> None:
    """What `only` names, in this process: one variant's peak and its gradients in a file, or the times of both."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=args.hidden // 64,
        tie_word_embeddings=False,
        initializer_range=args.hidden**-0.5,
    )
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(args.train_head)
    # such as a model gives: normalised states
    states = torch.randn(args.tokens, args.hidden).to(args.device, getattr(torch, args.dtype)).requires_grad_()
    labels = torch.randint(args.vocab, (args.tokens,)).to(args.device)
    reference = Reference(
        torch.stack([torch.randperm(min(args.vocab, 4096))[:64] for _ in range(args.tokens)]).to(args.device),
        torch.log_softmax(torch.randn(args.tokens, 64), -1).to(args.device) - 0.1,
    )
    objective = OBJECTIVES[args.objective]
    head = Head(model)
    with head.reading():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=args.device))

    def of(logits: Tensor, at: slice) -> Tensor:
        compared = reference.at(at) if objective.needs.views else None
        return objective.per_token(Emitted(logits, labels[at], compared, objective.needs.runner_up))[:, None]

    def step(variant: str) -> Tensor:
        states.grad = model.lm_head.weight.grad = None
        if variant == "whole":
            loss = straightforward(args.objective, model.lm_head(states).float(), labels, reference)
        else:
            loss = head.in_chunks(states, [Part(args.tokens, of)]).mean()
        loss.backward()
        if args.device != "cpu":
            torch.cuda.synchronize()
        return loss

    if args.only == "time":
        times: dict[str, list[float]] = {"whole": [], "chunked": []}
        for number in range(args.steps + 1):
            for variant, values in times.items():
                started = time.perf_counter()
                step(variant)
                # the first step of each warms up
                if number:
                    values.append(time.perf_counter() - started)
        print(json.dumps(times))
        return
    baseline = forget_peak(args.device)
    loss = step(args.only)
    peak = resident("VmHWM") if args.device == "cpu" else torch.cuda.max_memory_allocated()
    gradients = [states.grad, *([model.lm_head.weight.grad[:4096]] if args.train_head else [])]
    torch.save([g.detach().float().cpu().clone() for g in gradients], args.gradients)
    print(json.dumps({"loss": loss.item(), "peak": peak - baseline}))


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("vocab", 128256), ("tokens", 1024), ("hidden", 256), ("steps", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--objective", choices=OBJECTIVES, default="inverted_hinge")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train-head", action="store_true", help="the head's weights get gradients too")
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    parser.add_argument("--only", choices=("whole", "chunked", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    if args.only:
        measure(args)
        return
    found, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for only in ("whole", "chunked", *(["time"] if args.steps else [])):
            file = f"{folder}/{only}"
            command = [sys.executable, __file__, *argv, "--only", only, "--gradients", file]
            found[only] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if only != "time":
                gradients[only] = torch.load(file)
    difference = max(
        float((a - b).norm() / a.norm()) for a, b in zip(gradients["whole"], gradients["chunked"], strict=True)
    )
    whole, chunked = found["whole"], found["chunked"]
    figures: dict[str, dict[str, Any]] = {
        "whole_mib": {"value": whole["peak"] / 2**20},
        "chunked_mib": {"value": chunked["peak"] / 2**20},
        "memory_over_whole": {"value": chunked["peak"] / whole["peak"]},
        "gradient_difference": {"value": difference},
    }
    if args.steps:
        seconds = found["time"]
        figures |= {f"{name}_ms": results.spread([1e3 * t for t in taken]) for name, taken in seconds.items()}
        figures["time_over_whole"] = results.ratios(seconds["chunked"], seconds["whole"])
    common = {
        "benchmark": "loss", "hardware": results.hardware(args.device), "torch": torch.__version__,
        "shape": f"vocab {args.vocab}, {args.tokens} tokens", "dtype": args.dtype,
        "settings": f"hidden {args.hidden}" + (", trained head" if args.train_head else ""), "variant": args.objective,
    }  # fmt: skip
    results.add([{**common, "metric": metric, **figure} for metric, figure in figures.items()], args.csv)
    print(f"{args.objective}, {common['shape']}, {args.dtype}, {common['settings']} ({common['hardware']})")
    print(f"  loss: whole {whole['loss']:.7f}, chunked {chunked['loss']:.7f}")
    for metric, figure in figures.items():
        print(f"  {metric:<20} {figure['value']:.4g}")


if __name__ == "__main__":
    main()
