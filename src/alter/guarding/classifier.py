"""The classifier of prompts that a guard decides by: a logistic regression on the model's own hidden states, by windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from alter import metrics
from alter.core import Array, UserError, progress, show
from alter.data import Collator, Example, batches_by_length, encode_all, encode_prompt, rewording
from alter.inference import evaluating
from alter.models import after_block, states_after, window_means

FOLDS = 5
TOKENS = 2048
"""Of the prompts that are read at once."""
LEARNT = 6
"""Windows of a text to forget or of a benign prompt that the fit learns from."""


def fitting(tokenizer: Any, examples: Sequence[Example | None], limit: int | None) -> list[list[int]]:
    """Encode the prompts of examples, without those that are None or longer than `limit` tokens."""
    prompts = [encode_prompt(tokenizer, example) for example in examples if example is not None]
    return [prompt for prompt in prompts if limit is None or len(prompt) <= limit]


def prompts_of(tokenizer: Any, examples: Sequence[Example], limit: int | None) -> list[list[int]]:
    """Return each row as a user would ask it, at most `limit` tokens: its prompt, or a row of text, split if it is longer."""
    asked: list[list[int]] = []
    for row in examples:
        if row.kind == "text":
            asked += [list(part.input_ids) for part in encode_all(tokenizer, [row], max_length=limit)[0]]
        else:
            asked.append(encode_prompt(tokenizer, row)[:limit])
    return asked


def prompt_windows(
    model: Any, prompts: Sequence[list[int]], depth: int, window: int, pad_token_id: int, label: str
) -> list[Array]:
    """Return the mean hidden states of each prompt's windows at one depth, [k, H] each (`window_means`), the last window first.

    Args:
        model: the untouched model.
        prompts: token ids.
        depth: after how many blocks; those behind do not run.
        window: tokens of a window.
        pad_token_id: fills rows up.
        label: of the progress bar.
    """
    collate, device = Collator(pad_token_id), next(model.parameters()).device
    groups, at = batches_by_length(list(map(len, prompts)), TOKENS), after_block(model, depth)
    found: dict[int, Array] = {}
    with evaluating(model):
        for members in progress(groups, total=len(groups), label=label):
            batch = collate([{"input_ids": prompts[i]} for i in members])
            given = {name: value.to(device) for name, value in batch.items()}
            states = states_after(model, at, given)
            for i, row in zip(members, states, strict=True):
                found[i] = window_means(row[: len(prompts[i])], window).cpu().numpy()
    return [found[i] for i in range(len(prompts))]


def spread(windows: Array) -> Array:
    """Return at most `LEARNT` of a prompt's windows [k, H], evenly spaced from the last on."""
    places = np.linspace(0, len(windows) - 1, min(LEARNT, len(windows))).astype(int)
    return np.take(windows, places, axis=0)


def highest(scores: Array, lengths: Sequence[int]) -> Array:
    """Return the highest score of each prompt, [n], of its windows' scores, one after the other."""
    found: Array = np.maximum.reduceat(scores, np.cumsum([0, *lengths[:-1]]))
    return found


Looks = Sequence[Array]
"""A prompt's windows as it is, and with every word written like a name: [k, H] each."""


@dataclass(frozen=True)
class Fitted:
    """Classifiers of prompts, one for each look at them, their common threshold, and their cross-validated quality.

    Attributes:
        weight, bias: of each look's logistic regression on the windows' mean states as they are, [L, H] and [L].
        threshold: probability above which a prompt counts as recognised.
        caught: whether each forget prompt lies above it, scored by a fit without it, [n].
        alarms: the same of the benign prompts, [m].
    """

    weight: Array
    bias: Array
    threshold: float
    caught: NDArray[np.bool_]
    alarms: NDArray[np.bool_]

    def recognised(self, prompts: Sequence[Looks]) -> NDArray[np.bool_]:
        """Tell which prompts are recognised, [n], by the mean states of their windows."""
        return likeliest(self.weight, self.bias, prompts) > self.threshold


def likeliest(weight: Array, bias: Array, prompts: Sequence[Looks]) -> Array:
    """Return each prompt's highest probability, [n], over the windows of all looks, each by its own regression."""
    if not prompts:
        return np.zeros(0)
    scores = [
        highest(np.concatenate(windows) @ weight[at] + bias[at], [*map(len, windows)])
        for at, windows in enumerate(zip(*prompts, strict=True))
    ]
    found: Array = expit(np.max(scores, axis=0))
    return found


def fit_classifier(
    forget: Sequence[Looks], benign: Sequence[Looks], *, whole: Sequence[bool] | None = None, false_alarms: float,
    threshold: float, seed: int,
) -> Fitted:  # fmt: skip
    """Fit a logistic regression to each look, each class with the same total weight, on standardised states of windows (L2, C = 1).

    It learns from the last window of a prompt to forget, and from up to `LEARNT` of a text to forget and of a benign prompt. A
    prompt is scored by its likeliest window of all looks. The threshold is the given one, or higher: the lowest above which at
    most a share `false_alarms` of the benign prompts lie in `FOLDS`-fold cross-validation.

    Args:
        forget, benign: of n and m prompts, for each look the mean states [k, H] of the windows, the last one first.
        whole: whether all windows of a forget prompt are about what is to be forgotten, n; by default none but the last.
        false_alarms, threshold: see above.
        seed: of the folds.

    Raises:
        UserError: there are fewer than two of either.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fewest = min(len(forget), len(benign))
    if fewest < 2:
        raise UserError(
            f"The classifier needs at least two rows to forget and two to keep; there are {len(forget)} and {len(benign)}."
        )
    every, y = [*forget, *benign], np.repeat([1, 0], [len(forget), len(benign)])
    all_of = [*(whole or [False] * len(forget)), *[True] * len(benign)]
    learnt = [
        [spread(windows) if all_ else windows[:1] for windows in looks]
        for looks, all_ in zip(every, all_of, strict=True)
    ]
    made = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))

    def fitted(chosen: NDArray[np.intp]) -> tuple[Array, Array]:
        weights, biases = [], []
        for windows in zip(*(learnt[i] for i in chosen), strict=True):
            made.fit(np.concatenate(windows).astype(np.float64), np.repeat(y[chosen], [*map(len, windows)]))
            scaler, regression = made.steps[0][1], made.steps[1][1]
            weights.append(regression.coef_[0] / scaler.scale_)
            biases.append(regression.intercept_[0] - scaler.mean_ @ weights[-1])
        return np.stack(weights), np.array(biases)

    left_out = np.zeros(len(y))
    folds = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    for rest, out in progress(folds.split(y, y), total=folds.n_splits, label="classifier"):
        left_out[out] = likeliest(*fitted(rest), [every[i] for i in out])
    harmless = np.sort(left_out[y == 0])[::-1]
    chosen = max(threshold, float(harmless[min(int(false_alarms * len(harmless)), len(harmless) - 1)]))
    return Fitted(*fitted(np.arange(len(y))), chosen, left_out[y == 1] > chosen, left_out[y == 0] > chosen)


def measure(
    tokenizer: Any,
    forget: Sequence[Example],
    retain: Sequence[Example],
    unseen: Mapping[str, Sequence[Example]],
    limit: int | None,
    recognises: Callable[[Sequence[list[int]]], NDArray[np.bool_]],
) -> dict[str, Any]:
    """Ask a classifier what it was not fitted with, and print what it recognises: wordings, and kinds of ordinary text.

    Args:
        tokenizer: of the model.
        forget, retain: rows, some of which are asked in each wording of `rewording.to_measure`.
        unseen: passages of kinds that no fit sees.
        limit: longest prompt, in tokens.
        recognises: tells of prompts, which it takes for those to forget.

    Returns:
        `caught`: by wording, the `share` of forget prompts recognised, and of how many `prompts`. `false_alarms`: `share`, its
        `interval` (Wilson, 95 %) and `prompts`, of ordinary passages and retain rows in these wordings.
    """
    wordings, kept = (
        {
            name: fitting(tokenizer, asked, limit)
            for name, asked in rewording.to_measure(rows, unseen).items()
            if name != rewording.AS_GIVEN
        }
        for rows in (forget, retain)
    )
    others = prompts_of(tokenizer, [row for rows in unseen.values() for row in rows], limit)
    others += [prompt for prompts in kept.values() for prompt in prompts]
    flags = iter(recognises([*(prompt for prompts in wordings.values() for prompt in prompts), *others]).tolist())
    caught = {
        name: {"share": sum(itertools.islice(flags, len(prompts))) / len(prompts), "prompts": len(prompts)}
        for name, prompts in wordings.items()
        if prompts
    }
    if caught:
        shares = ", ".join(f"{name} {found['share']:.0%}" for name, found in caught.items())
        most = max(found["prompts"] for found in caught.values())
        show(f"classifier: in wordings that it was not fitted with it recognises, of {most}: {shares}", stderr=True)
    if not others:
        return {"caught": caught, "false_alarms": {"share": None, "interval": None, "prompts": 0}}
    alarms = sum(flags)
    interval = metrics.samples.share_interval(alarms, len(others))
    show(
        f"classifier: of {len(others)} other prompts of kinds and wordings that it was not fitted with, "
        f"{alarms / len(others):.1%} (95 % interval {interval[0]:.1%} to {interval[1]:.1%})",
        stderr=True,
    )
    found_alarms = {"share": alarms / len(others), "interval": list(interval), "prompts": len(others)}
    return {"caught": caught, "false_alarms": found_alarms}
