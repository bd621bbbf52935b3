"""Time of decoding and of the prompt pass: ALTER beside an unmerged PEFT LoRA of equal rank and targets, and the base.

    python benchmarks/decode.py --threads 1
    python benchmarks/decode.py --threads 1 --hidden 1024 --layers 8 --vocab 8192

Random weights of Llama's shape, shared by all variants. The variants take turns step by step, so that whatever else the
machine does hits all of them, and what is reported are medians of ratios within one turn. With one thread of a CPU the time
is that of the process, not the wall's: it does not count what others run in between. A share of the tokens
(`--high`) has high entropy and fuses several experts, as in training. Adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import results
from alter import AlterConfig
from alter.adapter.generation import DecodeState

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of random weights, made where it will run."""
    torch.manual_seed(0)
    heads = args.heads or max(args.hidden // 64, 1)
    with torch.device(args.device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=args.vocab,
                hidden_size=args.hidden,
                intermediate_size=args.intermediate or 11 * args.hidden // 4,
                num_hidden_layers=args.layers,
                num_attention_heads=heads,
                num_key_value_heads=args.kv_heads or heads,
                max_position_embeddings=args.length + args.new,
                dtype=args.dtype,
            )
        )
    return model.to(getattr(torch, args.dtype))


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares its weights with the model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def variants(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models by name: base, lora, and alter-N with N forget experts; lora on the same blocks as those."""
    bare = base(args).requires_grad_(False).eval()
    models: dict[str, nn.Module] = {"base": bare}
    first = 0 if args.from_layer is None else int(args.from_layer * args.layers)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights=False,
        layers_to_transform=list(range(first, args.layers)),
    )
    models["lora"] = get_peft_model(twin(bare), lora).eval()
    ids = torch.randint(3, args.vocab, (4, 64), device=args.device)
    for experts in args.experts:
        config = AlterConfig(
            r=args.rank,
            alter_alpha=16,
            target_modules=TARGETS,
            num_forget_experts=experts,
            init_weights=False,
            from_layer=args.from_layer,
        )
        model = get_peft_model(twin(bare), config).eval()
        entropy = model.base_model.trace(ids).entropy
        model.peft_config["default"].entropy_threshold = float(
            entropy[entropy.isfinite()].float().quantile(1 - args.high)
        )
        if model.peft_config["default"].probed:
            # of random weights, but as often above the threshold as the entropy
            layer = model.base_model.router_host[1]
            probe = layer.alter_probe["default"]
            probe.weight.data.normal_()
            said = probe(model.base_model.trace(ids).features)[:, 1:]
            probe.bias.data -= said.quantile(1 - args.high)
        models[f"alter-{experts}"] = model
    return models


class Clock:
    """Times the same work by several models in turn."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.now = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        self.turns: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; its time goes to `name`."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        started = self.now()
        result = work()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.turns.setdefault(name, []).append(self.now() - started)
        return result


@torch.inference_mode()
def measure(models: dict[str, nn.Module], batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of each model: prompt pass and decoding of `batch` rows, each with its ratio to the LoRA's."""
    generator = torch.Generator().manual_seed(batch)
    prompt, decode = (Clock(args.device, args.threads) for _ in range(2))
    touched: dict[str, list[float]] = {}
    opened: dict[str, list[float]] = {}
    for turn in range(args.prompts + 1):
        ids = torch.randint(3, args.vocab, (batch, args.length), generator=generator).to(args.device)
        if turn == 0:
            # not timed
            for model in models.values():
                model(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            continue
        caches, tokens = {}, {}
        for name, model in models.items():
            caches[name] = DynamicCache(config=model.config)
            inputs = {"input_ids": ids, "past_key_values": caches[name], "logits_to_keep": 1}
            out = prompt.time(name, lambda model=model, inputs=inputs: model(**inputs))
            tokens[name] = out.logits[:, -1:].argmax(-1)
        for _ in range(args.new):
            for name, model in models.items():
                state = DecodeState.of(caches[name])
                # a pass that routes its own tokens knows no gates before
                if state is not None and "default" in state.gates:
                    gates = state.gates["default"] != 0
                    touched.setdefault(name, []).append(float(gates.sum(-1).float().mean()))
                    opened.setdefault(name, []).append(float(gates.any(0).sum()))
                inputs = {"input_ids": tokens[name], "past_key_values": caches[name]}

                def step(model: nn.Module = model, inputs: dict[str, Tensor] = inputs) -> Tensor:
                    return model(**inputs).logits[:, -1:].argmax(-1)

                tokens[name] = decode.time(name, step)
    found: list[dict[str, Any]] = []
    for name in models:
        decoding, reading = decode.turns[name], prompt.turns[name]
        figures: dict[str, dict[str, float]] = {
            "decode_ms": results.spread([1e3 * t for t in decoding]),
            "tokens_per_s": results.spread([batch / t for t in decoding]),
            "prompt_ms": results.spread([1e3 * t for t in reading]),
        }
        if name != "lora":
            figures["decode_speed_over_lora"] = results.ratios(decode.turns["lora"], decoding)
            figures["prompt_time_over_lora"] = results.ratios(reading, prompt.turns["lora"])
        if name in touched:
            figures["experts_per_token"] = {"value": statistics.mean(touched[name])}
            figures["experts_per_step"] = {"value": statistics.mean(opened[name])}
        print(
            f"batch {batch}  {name:>9}  " + "  ".join(f"{metric} {f['value']:.4g}" for metric, f in figures.items()),
            flush=True,
        )
        found += [{"variant": name, "metric": metric, **figure} for metric, figure in figures.items()]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 2048), ("length", 128), ("new", 64), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--intermediate", type=int, help="default: 11/4 of the hidden size")
    parser.add_argument("--heads", type=int, help="default: hidden size / 64")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--prompts", type=int, default=5, help="prompts of each batch size, each followed by --new tokens"
    )
    parser.add_argument("--high", type=float, default=0.3, help="share of tokens of high entropy")
    parser.add_argument(
        "--from-layer", type=float, help="share of the depth from which on blocks have experts, and the LoRA"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    hardware = results.hardware(args.device)
    print(hardware)
    models = variants(args)
    settings = (
        f"layers {args.layers}, vocab {args.vocab}, prompt {args.length}, rank {args.rank}, "
        f"high-entropy share {args.high}"
        + ("" if args.from_layer is None else f", experts from {args.from_layer:g} of the depth")
    )
    for batch in args.batches:
        common = {
            "benchmark": "decode", "hardware": hardware, "torch": torch.__version__,
            "shape": f"hidden {args.hidden}, batch {batch}", "dtype": args.dtype, "settings": settings,
        }  # fmt: skip
        results.add([{**common, **row} for row in measure(models, batch, args)], args.csv)


if __name__ == "__main__":
    main()
