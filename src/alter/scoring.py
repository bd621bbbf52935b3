"""The half of evaluation that touches a model: log-probabilities of labelled tokens, generations, loading.

One forward pass per row serves every likelihood metric of `alter.metrics`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from alter import records
from alter.assistant import is_assistant
from alter.assistant import load as load_assistant
from alter.data import Encoded, ensure_pad_token
from alter.errors import UserError, nearest

MAX_LOGITS = 2**28
"""Largest number of logits in one batch (1 GiB in fp32): with a large vocabulary it shrinks the batch."""
CHUNK_LOGITS = 2**23
"""Number of logits that are turned into fp32 at a time."""
SEGMENT = 16
"""Greedy decoding drops the rows that have ended after every so many tokens."""


@dataclass
class Scores:
    """Per labelled token, for a list of rows in the order given; every list is ragged: one 1-D array per row.

    Attributes:
        logprob: natural log of the probability of the label, float32.
        correct: whether the label is the likeliest token, bool.
        mean, var: mean and variance of log p under p at each position, float32; None unless asked for.
    """

    logprob: list[npt.NDArray[np.float32]]
    correct: list[npt.NDArray[np.bool_]]
    mean: list[npt.NDArray[np.float32]] | None = None
    var: list[npt.NDArray[np.float32]] | None = None

    def __getitem__(self, rows: slice) -> Scores:
        """Return the scores of a slice of the rows."""
        mean = None if self.mean is None else self.mean[rows]
        var = None if self.var is None else self.var[rows]
        return Scores(self.logprob[rows], self.correct[rows], mean, var)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and keep no graph inside the block; each module's training mode is given back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _inner(model: Any) -> Any:
    """Return the transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _text_config(model: nn.Module) -> Any:
    return _inner(model).config.get_text_config()


def _context_length(model: nn.Module) -> int | None:
    return getattr(_text_config(model), "max_position_embeddings", None)


def _shown(iterable: Iterable[Any], total: int, label: str, progress: bool) -> Iterable[Any]:
    return records.progress(iterable, total=total, label=label) if progress else iterable


# Scoring -------------------------------------------------------------------------------------------------------------


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Split row numbers into batches of at most `batch_tokens` padded tokens (or one row), longest rows first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _check(model: nn.Module, encoded: Sequence[Encoded]) -> None:
    context = _context_length(model)
    for i, row in enumerate(encoded):
        if len(row.labels) != len(row.input_ids):
            raise ValueError(f"row {i} has {len(row.input_ids)} tokens but {len(row.labels)} labels")
        if not any(label != -100 for label in row.labels[1:]):
            raise UserError(
                f"Row {i} has no labelled token to score (the first token has nothing before it and cannot be): "
                "its answer is empty or was cut off; remove the row or raise the maximum length."
            )
        if context is not None and len(row.input_ids) > context:
            raise UserError(
                f"Row {i} has {len(row.input_ids)} tokens, the model's context is {context}: "
                "shorten the row or evaluate a model with a longer context."
            )


def score(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_tokens: int | None = None,
    moments: bool = False,
    compat: bool = False,
    progress: bool = True,
    label: str = "scoring",
) -> Scores:
    """Return log-probability and correctness of every labelled token, with one forward pass per row.

    Rows are sorted by length and packed into batches. Only positions that
    predict a label are taken through the head (where the model supports it) and turned into fp32, in chunks. The model
    is called as usual, so adapters with hooks take part; it is in eval mode meanwhile, without gradients.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        encoded: rows; tokens with label -100 are context. A label at the first position is not scored.
        pad_token_id: fills rows up on the right; masked by length, so a pad id inside a row is attended to.
        batch_tokens: padded tokens in a batch; None: 16384, or 4096 on a CPU, whose caches larger ones overflow. A
            longer row is a batch of its own.
        moments: also compute mean and variance of log p under p (needed for min-k++).
        compat: as OpenUnlearning, hide every token equal to `pad_token_id` from attention, inside rows too.
        progress: show a progress bar on stderr.
        label: name on the progress bar.

    Raises:
        UserError: a row has nothing to score, is longer than the model's context, or gets NaN logits.
    """
    _check(model, encoded)
    device = _device(model)
    slices_logits = "logits_to_keep" in inspect.signature(_inner(model).forward).parameters
    lengths = [len(row.input_ids) for row in encoded]
    if batch_tokens is None:
        batch_tokens = 4096 if device.type == "cpu" else 16384
    tokens = max(1, min(batch_tokens, MAX_LOGITS // _text_config(model).vocab_size))
    out: list[list[npt.NDArray[Any]]] = [[np.empty(0)] * len(encoded) for _ in range(4)]
    batches = _batches(lengths, tokens)
    with evaluating(model):
        for batch in _shown(batches, len(batches), label, progress):
            width = lengths[batch[0]]
            ids = torch.full((len(batch), width), pad_token_id)
            labels = torch.full((len(batch), width), -100)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for k, i in enumerate(batch):
                ids[k, : lengths[i]] = torch.tensor(encoded[i].input_ids)
                labels[k, : lengths[i]] = torch.tensor(encoded[i].labels)
                mask[k, : lengths[i]] = 1
            if compat:
                mask = (ids != pad_token_id).long()
            predicts = labels[:, 1:] != -100
            positions = predicts.any(dim=0).nonzero()[:, 0]
            keep = {"logits_to_keep": positions.to(device)} if slices_logits else {}
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keep).logits
            if not slices_logits:
                logits = logits[:, positions.to(device)]
            rows, columns = predicts[:, positions].nonzero(as_tuple=True)
            targets = labels[:, 1:][:, positions][rows, columns]
            parts = _statistics(logits, rows.to(device), columns.to(device), targets.to(device), moments)
            counts = predicts.sum(dim=1).tolist()
            for values, part in zip(out, parts, strict=False):
                for i, piece in zip(batch, np.split(part, np.cumsum(counts)[:-1]), strict=True):
                    values[i] = piece
            for i in batch:
                if np.isnan(out[0][i]).any():
                    raise UserError(
                        f"Row {i}: the model's logits are NaN; its weights or its number format ({logits.dtype}) are "
                        "broken. Try --dtype float32, or an earlier checkpoint."
                    )
    return Scores(out[0], out[1], *(out[2:] if moments else (None, None)))


def _statistics(
    logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor, moments: bool
) -> list[npt.NDArray[Any]]:
    """Return log-probability, correctness (and mean and variance of log p) at the given places of [B, K, V] logits."""
    pieces: list[tuple[torch.Tensor, ...]] = []
    size = max(1, CHUNK_LOGITS // logits.shape[-1])
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        x = logits[rows[chunk], columns[chunk]].float()
        target = targets[chunk, None]
        piece: tuple[torch.Tensor, ...] = (
            x.gather(1, target)[:, 0] - x.logsumexp(dim=1),
            x.argmax(dim=1) == target[:, 0],
        )
        if moments:
            # a logit of -inf has weight 0; the clamp keeps 0 * inf from making it NaN
            logp = x.log_softmax(dim=1).clamp(min=-1e4)
            p = logp.exp()
            mean = (p * logp).sum(dim=1)
            piece += (mean, (p * (logp - mean[:, None]) ** 2).sum(dim=1))
        pieces.append(tuple(value.cpu() for value in piece))
    return [torch.cat(column).numpy() for column in zip(*pieces, strict=True)]


# Generation ----------------------------------------------------------------------------------------------------------


def _stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    eos = _inner(model).generation_config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    expected_lengths: Sequence[int] | None = None,
    compat: bool = False,
    progress: bool = True,
    label: str = "generating",
    **sampling: Any,
) -> list[str]:
    """Return what the model says after each prompt: decoded without special tokens, stripped, in the order given.

    Rows are sorted by length and left-padded; positions count from a prompt's first token. A reply ends at the
    first end-of-sequence token (the tokenizer's, or any of the model's generation settings) or after `max_new_tokens`.

    Args:
        model: as in `score`; it is in eval mode meanwhile.
        prompts: token ids, none of them empty.
        expected_lengths: how long each reply will about be, in any unit: a batch runs until its longest reply ends, so
            likely lengths that are alike share one. Changes the time only. None: all alike.
        compat: as OpenUnlearning, hide every token equal to the pad token from attention, inside prompts too.
        sampling: further settings of `model.generate`, for example `do_sample=True, temperature=0.7`. Default: greedy.

    Raises:
        UserError: a prompt is empty, or prompt and reply do not fit into the model's context.
    """
    context = _context_length(model)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"Prompt {i} is empty: there is nothing to continue.")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise UserError(
                f"Prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's context "
                f"of {context}: generate at most {max(context - len(prompt), 0)}, or shorten the prompt."
            )
    stop = _stop_ids(model, tokenizer)
    own = _inner(model).generation_config
    # a least length or beams look at the whole reply, a static cache has room for one call: those run in one piece
    whole = bool(sampling) or own.min_new_tokens is not None or own.cache_implementation is not None
    segment = max_new_tokens if whole else SEGMENT
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    settings: dict[str, Any] = greedy | sampling | {"pad_token_id": tokenizer.pad_token_id, "use_cache": True}
    if stop:
        settings["eos_token_id"] = sorted(stop)
    device = _device(model)
    likely = [0] * len(prompts) if expected_lengths is None else expected_lengths
    order = sorted(range(len(prompts)), key=lambda i: (-likely[i], -len(prompts[i]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts = [""] * len(prompts)
    with evaluating(model):
        for batch in _shown(batches, len(batches), label, progress):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), tokenizer.pad_token_id)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for k, i in enumerate(batch):
                ids[k, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[k, width - len(prompts[i]) :] = 1
            if compat:
                mask = (ids != tokenizer.pad_token_id).long()
            replies = _continue(model, ids.to(device), mask.to(device), stop, max_new_tokens, segment, settings)
            for i, reply in zip(batch, replies, strict=True):
                texts[i] = tokenizer.decode(reply, skip_special_tokens=True).strip()
    return texts


def _continue(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    stop: set[int],
    max_new_tokens: int,
    segment: int,
    settings: dict[str, Any],
) -> list[list[int]]:
    """Return the new tokens of each row of left-padded prompts [B, T], up to its first stop token.

    After every `segment` tokens, rows that have ended leave the batch, keys and values included, where the cache allows
    it (see `_can_drop_rows`); else they stay, and what follows their end is not looked at.
    """
    replies: list[list[int]] = [[] for _ in ids]
    ended = [False] * len(ids)
    rows = list(range(len(ids)))
    carried: dict[str, Any] = {}
    done = 0
    while True:
        steps = min(segment, max_new_tokens - done)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            **carried,
            **settings,
        )
        new = out.sequences[:, ids.shape[1] :]
        done += new.shape[1]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            if not ended[row]:
                end = next((t for t, token in enumerate(tokens) if token in stop), None)
                replies[row] += tokens[:end]
                ended[row] = end is not None
        if all(ended) or done >= max_new_tokens:
            return replies
        ids, mask = out.sequences, torch.cat([mask, torch.ones_like(new)], dim=1)
        cache = out.get("past_key_values")
        carried = {} if cache is None else {"past_key_values": cache}
        if _can_drop_rows(cache):
            going = [k for k, row in enumerate(rows) if not ended[row]]
            kept = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(kept)
            ids, mask, rows = ids[kept], mask[kept], [rows[k] for k in going]


def _can_drop_rows(cache: Any) -> bool:
    """Whether a cache keeps nothing but keys and values, one row of them for each row of the batch, growing."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)


# Loading -------------------------------------------------------------------------------------------------------------


class Subject(BaseModel):
    """Which model to look at: the settings that every command has which loads one."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model: local folder, hub id, or builtin:NAME."""
    adapter: str | None = None
    """Adapter on top of it: local folder or hub id."""
    merged: bool = False
    """Fold the adapter into the weights first, where that is exact; a routed adapter is refused."""
    dtype: str = "auto"
    """Number format: auto, float32, bfloat16, float16."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""

    def load(self) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            UserError: see `load_model`; or `merged` without an adapter, or with one that cannot be merged.
        """
        if not self.merged:
            return load_model(self.model, self.adapter, self.dtype, self.device)
        if self.adapter is None:
            raise UserError("--merged folds an adapter into the weights: give one with --adapter, or leave it out.")
        network, tokenizer = load_model(self.model, self.adapter, self.dtype, self.device)
        return network.merge_and_unload(), tokenizer


def shipped_model(name: str) -> str:
    """Return the folder of a model that comes with this package (`builtin:NAME`); any other name as it is.

    Raises:
        UserError: no model of that name comes with the package.
    """
    if not name.startswith("builtin:"):
        return name
    assets = Path(__file__).parent / "assets"
    names = [f"builtin:{path.parent.relative_to(assets).as_posix()}" for path in sorted(assets.rglob("config.json"))]
    if name not in names:
        raise UserError(
            f"No model {name!r} is shipped; there are: {', '.join(names) or 'none'}.{nearest(name, names)}"
        )
    return str(assets / name.removeprefix("builtin:"))


def _local(name: str) -> bool:
    """Whether a name means a folder rather than a hub id (`name` or `owner/name`)."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def _folder(name: str, needs: str, what: str) -> str:
    """Return a local folder's path after checking that it holds the file that makes it a model or an adapter."""
    path = Path(name).expanduser()
    if not path.exists():
        siblings = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"No {what} at {name}: the folder does not exist.{nearest(str(path), siblings)}")
    if not path.is_dir():
        raise UserError(f"{name} is a file; expected the folder of a {what}, as written by save_pretrained.")
    if (path / needs).is_file():
        return str(path)
    hint = f"; expected the folder of a {what}, as written by save_pretrained."
    if needs == "config.json" and (path / "adapter_config.json").is_file():
        hint = f": it holds an adapter. Give the model it was made for, and the adapter by itself: --adapter {name}"
    elif needs == "adapter_config.json" and (path / "config.json").is_file():
        hint = f": it holds a whole model. Give it by itself: --model {name}"
    raise UserError(f"{name} has no {needs}{hint}")


def load_model(
    model: str, adapter: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, with an adapter if one is named, ready for evaluation.

    Args:
        model: local folder, hub id, or `builtin:NAME` for one that comes with this package.
        adapter: local folder or hub id of a PEFT adapter made for that model (ALTER's or any other).
        dtype: "auto" keeps the checkpoint's number format, but fp16 becomes fp32 on a CPU; or "float32", ...
        device: "cpu", "cuda", "cuda:1", "mps", ...; None takes the GPU if there is one.

    Raises:
        UserError: no such model, adapter, number format or device, an adapter without its model, or weights that are
            NaN or infinite.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        choices = ["auto", "float32", "bfloat16", "float16"]
        raise UserError(f"No number format {dtype!r}: expected one of {', '.join(choices)}.{nearest(dtype, choices)}")
    place = _place(device)
    model = shipped_model(model)
    if _local(model):
        model = _folder(model, "config.json", "model")
    assisted = adapter is not None and is_assistant(adapter)
    if adapter is not None and _local(adapter) and not assisted:
        adapter = _folder(adapter, "adapter_config.json", "adapter")
    try:
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise UserError(
            f"Cannot load the model {model!r}: {_first_line(error)} Expected a local folder or a hub id (owner/name)."
        ) from error
    if dtype == "auto" and place.type == "cpu" and network.dtype == torch.float16:
        network = network.float()
    ensure_pad_token(tokenizer)
    if adapter is not None and assisted:
        network = load_assistant(network, adapter)
    elif adapter is not None:
        from peft import PeftModel

        import alter.adapter  # noqa: F401  registers the method with PEFT

        try:
            network = PeftModel.from_pretrained(network, adapter)
        except OSError as error:
            raise UserError(
                f"Cannot load the adapter {adapter!r}: {_first_line(error)} Expected a local folder or a hub id."
            ) from error
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weights of {adapter or model} are broken: {name} holds NaN or infinite values. "
                "Take an earlier checkpoint, or train again with a lower learning rate."
            )
    return network.to(place).eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _place(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"No device {device!r}: expected cpu, cuda, cuda:0 or mps.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device {device!r} was asked for, but there is no CUDA here: use --device cpu.")
    return place
