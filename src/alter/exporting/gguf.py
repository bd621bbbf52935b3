"""A model as one GGUF file, as llama.cpp and Ollama read it: weights, settings, vocabulary and chat template.

The file's names and quantisers are those of the package `gguf`. It quantises to 8 bits (Q8_0) and to 4 or 5 (Q4_0, Q4_1,
Q5_0, Q5_1); the K-quants (Q4_K_M) are made of the F16 file by llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alter.core import UserError, progress
from alter.exporting.rounding import Rounded
from alter.exporting.vocabulary import Vocabulary, vocabulary
from alter.storage import check_disk, replacing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's view of a model of one `model_type`.

    Attributes:
        name: its own name of the architecture.
        turned: rows of the query and key projections are interleaved, as its rotary embedding wants them.
        one_more: norms are written with 1 added, which this model adds when it runs.
    """

    name: str
    turned: bool = False
    one_more: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", turned=True),
    "mistral": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", one_more=True),
    "gemma3_text": Architecture("gemma3", one_more=True),
}
"""By transformers' `model_type`: what was tried in a llama.cpp."""


def architecture(config: Any) -> Architecture:
    """Return llama.cpp's architecture for a model, from its configuration.

    Raises:
        UserError: the package gguf is missing, it is an architecture that no GGUF is written of, or a setting of it has no
            place in the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("Writing GGUF files needs the package gguf: pip install 'alter-unlearning[gguf]'")
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"A model of architecture {kind!r} cannot be written as GGUF; expected one of {', '.join(ARCHITECTURES)}. Serve the "
            "folder of safetensors with vLLM or transformers, or convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    found = ARCHITECTURES[kind]
    ropes = _ropes(config)
    known = ("default", "llama3") if found.name == "llama" else ("default",)
    for layer, rope in ropes.items():
        if rope.get("rope_type", "default") not in known:
            raise UserError(
                f"The model's rotary embedding is of kind {rope['rope_type']!r}, which is not written as GGUF (known: "
                f"{', '.join(known)}): convert it with llama.cpp's convert_hf_to_gguf.py."
            )
        if layer == "sliding_attention" and rope["rope_theta"] != 10000:
            raise UserError(f"llama.cpp takes a local rotary base of 10000, this model has {rope['rope_theta']}.")
    window = getattr(config, "sliding_window", None)
    if found.name in ("llama", "qwen2", "qwen3") and window and getattr(config, "use_sliding_window", True):
        raise UserError(f"llama.cpp knows no sliding window ({window}) for {found.name}: set sliding_window to null.")
    if found.one_more:
        _check_scores(config, found)
        every = 6 if found.name == "gemma3" else 2
        wanted = [
            "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != wanted:
            raise UserError(
                f"llama.cpp takes every {every}th layer of {found.name} for a full one; this model's are others."
            )
    return found


def _check_scores(config: Any, kind: Architecture) -> None:
    """Refuse a Gemma whose attention is scaled, or whose numbers are capped, otherwise than llama.cpp does it.

    Raises:
        UserError: it is.
    """
    # what llama.cpp takes for 27B, by the number of blocks alone
    large = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[kind.name]
    scale = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise UserError(
            f"llama.cpp takes a query_pre_attn_scalar of {scale} for this {kind.name}; this model has "
            f"{config.query_pre_attn_scalar}: serve the folder of safetensors with vLLM or transformers."
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name)
        if (value is None) != (kind.name == "gemma3"):
            raise UserError(
                f"llama.cpp {'caps' if value is None else 'does not cap'} the numbers of a {kind.name}, and this model's "
                f"{name} is {value}: serve the folder of safetensors with vLLM or transformers."
            )


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Return the rotary embedding's settings by kind of layer; `full_attention` alone where all are alike."""
    found = dict(config.rope_parameters)
    return found if "full_attention" in found else {"full_attention": found}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of a query or key projection [heads * d, ...] for llama.cpp's rotary embedding.

    transformers rotates the halves of a head, i with i + d / 2; llama.cpp neighbours, 2 i with 2 i + 1.
    """
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def rope_factors(config: Any) -> Tensor:
    """Return the slow-down of each of the d / 2 frequencies, [d / 2], under Llama 3.1's context stretching (`rope_type` llama3).

    Wavelengths up to context / high_freq_factor stay, those from context / low_freq_factor on are `factor` times as long,
    and between them 1 / f goes from one to the other in a line.
    """
    rope = _ropes(config)["full_attention"]
    size = config.head_dim
    base, factor = rope["rope_theta"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    found = []
    for i in range(size // 2):
        wave = 2 * math.pi * base ** (2 * i / size)
        smooth = min(max((context / wave - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)


def tensors(
    model: Any, kind: Architecture, grids: Mapping[str, Rounded]
) -> Iterator[tuple[str, str, Callable[[], Tensor], Rounded | None]]:
    """Yield name in the file and in the model, value (made when called) and, of a matrix that was rounded already, its codes.

    Raises:
        UserError: a tensor has no name there.
    """
    import gguf

    config = model.config.get_text_config()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if kind.name == "llama" and _ropes(config)["full_attention"].get("rope_type") == "llama3":
        yield "rope_freqs.weight", "", lambda: rope_factors(config), None
    for own, value in model.state_dict().items():
        if tied and own.startswith("lm_head."):
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"The model's tensor {own} has no place in a GGUF file of architecture {kind.name}.")
        heads = 0
        if kind.turned and (".q_proj." in own or ".k_proj." in own):
            heads = config.num_attention_heads if ".q_proj." in own else config.num_key_value_heads

        def made(value: Tensor = value, heads: int = heads, norm: bool = own.endswith("norm.weight")) -> Tensor:
            value = value.detach().float().cpu()
            if heads:
                return turned(value, heads)
            return value + 1 if norm and kind.one_more else value

        grid = grids.get(own)
        if grid is not None and heads:
            grid = grid.rows(turned(torch.arange(len(value)), heads))
        yield name, own, made, grid


def number_type(name: str, shape: tuple[int, ...], wanted: str, fine: bool = False) -> str:
    """Return the format of one tensor: vectors in f32, rows that do not divide into blocks in f16.

    Embeddings and head, of which small models consist to a good part, keep 8 bits where the rest has 4 or 5; so does a `fine` one.
    """
    if len(shape) < 2:
        return "f32"
    if wanted[0] != "q":
        return wanted
    if shape[-1] % 32:
        return "f16"
    return "q8_0" if fine or name in ("token_embd.weight", "output.weight") else wanted


def size_of(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor in a format."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return math.prod(shape) // block * size


def _describe(writer: Any, model: Any, kind: Architecture, words: Vocabulary, wanted: str, title: str) -> None:
    """Write the settings and the vocabulary."""
    import gguf

    config = model.config.get_text_config()
    ropes = _ropes(config)
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[("ALL_F32" if wanted == "f32" else f"MOSTLY_{wanted.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    if kind.one_more:
        writer.add_sliding_window(config.sliding_window)
    if kind.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_space_prefix(words.spaced)
    if words.template is not None:
        writer.add_chat_template(words.template)


def write_gguf(
    model: Any,
    tokenizer: Any,
    out: Path,
    wanted: str,
    title: str,
    rounding: Callable[[], dict[str, Rounded]] = dict,
    fine: Container[str] = (),
) -> dict[str, Any]:
    """Write a model as a GGUF file, whole or not at all, one tensor after the other.

    Args:
        model, tokenizer: plain, no adapter on it.
        out: the file.
        wanted: a format of the command's `type`; see `number_type` for what is kept in another.
        title: what the file calls the model.
        rounding: called after all checks; rounds matrices to `wanted` (`alter.exporting.rounding`) and returns them by the
            names of the state dict. All others go to the nearest step.
        fine: names of matrices that keep 8 bits where the rest has 4 or 5.

    Returns:
        `bytes`, and `tensors`, how many were written in each format.

    Raises:
        UserError: architecture, tokenizer or a tensor that llama.cpp has no name for, too little disk, or a weight too
            large for 16-bit floats. Nothing is written then.
    """
    kind = architecture(model.config.get_text_config())
    words = vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    found = _laid_out(model, kind, wanted, {}, fine)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.size for tensor in found) + (1 << 24)
    check_disk(out.parent, needed, "the file takes", "choose a smaller `type`, or give an `out` on another disk")
    if grids := rounding():
        found = _laid_out(model, kind, wanted, grids, fine)
    with replacing(out, name=f".{out.name}.partial") as partial:
        _write(partial, found, lambda writer: _describe(writer, model, kind, words, wanted, title), kind)
    return {
        "bytes": out.stat().st_size,
        "tensors": dict(Counter(tensor.form for tensor in found)),
        "split": words.split,
        "template": words.template is not None,
    }


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the file holds it: what computes its numbers, its shape, its number format, and its codes where it has some."""

    name: str
    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    form: str
    grid: Rounded | None = None

    @property
    def size(self) -> int:
        return size_of(self.shape, self.form)


def _laid_out(
    model: Any, kind: Architecture, wanted: str, grids: Mapping[str, Rounded], fine: Container[str]
) -> list[_Tensor]:
    """Lay out every tensor of the file, computing each once to check that its format can hold it.

    Raises:
        UserError: a weight too large for 16-bit floats.
    """
    found = []
    for name, own, make, grid in tensors(model, kind, grids):
        value = make()
        form = number_type(name, tuple(value.shape), wanted, own in fine)
        largest = float(value.abs().max())
        if form == "f16" and largest > 65504:
            raise UserError(f"{name} holds {largest:g}, more than 16-bit floats can: choose `type` bf16 or f32.")
        found.append(_Tensor(name, make, tuple(value.shape), form, grid if form == wanted else None))
    return found


def _write(path: Path, found: list[_Tensor], describe: Callable[[Any], None], kind: Architecture) -> None:
    """Write header, settings and tensors, one tensor in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(str(path), kind.name)
    describe(writer)
    for tensor in found:
        form = gguf.GGMLQuantizationType[tensor.form.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in progress(found, total=len(found), label="writing"):
        form = gguf.GGMLQuantizationType[tensor.form.upper()]
        packed = gguf.quantize(tensor.make().numpy(), form) if tensor.grid is None else tensor.grid.packed()
        writer.write_tensor_data(packed)
    writer.close()
