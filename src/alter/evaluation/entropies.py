"""`alter entropy`: which tokens of a text a model is sure of, and whether adaptation changes that (arXiv:2603.01792).

ALTER rests on two observations about token entropies: they are bimodal, and adaptation hardly moves a token from one
side of the threshold to the other (for Llama-3-8B adapted on WMDP the paper says over 87 % of the high-entropy and over
92 % of the low-entropy tokens keep their side). This command measures both on any model and text.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from alter import metrics
from alter.core import Array, UserError, console
from alter.data import Collator, Encoded, Example, TemplateArguments, batches_by_length, encode, load_examples
from alter.inference import MAX_LOGITS, evaluating
from alter.logits import check_order, entropy_from_logits, max_entropy, threshold_from_quantile
from alter.models import Bits, gguf, load_model, shipped_model
from alter.settings import Count, Rows, Seed, Written
from alter.storage import Record, stamped

if TYPE_CHECKING:
    import numpy.typing as npt


class Study(BaseModel):
    """Token entropies of a model on a text: histogram, bimodality, typical tokens, and what adaptation changes."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model: local folder, hub id, or builtin:NAME."""
    text: str
    """What it reads: a .txt, .json or .jsonl file, builtin:SPLIT, or a hub id with :SPLIT."""
    after: str | None = None
    """The model after adaptation: an adapter for `model`, or another checkpoint with the same tokenizer."""
    q: list[Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: [1.0, 1.5], min_length=1)
    """Orders of the entropy, each above 0: 1 is Shannon's in nats, others are Tsallis'."""
    threshold: float | None = None
    """Entropy above which a token is a high one; 1.2 as in the paper unless there is a quantile."""
    quantile: float | None = Field(None, gt=0, lt=1)
    """Share of tokens below the threshold, measured on the model before, instead of a threshold."""
    tokens: Literal["labelled", "all"] = "labelled"
    """labelled: answers, or the whole of a plain text; all: questions and chat template as well."""
    window: int = Field(1024, ge=2, le=1_000_000)
    """Longer rows are cut into pieces of this many tokens (or the model's context); each begins without context."""
    limit: Rows | None = Field(None, ge=1)
    """Only this many rows, drawn by the seed."""
    seed: Seed = 0
    """Draws the rows, and starts the fit of two normals."""
    top: Count = Field(15, ge=1)
    """Length of the lists of frequent tokens."""
    bins: Count = Field(60, ge=2)
    """Bins of the histogram."""
    dtype: str = "auto"
    """Number format: auto, float32, bfloat16, float16."""
    quantization: Bits | None = None
    """Hold the linear layers of the model in 4bit or 8bit (bitsandbytes)."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""
    chat_template_kwargs: TemplateArguments = []
    out: Annotated[str | None, Written(folder=True)] = None
    """Folder for records.json, tokens.csv, histogram.csv, entropies.safetensors and entropy.png."""


@dataclass
class StudiedTokens:
    """The n counted tokens, and the entropy of each before and after, by the order q.

    `row` numbers the pieces of text, `position` the places in them. The first token of a piece is not among them.
    """

    ids: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    before: dict[float, Array]
    after: dict[float, Array] | None = None


@dataclass(frozen=True)
class Frequent:
    """A token of the vocabulary: how often it occurs, its mean entropy, the share of its occurrences that are high."""

    token: int
    count: int
    mean: float
    high: float


# Measuring -----------------------------------------------------------------------------------------------------------


def token_entropies(
    model: Any,
    encoded: Sequence[Encoded],
    orders: Sequence[float],
    *,
    pad_token_id: int,
    batch_tokens: int | None = None,
    label: str = "entropies",
) -> dict[float, list[npt.NDArray[np.float32]]]:
    """Return, by order, the entropy of the distribution that generated each token of a row but its first.

    One forward serves all orders. A batch's logits stay below `scoring.MAX_LOGITS` (or are one row's), and only 512
    distributions at a time are held in fp32, so memory does not grow with the text.

    Args:
        model: a causal language model of transformers, or a PeftModel around one; it is in eval mode meanwhile.
        encoded: rows; labels do not matter here.
        orders: of the Tsallis entropy; 1 is Shannon's in nats.
        pad_token_id: fills rows up on the right, masked.
        batch_tokens: padded tokens in a batch; None: 16384, or 4096 on a CPU.
        label: name on the progress bar.

    Returns:
        {q: [one array [T - 1] per row, in the order given]}, float32; entry t belongs to token t + 1.

    Raises:
        UserError: an order is not above 0, or the model's logits are NaN.
    """
    for q in orders:
        check_order(q)
    weight = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size
    if batch_tokens is None:
        batch_tokens = 4096 if weight.device.type == "cpu" else 16384
    batches = batches_by_length([len(row.input_ids) for row in encoded], min(batch_tokens, MAX_LOGITS // vocabulary))
    collate = Collator(pad_token_id)
    found: dict[float, list[Any]] = {q: [None] * len(encoded) for q in orders}
    with evaluating(model):
        for batch in console.progress(batches, total=len(batches), label=label):
            padded = collate([{"input_ids": encoded[i].input_ids} for i in batch])
            inputs = {name: value.to(weight.device) for name, value in padded.items()}
            logits = model(**inputs, use_cache=False).logits
            for place, i in enumerate(batch):
                emitted = logits[place, : len(encoded[i].input_ids) - 1]
                for q in orders:
                    values = entropy_from_logits(emitted, q).float().cpu().numpy()
                    if np.isnan(values).any():
                        raise UserError(
                            f"Row {i}: the model's logits are NaN; its weights or its number format ({logits.dtype}) "
                            "are broken. Try `dtype` float32, or an earlier checkpoint."
                        )
                    found[q][i] = values
    return found


def cut_rows(tokenizer: Any, examples: Sequence[Example], window: int) -> list[Encoded]:
    """Encode examples as everywhere else and cut those longer than `window` tokens into pieces of that length.

    A last piece of a single token, which would have no entropy, is left out.
    """
    cut = []
    for example in examples:
        # a passage of one token has nothing that was generated
        if example.kind == "text" and len(tokenizer(example.answer, verbose=False)["input_ids"]) < 2:
            continue
        row = encode(tokenizer, example)
        for start in range(0, len(row.input_ids), window):
            part = slice(start, start + window)
            if len(row.input_ids[part]) > 1:
                cut.append(Encoded(row.input_ids[part], row.labels[part], max(row.prompt_length - start, 0)))
    return cut


def _counted(row: Encoded, which: str) -> list[int]:
    """Return the places of the tokens that count; the first has no entropy."""
    return [t for t in range(1, len(row.input_ids)) if which == "all" or row.labels[t] != -100]


def frequent(ids: npt.ArrayLike, entropy: npt.ArrayLike, threshold: float, vocab_size: int) -> list[Frequent]:
    """Return every token that occurs, most frequent first (the smaller id on a tie)."""
    tokens, values = np.asarray(ids, dtype=np.int64), np.asarray(entropy, dtype=np.float64)
    count = np.bincount(tokens, minlength=vocab_size)
    total = np.bincount(tokens, weights=values, minlength=vocab_size)
    high = np.bincount(tokens, weights=values > threshold, minlength=vocab_size)
    order = np.argsort(-count, kind="stable")[: int((count > 0).sum())]
    return [Frequent(int(i), int(count[i]), float(total[i] / count[i]), float(high[i] / count[i])) for i in order]


def sides(tokens: Sequence[Frequent], threshold: float) -> tuple[list[Frequent], list[Frequent]]:
    """Split tokens by whether their mean entropy is above the threshold; their order is kept."""
    return [t for t in tokens if t.mean > threshold], [t for t in tokens if t.mean <= threshold]


def shares_of_bins(values: npt.ArrayLike, edges: npt.ArrayLike) -> Array:
    """Return the share of the values in each bin, [bins]; a value on an edge belongs to the bin above it, the last edge to the last bin."""
    x = np.asarray(values, dtype=np.float64)
    return np.histogram(x, bins=np.asarray(edges, dtype=np.float64))[0] / max(x.size, 1)


# The command ---------------------------------------------------------------------------------------------------------


def _check(settings: Study) -> None:
    """Refuse contradictory settings before anything is loaded."""
    from alter.logits import PAPER_THRESHOLD

    if settings.threshold is not None and settings.quantile is not None:
        raise UserError("`threshold` and `quantile` both say where high begins: give one of them.")
    if len(set(settings.q)) != len(settings.q):
        raise UserError(f"`q` names an order twice: {' '.join(f'{q:g}' for q in settings.q)}.")
    for q in settings.q:
        check_order(q, "q")
        if settings.quantile is None:
            _reachable(q, PAPER_THRESHOLD if settings.threshold is None else settings.threshold, None)
    if settings.out is not None and (Path(settings.out).is_file() or Path(settings.out).resolve().parent.is_file()):
        raise UserError(f"`out` is {settings.out!r}, which is not a folder and cannot become one.")


def _reachable(q: float, threshold: float, vocab_size: int | None) -> None:
    bound = max_entropy(q, vocab_size) if vocab_size else (1 / (q - 1) if q > 1 else math.inf)
    if not 0 < threshold < bound:
        raise UserError(
            f"A threshold of {threshold:g} divides nothing at `q` {q:g}: these entropies lie between 0 and {bound:.4g}. "
            "Give `threshold` between them, or `quantile` 0.7 (the top 30 % are high), which suits every order."
        )


def _is_adapter(name: str) -> bool:
    """Tell whether `name` is an adapter rather than a model: it has an adapter's configuration and no model's."""
    folder = Path(name).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except OSError:
        # no such repository: loading, which comes next, says so
        return False


def _same_tokens(tokenizer: Any, after: str) -> None:
    """Refuse, before the first model runs, a second model that is missing or tokenises text differently."""
    from transformers import AutoTokenizer

    name = shipped_model(after)
    folder = Path(name).expanduser()
    packed = gguf.gguf_place(name)
    if (
        packed is None
        and (folder.exists() or name.startswith((".", "/", "~")))
        and not (folder / "config.json").is_file()
    ):
        raise UserError(f"`after` is {after}, which is neither the folder of an adapter nor that of a model.")
    try:
        if packed is not None:
            second = gguf.load_tokenizer(packed)
        else:
            second = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name)
    except (OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"Cannot load the tokenizer of `after` {after}: {said}") from None
    one, other = tokenizer.get_vocab(), second.get_vocab()
    if one != other:
        different = next(iter(set(one.items()) ^ set(other.items())))[0]
        raise UserError(
            f"{after} has another tokenizer ({len(other)} tokens against {len(one)}; they differ in {different!r}, for "
            "one): entropies can be compared token by token only. Give a model made from `model`."
        )


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), size=limit, replace=False)
    return [examples[i] for i in sorted(chosen)]


def measure_study(settings: Study) -> tuple[StudiedTokens, Any]:
    """Run the model, and the one after if there is one, over the text; return the counted tokens and the tokenizer.

    With an adapter the model before is the same network with the adapter off.

    Raises:
        UserError: settings, text, model or adapter that cannot be used; another tokenizer; fewer than four tokens.
    """
    from alter.logits import PAPER_THRESHOLD

    _check(settings)
    examples = _sample(load_examples(settings.text), settings.limit, settings.seed)
    adapter = settings.after if settings.after is not None and _is_adapter(settings.after) else None
    model, tokenizer = load_model(
        settings.model,
        adapter,
        settings.dtype,
        settings.device,
        settings.quantization,
        template=settings.chat_template_kwargs,
    )
    if settings.after is not None and adapter is None:
        _same_tokens(tokenizer, settings.after)
    config = model.config.get_text_config()
    if settings.quantile is None:
        for q in settings.q:
            _reachable(q, PAPER_THRESHOLD if settings.threshold is None else settings.threshold, config.vocab_size)
    context = getattr(config, "max_position_embeddings", None) or settings.window
    encoded = cut_rows(tokenizer, examples, min(settings.window, context))
    places = [_counted(row, settings.tokens) for row in encoded]
    if sum(map(len, places)) < 4:
        raise UserError(f"{settings.text} has {sum(map(len, places))} tokens with an entropy; expected at least 4.")

    def run(network: Any, label: str) -> dict[float, Array]:
        found = token_entropies(network, encoded, settings.q, pad_token_id=tokenizer.pad_token_id, label=label)
        return {
            q: np.concatenate([row[np.array(at, dtype=np.int64) - 1] for row, at in zip(rows, places, strict=True)])
            for q, rows in found.items()
        }

    with model.disable_adapter() if adapter is not None else contextlib.nullcontext():
        before = run(model, "before")
    after = None
    if adapter is not None:
        after = run(model, "after")
    elif settings.after is not None:
        # one model at a time in memory
        del model
        model, _ = load_model(settings.after, None, settings.dtype, settings.device, settings.quantization)
        after = run(model, "after")
    tokens = StudiedTokens(
        np.array([row.input_ids[t] for row, at in zip(encoded, places, strict=True) for t in at], dtype=np.int64),
        np.repeat(np.arange(len(places)), [len(at) for at in places]),
        np.array([t for at in places for t in at], dtype=np.int64),
        before,
        after,
    )
    return tokens, tokenizer


def thresholds(settings: Study, tokens: StudiedTokens) -> dict[float, float]:
    """Return the threshold of each order: the one given, the quantile of the entropies before, or the paper's 1.2."""
    from alter.logits import PAPER_THRESHOLD

    if settings.quantile is None:
        return dict.fromkeys(settings.q, PAPER_THRESHOLD if settings.threshold is None else settings.threshold)
    return {q: threshold_from_quantile(torch.from_numpy(tokens.before[q]), settings.quantile) for q in settings.q}


def _distribution(name: str, values: Array, threshold: float, seed: int, extra: dict[str, Any]) -> Iterator[Record]:
    """Record the distribution of one set of entropies."""
    n = len(values)
    yield Record(name, "entropy_mean", float(values.mean()), n, extra=extra)
    yield Record(name, "entropy_high", float((values > threshold).mean()), n, extra=extra)
    if np.ptp(values) == 0:
        return
    yield Record(name, "entropy_bimodality", metrics.entropies.bimodality_coefficient(values), n, extra=extra)
    fit = metrics.entropies.two_normals(values, seed=seed)
    shape = {"weights": fit.weights, "means": fit.means, "deviations": fit.deviations}
    yield Record(name, "entropy_two_normals", fit.bic_gain, n, extra=extra | shape)
    yield Record(name, "entropy_ashman", fit.ashman, n, extra=extra | shape)
    # no value: one mode
    yield Record(name, "entropy_valley", fit.valley, n, extra=extra | shape)
    yield Record(name, "entropy_valley_depth", fit.depth, n, extra=extra | shape)


def study_records(settings: Study, tokens: StudiedTokens) -> dict[str, list[Record]]:
    """Return the figures by what the records call the model: "before, q=1", "after, q=1", ..."""
    columns: dict[str, list[Record]] = {}
    cuts = thresholds(settings, tokens)
    told = {"benchmark": "entropy", "text": settings.text, "tokens": settings.tokens, "rows": int(tokens.row[-1]) + 1}
    for q in settings.q:
        extra: dict[str, Any] = told | {"q": q, "threshold": cuts[q]}
        name = f"before, q={q:g}"
        mine = extra | {"loaded": settings.model}
        columns[name] = list(_distribution(name, tokens.before[q], cuts[q], settings.seed, mine))
        if tokens.after is None:
            continue
        name = f"after, q={q:g}"
        mine = extra | {"loaded": settings.after}
        columns[name] = list(_distribution(name, tokens.after[q], cuts[q], settings.seed, mine))
        stays = metrics.entropies.stability(tokens.before[q], tokens.after[q], cuts[q])
        for metric, value, n in (
            ("entropy_high_stay", stays.high_stay, stays.n_high),
            ("entropy_low_stay", stays.low_stay, stays.n_low),
            ("entropy_agreement", stays.agreement, len(tokens.ids)),
            ("entropy_kappa", stays.kappa, len(tokens.ids)),
            ("entropy_correlation", stays.correlation, len(tokens.ids)),
        ):
            columns[name].append(Record(name, metric, None if math.isnan(value) else value, n, extra=mine))
    facts = {"settings": settings.model_dump(mode="json", exclude={"out"}), "seed": settings.seed}
    return {name: stamped(found, **facts) for name, found in columns.items()}
