"""Objectives on forget and on retain rows: one final class each, tensors in, scalar out.

Each class is at once the settings of the objective (a pydantic model whose `kind` names it in a recipe), what it needs
besides the model's logits (`needs`), and the two functions that compute it: `per_token` makes one number of each token's
logits, which exist for a few tokens at a time; the objective itself makes the loss of these numbers. `FORGET`
and `RETAIN` are the registries of what a recipe may name, open to plugins (`alter.plugins`).
"""

from __future__ import annotations

from alter.methods.objectives.base import Needs, Objective, Writing
from alter.methods.objectives.hidden import Redirect, UnknownCode
from alter.methods.objectives.likelihood import InvertedHinge
from alter.methods.objectives.registry import FORGET, RETAIN, ForgetObjective, RetainObjective
from alter.methods.objectives.retain import CrossEntropy
from alter.methods.objectives.tokens import (
    Codes,
    Emitted,
    Hidden,
    Labelled,
    Reference,
    divergence,
    mean_or_zero,
    row_means,
    soft_cross_entropy,
    true_and_runner_up,
)

__all__ = [
    "FORGET",
    "RETAIN",
    "Codes",
    "CrossEntropy",
    "Emitted",
    "ForgetObjective",
    "Hidden",
    "InvertedHinge",
    "Labelled",
    "Needs",
    "Objective",
    "Redirect",
    "Reference",
    "RetainObjective",
    "UnknownCode",
    "Writing",
    "divergence",
    "mean_or_zero",
    "row_means",
    "soft_cross_entropy",
    "true_and_runner_up",
]
