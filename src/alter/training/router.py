"""Fits the router that sends each token to an expert, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from alter.adapter.routing import pool
from alter.core.console import show
from alter.data.background import apart_from, background
from alter.data.encoding import Encoded, encode
from alter.data.examples import Example
from alter.data.rewording import FITTED, MEASURED, reworded
from alter.evaluation.verdict import share_interval
from alter.logits.entropy import check_threshold, threshold_from_quantile
from alter.methods import frozen

if TYPE_CHECKING:
    from alter.training.batches import Rows
    from alter.training.settings import Unlearn


class RouterFit(BaseModel):
    """How the router learns which expert serves which token: one linear score per expert on hidden states.

    What nobody has shown is ordinary text: a shipped sample of many kinds of text always joins the fit, and the level at
    which experts open is set on kinds of text that the fit has not seen.
    """

    model_config = ConfigDict(extra="forbid")

    method: Literal["discriminant", "logistic"] = Field(
        "discriminant",
        description="Fisher's discriminant in closed form, or a logistic regression, which steps, retain_weight, "
        "learning_rate and weight_decay are for.",
    )
    shrinkage: float = Field(
        0.05, gt=0, description="Discriminant: added to the covariance's diagonal, as a share of its mean."
    )
    steps: int = Field(1000, ge=1)
    retain_weight: float = Field(
        30.0,
        gt=0,
        description="How much worse it is to open an expert for a retain token than to miss a forget token.",
    )
    learning_rate: float = Field(0.03, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_tokens: int = Field(150_000, ge=1, description="Tokens kept for the fit; drawn at random from all.")
    false_alarms: float | None = Field(
        0.01,
        gt=0,
        lt=0.5,
        description="Share of ordinary low-entropy tokens that may open a forget expert, at most; null leaves the level at "
        "which experts open as the scores have it.",
    )
    memories: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.9, 0.97, 1.0],
        min_length=1,
        description="Values of adapter.router_memory that are tried where none is given, with method discriminant. The least "
        "one is taken that, of the wording which it catches worst, catches nearly as many forget tokens as the best: a short "
        "memory is not drowned by long texts.",
    )
    background: bool = Field(True, description="Let the shipped sample of ordinary text join the fit.")
    rewordings: int = Field(
        3,
        ge=0,
        description="Other wordings of every forget row's question that join the fit, drawn from twelve by rule; of ordinary "
        "questions one.",
    )


FOLDS = 3
"""Parts of the ordinary text, by kinds, each of which is scored by a fit on the others."""

SURE = 0.02
"""Share of the forget tokens that may lie below the level at which experts open, if ordinary text leaves it low."""

LEAST = 0.8
"""Share of the forget tokens that experts open for in any case, whatever ordinary text says."""

NEARLY = 0.05
"""How much less a memory may catch than the best one, to be taken for its shortness."""

MEASURED_ROWS = 8
"""Forget rows that are measured under each wording; two of them inside of a long text."""

AFTER_TEXT = 800
"""Characters of other text before a question, in the fit."""

LONG_TEXT = 6000
"""Characters of other text before a question, about 1,500 tokens."""


OWN_WORDS = "own words"
"""Name of retain rows that the model itself has written."""

AS_GIVEN = "as given"
"""Name of a question's own wording."""


@dataclass
class Part:
    """Rows of one kind for the fit: encoded, as the frozen base sees them, with the expert that each should open (0: none).

    `of` numbers the rows; another wording of a row has its number. `wordings` names each row's wording.
    """

    name: str
    rows: list[Encoded]
    labels: list[int]
    traced: list[frozen.Row] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    wordings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.of = self.of or list(range(len(self.rows)))
        self.wordings = self.wordings or [AS_GIVEN] * len(self.rows)

    def add(self, made: Sequence[tuple[int, str, Encoded]], labels: Sequence[int]) -> None:
        """Other wordings of rows: number of the row, name of the wording, row."""
        self.rows += [row for *_, row in made]
        self.of += [of for of, *_ in made]
        self.wordings += [wording for _, wording, _ in made]
        self.labels += labels

    @property
    def ordinary(self) -> bool:
        """Whether no expert should open."""
        return not any(self.labels)


def _within(encoded: Sequence[Encoded], limit: int, generator: np.random.Generator) -> list[int]:
    """Rows drawn at random until they hold `limit` tokens."""
    chosen, total = [], 0
    for i in generator.permutation(len(encoded)).tolist():
        if total >= limit:
            break
        chosen.append(i)
        total += len(encoded[i].input_ids)
    return chosen


def _encode_fitting(tokenizer: Any, examples: Sequence[Example | None], limit: int | None) -> list[Encoded | None]:
    """Encode examples; None for those that are None, and for those of more than `limit` tokens."""
    found: list[Encoded | None] = []
    for example in examples:
        row = None
        if example is not None:
            row = encode(tokenizer, example)
            if limit is not None and len(row.input_ids) > limit:
                row = None if example.kind != "text" else encode(tokenizer, example, max_length=limit)
        found.append(row)
    return found


def _text(example: Example) -> str:
    return f"{example.prompt or ''}, {example.answer}"


def _parts(run: Unlearn, rows: Rows, tokenizer: Any, limit: int | None, generator: np.random.Generator) -> list[Part]:
    """What the router is fitted on: forget rows, retain rows, both in other words, and ordinary text by kind."""
    fit = run.router_fit
    own = _within(rows.forget, fit.max_tokens // 2, generator)
    # an expert of whose rows none was drawn could not be fitted
    first = {expert: i for i, expert in reversed(list(enumerate(rows.expert)))}
    own += sorted(first[expert] for expert in first.keys() - {rows.expert[i] for i in own})
    left = max(1, fit.max_tokens - sum(len(rows.forget[i].input_ids) for i in own))
    kept = _within(rows.retain, left, generator)
    forget = Part("forget", [rows.forget[i] for i in own], [rows.expert[i] for i in own])
    # no one has said of them what share may open an expert: they join the fit alone
    name = OWN_WORDS if run.retain is None else "retain"
    retain = Part(name, [rows.retain[i] for i in kept], [0] * len(kept))
    parts = [forget, retain]
    ordinary = apart_from(background(), [_text(e) for e in rows.examples]) if fit.background else {}
    texts = [e.answer for kind in ("prose", "facts", "code", "languages") for e in ordinary.get(kind, ())] or [""]

    def in_other_words(examples: Sequence[Example], times: int, most: int) -> list[tuple[int, str, Encoded]]:
        asked: list[Example | None] = []
        places: list[tuple[int, str]] = []
        for place, example in enumerate(examples):
            if example.prompt is None:
                continue
            for name in generator.permutation(sorted(FITTED))[:times].tolist():
                other = texts[int(generator.integers(len(texts)))][:AFTER_TEXT]
                asked.append(reworded(example, FITTED[name](example.prompt, place, other)))
                places.append((place, name))
        encoded = _encode_fitting(tokenizer, asked, limit)
        made = [(*place, row) for place, row in zip(places, encoded, strict=True) if row is not None]
        return [made[i] for i in _within([row for *_, row in made], most, generator)]

    if fit.rewordings and rows.examples:
        made = in_other_words([rows.examples[i] for i in own], fit.rewordings, fit.max_tokens // 4)
        forget.add(made, [rows.expert[own[of]] for of, *_ in made])
    for kind, examples in ordinary.items():
        encoded = [row for row in _encode_fitting(tokenizer, examples, limit) if row is not None]
        part = Part(kind, encoded, [0] * len(encoded))
        if fit.rewordings and kind == "questions":
            made = in_other_words(examples, 1, fit.max_tokens // 4)
            part.add(made, [0] * len(made))
        parts.append(part)
    return [part for part in parts if part.rows]


def fit_router(model: Any, run: Unlearn, rows: Rows, tokenizer: Any, limit: int | None = None) -> dict[str, Any]:
    """Set the entropy threshold and train the router, both on the frozen base, before the adapter trains.

    The router reads hidden states of the frozen base, which no training step changes, so it is fitted once instead of
    next to the task losses: for every new expert one linear score, Fisher's discriminant of the answers of its own forget
    rows against all ordinary text; the retention expert's logit is 0. So a row of the router depends on no earlier expert's, and an expert that comes
    later leaves it as it is. This is a reading of the paper, like the supervision itself.

    Open set, a reading too: forget and ordinary questions join the fit in other words as well, and so does a shipped
    sample of ordinary text, whatever retain rows there are, even none. The level at which experts open is then that which
    at most `false_alarms` of the ordinary low-entropy tokens exceed (of the retain rows, and of the sample with equal
    weight for each kind), where each third of the ordinary text, by kinds, is scored by a fit without it; never lower than
    98 % of the forget tokens need; and never so high that less than `LEAST` of the forget tokens lie above it, whatever
    share of ordinary tokens then does too. All new experts share the shift.

    The literal gate (router="entropy", Eq. 7) has no bias, and its W_g stays as drawn, N(0, 1): no value of one scalar
    tells one row from another, and at the low temperature the softmax passes no gradient. That too is a reading. As
    entropies are positive, the expert with the largest weight takes all low-entropy tokens.

    Args:
        model: with the adapter.
        run: the settings.
        rows: the data; `rows.examples` are its forget rows before they were encoded.
        tokenizer: encodes the shipped sample and other wordings.
        limit: the model's context.

    Returns:
        what was found: the threshold, the share of tokens routed as their row says, per kind of row, and, with a learned
        router, what `measure_router` measures.
    """
    adapter: Any = run.adapter
    generator = np.random.default_rng(run.seed)
    config = model.peft_config["default"]
    parts = _parts(run, rows, tokenizer, limit, generator)
    learned = config.router == "learned"
    if not learned:
        parts = [part for part in parts if part.name in ("forget", "retain", OWN_WORDS)]
    every = [row for part in parts for row in part.rows]
    traced = iter(
        frozen.trace_rows(model, every, pad_token_id=tokenizer.pad_token_id, label="router", features=learned)
    )
    for part in parts:
        part.traced = [next(traced) for _ in part.rows]
    found: dict[str, Any] = {}
    if run.start_from is None and adapter.entropy_quantile is not None:
        kept = next((part for part in parts if part.name in ("retain", OWN_WORDS)), parts[-1])
        kept_entropy = torch.cat([row.entropy for row in kept.traced if row.entropy is not None])
        config.entropy_threshold = threshold_from_quantile(kept_entropy, adapter.entropy_quantile)
        check_threshold(config.entropy_q, config.entropy_threshold, config.vocab_size)
    found["entropy_threshold"] = float(config.threshold)
    if config.router == "static":
        return found
    if config.probed and run.start_from is None:
        probe = model.base_model.router_host[1].alter_probe["default"]
        weight, bias, found["probe"] = fit_probe([row for part in parts for row in part.traced], config.threshold)
        with torch.no_grad():
            probe.weight.copy_(weight)
            probe.bias.copy_(bias)
        show(
            f"Probe: on rows it was not fitted on, it and the exact entropy agree on {found['probe']['agreement']:.1%} of "
            f"{found['probe']['tokens']} tokens; {found['probe']['high']:.1%} are high.",
            stderr=True,
        )
    new = sorted(set(rows.expert))
    fit, answers = run.router_fit, run.router_fit.method == "discriminant"
    given = adapter.router_memory is not None or run.start_from is not None
    memories = [config.router_memory] if given or not (learned and answers) else sorted(fit.memories)
    tried: list[tuple[float, float, tuple[Tensor, Tensor, float]]] = []
    for memory in memories if learned else ():
        data = [_tokens(part, config.threshold, memory, answers) for part in parts]
        made = _open_set(data, new, fit, generator)
        tried.append((memory, _caught(data, made), made))
    if tried:
        # of equals the shortest, which a long text before a question does not drown
        best = max(share for _, share, _ in tried)
        config.router_memory, _, chosen = next(each for each in tried if each[1] >= best - NEARLY)
        found["router_memory"] = config.router_memory
    data = [_tokens(part, config.threshold, config.router_memory, answers) for part in parts]
    x, y = torch.cat([tokens.x for tokens in data]), torch.cat([tokens.y for tokens in data])
    _, host = model.base_model.router_host
    router = host.alter_router["default"].requires_grad_(False)
    if config.router == "entropy":
        # an adapter that grows keeps the rows that it has
        first = 0 if run.start_from is None else min(new)
        drawn = torch.from_numpy(generator.standard_normal((len(router.weight) - first, 1)))
        router.weight[first:], router.bias[first:] = drawn.to(router.weight), 0.0
    else:
        weight, bias, level = chosen
        # the fit is done on the CPU, wherever the model is
        router.weight[new], router.bias[new] = weight.to(router.weight), (bias - level).to(router.bias)
        found["opening_level"] = level
        if run.start_from is None:
            router.weight[0], router.bias[0] = 0.0, 0.0
    if run.start_from is None:
        # spare experts are never chosen
        router.bias[max(new) + 1 :] = -1e4
    fitted = torch.nn.functional.linear(x, router.weight.to(x), router.bias.to(x))
    right = fitted.argmax(-1) == y
    found["router_accuracy_forget"] = float(right[y > 0].float().mean())
    kept_right = right[y == 0] if (y == 0).any() else right[:0]
    found["router_accuracy_retain"] = float(kept_right.float().mean()) if len(kept_right) else None
    if learned and rows.examples:
        found |= measure_router(model, rows, tokenizer, limit)
        say_rates(found)
    return found


PROBE_TOKENS = 50_000
"""Tokens that the probe is fitted on, at most."""


def fit_probe(traced: Sequence[frozen.Row], threshold: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A logistic regression that tells from what the router reads whether the next token's entropy is above a threshold.

    Every fifth row is left out of a first fit and measured; the probe that is returned is fitted on all rows.

    Args:
        traced: rows with `entropy` [T] and `features` [T, D] of each token's generating step; their first tokens have none.
        threshold: of the entropy.

    Returns:
        weight [1, D], bias [1], and of the tokens left out: `agreement`, the share on the side that the entropy says,
        `high`, the share above the threshold, and their number, `tokens`.
    """
    from sklearn.linear_model import LogisticRegression

    x, high, held = [], [], []
    for i, row in enumerate(traced):
        assert row.features is not None
        assert row.entropy is not None
        x.append(row.features[1:].float())
        high.append(row.entropy[1:] > threshold)
        held.append(torch.full((len(x[-1]),), i % 5 == 4))
    xs, ys, out = torch.cat(x), torch.cat(high), torch.cat(held)
    mean, std = xs.mean(0), xs.std(0).clamp_min(1e-6)

    def fitted(chosen: Tensor) -> tuple[Tensor, Tensor]:
        places = chosen.nonzero()[:, 0]
        places = places[:: -(-len(places) // PROBE_TOKENS)]
        own = ys[places]
        if not own.any() or own.all():
            return torch.zeros(1, xs.shape[1]), torch.tensor([1.0 if own.any() else -1.0])
        made = LogisticRegression(C=0.1, max_iter=200).fit(((xs[places] - mean) / std).numpy(), own.numpy())
        weight = torch.from_numpy(made.coef_).float() / std
        return weight, torch.from_numpy(made.intercept_).float() - weight @ mean

    measured = out if out.any() else torch.ones_like(out)
    weight, bias = fitted(~out)
    said = (xs[measured] @ weight.t() + bias)[:, 0] > 0
    found = {
        "agreement": float((said == ys[measured]).float().mean()),
        "high": float(ys[measured].float().mean()),
        "tokens": int(measured.sum()),
    }
    return *fitted(torch.ones_like(out)), found


@dataclass
class Tokens:
    """Tokens of one kind: evidence x [T, D], expert y [T], whether low-entropy [T], the row of each [T], and the number of
    its wording [T]."""

    name: str
    x: Tensor
    y: Tensor
    low: Tensor
    row: Tensor
    wording: Tensor

    def part(self, chosen: Tensor) -> Tokens:
        """The chosen tokens alone."""
        columns = (column[chosen] for column in (self.x, self.y, self.low, self.row, self.wording))
        return Tokens(self.name, *columns)


def _caught(data: Sequence[Tokens], made: tuple[Tensor, Tensor, float]) -> float:
    """Share of the low-entropy forget tokens (of all, if none is low) above the level, in the wording where it is least."""
    weight, bias, level = made
    own = next(tokens for tokens in data if tokens.name == "forget")
    over = (own.x @ weight.t() + bias).max(-1).values > level
    counted = own.low if own.low.any() else torch.ones_like(own.low)
    each = [over[counted & (own.wording == wording)] for wording in own.wording.unique()]
    return min(float(flags.float().mean()) for flags in each if len(flags))


def _tokens(part: Part, threshold: float, memory: float, answers: bool = True) -> Tokens:
    """The evidence that routes each token of a kind; the first token of a row has none and is never routed."""
    x, y, low, of, wording = [], [], [], [], []
    names = sorted(set(part.wordings))
    for place, (encoded, row, label) in enumerate(zip(part.rows, part.traced, part.labels, strict=True)):
        assert row.entropy is not None
        # a question's first words and a chat template's say nothing of the subject: its answer's evidence holds them all
        start = max(1, encoded.prompt_length) if label and answers else 1
        evidence = row.entropy[:, None] if row.features is None else row.features.float()
        x.append(pool(evidence[None, 1:], torch.ones(1, len(evidence) - 1), memory)[0, start - 1 :])
        y.append(torch.full((len(x[-1]),), label))
        low.append(row.entropy[start:] <= threshold)
        of.append(torch.full((len(x[-1]),), part.of[place]))
        wording.append(torch.full((len(x[-1]),), names.index(part.wordings[place])))
    return Tokens(part.name, *map(torch.cat, (x, y, low, of, wording)))


def _folds(data: Sequence[Tokens]) -> list[list[Tokens]]:
    """Ordinary tokens in `FOLDS` parts: whole kinds, but of the retain rows every third row, as they are of one kind."""
    folds: list[list[Tokens]] = [[] for _ in range(FOLDS)]
    kinds = sorted((t for t in data if t.name not in ("forget", "retain", OWN_WORDS)), key=lambda t: -len(t.y))
    for tokens in kinds:
        min(folds, key=lambda fold: sum(len(t.y) for t in fold)).append(tokens)
    for tokens in data:
        if tokens.name == "retain":
            for i, fold in enumerate(folds):
                if (tokens.row % FOLDS == i).any():
                    fold.append(tokens.part(tokens.row % FOLDS == i))
    return folds


def opening_level(own: Tensor, ordinary: Mapping[str, Tensor], false_alarms: float) -> float:
    """The logit above which experts are to open.

    Args:
        own: highest logit of each forget token [T].
        ordinary: highest logits of ordinary low-entropy tokens by kind [n]; "retain" counts by itself, the others
            together with equal weight for each kind.
        false_alarms: share of each that may lie above the level.

    Returns:
        the least level that no more than this share exceeds, but at least that which 2 % of `own` lie below.
    """
    level = float(
        torch.quantile(own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:100_000]], SURE)
    )
    others = {kind: logits for kind, logits in ordinary.items() if len(logits)}
    for group in (["retain"], [kind for kind in others if kind != "retain"]):
        parts = [others[kind] for kind in group if kind in others]
        if parts:
            logits = torch.cat(parts)
            weight = torch.cat([torch.full((len(part),), 1 / len(part) / len(parts)) for part in parts]).double()
            order = logits.argsort(descending=True)
            # how much lies at or above each value; the next lower value is exceeded by exactly that
            exceeds = weight[order].cumsum(0)
            place = int((exceeds <= false_alarms + 1e-12).sum())
            level = max(level, float(logits[order[min(place, len(order) - 1)]]))
    return level


def _open_set(
    data: Sequence[Tokens], new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Weights [len(new), D] and biases [len(new)] of the new experts, and the logit above which they are to open."""
    own = next(tokens for tokens in data if tokens.name == "forget")
    weight, bias = _scores(*_joined(data), new, fit, generator)
    if fit.false_alarms is None:
        return weight, bias, 0.0
    folds = _folds(data)
    own_words = [tokens for tokens in data if tokens.name == OWN_WORDS]
    highest = (own.x @ weight.t() + bias).max(-1).values
    ordinary: dict[str, list[Tensor]] = {}
    for i, fold in enumerate(folds):
        rest = [tokens for j, other in enumerate(folds) if j != i for tokens in other] or fold
        if not fold:
            continue
        its_weight, its_bias = _scores(*_joined([own, *own_words, *rest]), new, fit, generator)
        its_own = (own.x @ its_weight.t() + its_bias).max(-1).values
        # the scale of scores depends on the text they are fitted on: compared by the forget tokens' mean and spread
        scale = highest.std() / its_own.std().clamp_min(1e-12)
        for tokens in fold:
            logits = (tokens.x[tokens.low] @ its_weight.t() + its_bias).max(-1).values
            logits = (logits - its_own.mean()) * scale + highest.mean()
            ordinary.setdefault(tokens.name, []).append(logits)
    level = opening_level(highest, {kind: torch.cat(logits) for kind, logits in ordinary.items()}, fit.false_alarms)
    # a router that catches less forgets nothing; the run reports what this costs in false alarms
    return weight, bias, min(level, float(_quantile(highest, 1 - LEAST)))


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[int(share * (len(values) - 1))]


def _joined(data: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    return torch.cat([tokens.x for tokens in data]), torch.cat([tokens.y for tokens in data])


def _rate(opened: list[Tensor]) -> dict[str, Any]:
    flags = torch.cat(opened) if opened else torch.zeros(0, dtype=torch.bool)
    count, n = int(flags.sum()), len(flags)
    return {"share": count / n if n else None, "interval": list(share_interval(count, n)), "tokens": n}


def measure_router(model: Any, rows: Rows, tokenizer: Any, limit: int | None) -> dict[str, Any]:
    """How often low-entropy tokens open a forget expert where they should not, and where they should.

    Returns:
        `false_alarms`: on kinds of text that no fit sees, of all of them and `by_kind`; `caught`: among the answers'
        tokens of forget rows, by wording of the question (`alter.data.rewording.MEASURED`). Each has the `share`, its
        `interval` (Wilson, 95 %, tokens taken as independent) and the number of `tokens`.
    """
    config = model.peft_config["default"]
    kinds = apart_from(background(unseen=True), [_text(e) for e in rows.examples])
    long_text = " ".join(e.answer for e in kinds.get("detective", ()))[:LONG_TEXT]
    places = np.linspace(0, len(rows.examples) - 1, min(MEASURED_ROWS, len(rows.examples))).astype(int).tolist()
    groups: list[tuple[str, str, list[Encoded]]] = []
    for kind, examples in kinds.items():
        groups.append(("ordinary", kind, [r for r in _encode_fitting(tokenizer, examples, limit) if r is not None]))
    for name, make in MEASURED.items():
        asked = [
            reworded(e, make(e.prompt, i, long_text))
            for i in (places[:2] if name == "long text" else places)
            if (e := rows.examples[i]).prompt is not None
        ]
        groups.append(("forget", name, [r for r in _encode_fitting(tokenizer, asked, limit) if r is not None]))
    every = [row for *_, encoded in groups for row in encoded]
    traced = iter(
        frozen.trace_rows(model, every, pad_token_id=tokenizer.pad_token_id, gates=True, label="router, measured")
    )
    opened: dict[str, dict[str, list[Tensor]]] = {"ordinary": {}, "forget": {}}
    for side, name, encoded in groups:
        flags = opened[side].setdefault(name, [])
        for row in encoded:
            seen = next(traced)
            assert seen.entropy is not None
            assert seen.gates is not None
            counted = seen.entropy <= config.threshold
            if side == "forget":
                counted[: row.prompt_length] = False
            counted[0] = False
            flags.append((seen.gates[..., 1:] > 0).any(-1)[counted])
    alarms = _rate([flag for flags in opened["ordinary"].values() for flag in flags])
    by_kind = {kind: _rate(flags) for kind, flags in opened["ordinary"].items()}
    caught = {name: _rate(flags) for name, flags in opened["forget"].items() if flags}
    return {"false_alarms": {**alarms, "by_kind": by_kind}, "caught": caught}


def say_rates(found: Mapping[str, Any]) -> None:
    """Print what `measure_router` found."""
    alarms = found["false_alarms"]
    low, high = alarms["interval"]
    show(
        f"Router: {alarms['share'] or 0:.2%} of {alarms['tokens']} low-entropy tokens of ordinary text of kinds that it was not "
        f"fitted on open a forget expert (95 % interval {low:.2%} to {high:.2%}).",
        stderr=True,
    )
    shares = ", ".join(
        f"{name} {rate['share']:.0%}" for name, rate in found["caught"].items() if rate["share"] is not None
    )
    if shares:
        show(
            f"Router: of the answers' low-entropy tokens it catches, by wording of the question: {shares}.",
            stderr=True,
        )


def _scores(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Weights [len(new), D] and biases [len(new)] from tokens x [T, D] and their experts y [T], 0 for ordinary ones."""
    if fit.method == "logistic":
        return _regress(x, y, new, fit, generator)
    return discriminant(x, y, new, fit.shrinkage)


OWN_SPREAD = 0.2
"""Weight of the spread of the experts' own tokens beside that of ordinary ones, which are far more diverse."""


def discriminant(x: Tensor, y: Tensor, new: Sequence[int], shrinkage: float) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant of each new expert's tokens against ordinary ones, with one covariance for all.

    With the means m_e of expert e's tokens and m_0 of the ordinary ones, and the shrunken covariance S, the score of x is
    half the difference of its squared Mahalanobis distances to m_0 and to m_e: w_e = S^-1 (m_e - m_0),
    b_e = -w_e (m_e + m_0) / 2. S is the ordinary tokens' covariance plus `OWN_SPREAD` times that of the experts' tokens
    around their means, plus `shrinkage` times the mean of its diagonal on the diagonal.

    Args:
        x: evidence [T, D].
        y: expert [T]; 0 marks ordinary tokens. Without any the mean of all tokens takes the place of theirs.
        new: the experts.
        shrinkage: above 0.

    Returns:
        weights [len(new), D] and biases [len(new)], fp32.
    """
    centre, spread, _ = _moments(x, y == 0 if (y == 0).any() else torch.ones_like(y, dtype=torch.bool))
    parts = [_moments(x, y == e) for e in new]
    means = torch.stack([mean for mean, *_ in parts])
    total = sum(count for *_, count in parts)
    for _, around, count in parts:
        spread += OWN_SPREAD * around * (count / total)
    spread.diagonal().add_(shrinkage * spread.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(spread, (means - centre).t()).t()
    bias = -(weight * (means + centre)).sum(-1) / 2
    return weight.float(), bias.float()


def _moments(x: Tensor, chosen: Tensor, at_once: int = 8192) -> tuple[Tensor, Tensor, int]:
    """Mean [D] and covariance [D, D] of the chosen rows of x [T, D], and their number; fp64, few rows of it at a time."""
    parts = chosen.nonzero()[:, 0].split(at_once)
    count = int(chosen.sum())
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    mean = sum((x[part].double().sum(0) for part in parts), zero) / count
    spread = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in parts:
        off = x[part].double() - mean
        spread.addmm_(off.t(), off, alpha=1 / count)
    return mean, spread, count


def _regress(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One logistic regression for each of the `new` experts: tokens x [T, D] of its own rows (y [T] names it) or not.

    Returns:
        weights [len(new), D] and biases [len(new)].
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    is_own = y[:, None] == torch.tensor(new)
    head = torch.nn.Linear(x.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    of_forget, of_retain = (y > 0).nonzero()[:, 0], (y == 0).nonzero()[:, 0]
    for step in range(fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / fit.steps)
        drawn = [part[torch.from_numpy(generator.integers(len(part), size=1024))] for part in (of_forget, of_retain)]
        batch = torch.cat(drawn)
        own, logits = is_own[batch], head(x[batch])
        hit = torch.nn.functional.softplus(-logits)[own].mean()
        miss = torch.nn.functional.softplus(logits)[~own].mean()
        loss = hit + fit.retain_weight * miss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = (head.weight / std).detach()
    return weight, (head.bias - weight @ mean).detach()
