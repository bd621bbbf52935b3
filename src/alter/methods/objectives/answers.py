"""Objectives that train another answer for the forget rows: a refusal, an invented answer, random labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from alter.methods.objectives.base import Needs, Objective, Writing
from alter.methods.objectives.tokens import Emitted, Labelled, mean_or_zero, true_and_runner_up
from alter.settings import Tokens

if TYPE_CHECKING:
    from torch import Tensor


def learn_alternative(tokens: Labelled) -> Tensor:
    """Return the mean cross-entropy of the alternative answers."""
    assert tokens.alternative is not None
    return tokens.alternative.mean()


class PreferRefusal(Objective):
    """DPO with a refusal as the preferred answer (IdkDPO; Rafailov et al. 2023, arXiv:2305.18290; Maini et al. 2024, arXiv:2401.06121).

    -(2 / beta) mean over rows of log sigmoid(beta ((NLL_base - NLL of the refusal) - (NLL_base - NLL of the answer))),
    NLL summed over each row's labelled tokens. One refusal per row, drawn with the run's seed (a reading: TOFU draws
    anew each time, for which no reference could be kept).
    """

    kind: Literal["prefer_refusal"] = "prefer_refusal"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")

    @property
    def needs(self) -> Needs:
        return Needs(base_logp=True, alternative="refusal")

    def __call__(self, tokens: Labelled) -> Tensor:
        other = tokens.alternative
        assert other is not None
        assert other.base_logp is not None
        assert tokens.base_logp is not None
        change = tokens.row_sums(tokens.values + tokens.base_logp)
        preferred = other.row_sums(other.values + other.base_logp)
        return -2 / self.beta * mean_or_zero(torch.nn.functional.logsigmoid(self.beta * (change - preferred)))


class PreferInvented(PreferRefusal):
    """AltPO (Mekala et al. 2024, arXiv:2409.13474, Eq. 3): DPO with an answer that the model itself has made up.

    The loss is `PreferRefusal`'s; instead of a refusal, the preferred answer is another plausible one: the row's own column
    `substitute`, else what the base samples when it is asked to change all facts (`alter.groundwork.invented`). One for each
    row (the authors draw five and pass over each of them).
    """

    kind: Literal["prefer_invented"] = "prefer_invented"  # type: ignore[assignment]
    new_tokens: Tokens = Field(200, ge=1, description="Longest answer that is made up.")

    @property
    def needs(self) -> Needs:
        return Needs(base_logp=True, alternative="invented", writing=Writing(self.new_tokens))


class Refuse(Objective):
    """Cross-entropy of a refusal in place of each forget row's answer (IDK, Maini et al. 2024; O3's wrong answers).

    Refusals and retain rows are one batch with one mean over tokens, as in TOFU, so a refusal, which is short, weighs
    less than an answer.
    """

    kind: Literal["refuse"] = "refuse"
    joint: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(rows=False, alternative="refusal")

    def __call__(self, tokens: Labelled) -> Tensor:
        return learn_alternative(tokens)


class Substitute(Objective):
    """Cross-entropy of the answer in the row's column `substitute`, and a stopped hinge on the answer itself.

    Mean negative log-likelihood of the substitute + `hinge` times the mean over low-entropy tokens of the row's own answer
    of max(0, p(y) - max_{v != y} p(v)). `alter forget` writes rows with that column: what the model says of an invented
    subject. With `spare` the hinge leaves out tokens that the row's prompt has as well, such as the subject's name: they tell
    nothing, and the substitute has them too, so one term would make less likely what the other one makes more likely.
    """

    kind: Literal["substitute"] = "substitute"
    hinge: float = Field(1.0, ge=0.0, description="Weight of the stopped hinge on the answer itself.")
    only_low: bool = Field(True, description="Count low-entropy tokens of the answer only.")
    spare: bool = Field(False, description="Leave tokens of the answer that its prompt has as well out of the hinge.")

    @property
    def needs(self) -> Needs:
        return Needs(runner_up=True, alternative="substitute", entropy=self.only_low, asked=self.spare)

    def __call__(self, tokens: Labelled) -> Tensor:
        left_out = tokens.high & self.only_low
        if self.spare:
            assert tokens.asked is not None
            left_out = left_out | tokens.asked
        return learn_alternative(tokens) + self.hinge * mean_or_zero(tokens.values[~left_out])

    def per_token(self, emitted: Emitted) -> Tensor:
        true, other = true_and_runner_up(emitted)
        return torch.nn.functional.relu(true - other)


class RandomLabels(Objective):
    """Cross-entropy of labels drawn uniformly from the vocabulary, once for the run (Yao et al. 2024, arXiv:2402.15159).

    The context stays the true text, and special tokens keep their own label.
    """

    kind: Literal["random_labels"] = "random_labels"
    needs: ClassVar[Needs] = Needs(rows=False, alternative="random_labels")

    def __call__(self, tokens: Labelled) -> Tensor:
        return learn_alternative(tokens)
