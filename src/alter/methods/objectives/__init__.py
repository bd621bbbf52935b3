"""Objectives on forget and on retain rows: one final class each, tensors in, scalar out.

Each class is at once the settings of the objective (a pydantic model whose `kind` names it in a recipe), what it needs
besides the model's logits (`needs`), and the two functions that compute it: `per_token` makes one number of each token's
logits, which exist for a few tokens at a time; the objective itself makes the loss of these numbers. `FORGET`
and `RETAIN` are the registries of what a recipe may name, open to plugins (`alter.plugins`).
"""

from __future__ import annotations

from typing import Annotated

from alter.methods.objectives.answers import PreferInvented, PreferRefusal, RandomLabels, Refuse, Substitute
from alter.methods.objectives.base import Needs, Objective, Writing
from alter.methods.objectives.hidden import Deviate, KeepHidden, Misdirect, Redirect, UnknownCode
from alter.methods.objectives.likelihood import (
    NPO,
    Catnip,
    CrossEntropyUnlearning,
    FlattenLogits,
    GradientAscent,
    InvertedHinge,
    Learn,
    NoForget,
    SaturationImportance,
    SimNPO,
    StoppedHinge,
    WeightedAscent,
)
from alter.methods.objectives.retain import (
    Adaptive,
    Constrained,
    CrossEntropy,
    Distil,
    KeepBase,
    KeepBaseAnswers,
    NoRetain,
    Uniform,
)
from alter.methods.objectives.targets import Duet, Persona, PushPull, Reinforced, Undial, WithoutTruth
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
from alter.plugins import OneOf, Registry, kinds

__all__ = [
    "FORGET",
    "NPO",
    "RETAIN",
    "Adaptive",
    "Catnip",
    "Codes",
    "Constrained",
    "CrossEntropy",
    "CrossEntropyUnlearning",
    "Deviate",
    "Distil",
    "Duet",
    "Emitted",
    "FlattenLogits",
    "Forget",
    "GradientAscent",
    "Hidden",
    "InvertedHinge",
    "KeepBase",
    "KeepBaseAnswers",
    "KeepHidden",
    "Labelled",
    "Learn",
    "Misdirect",
    "Needs",
    "NoForget",
    "NoRetain",
    "Objective",
    "Persona",
    "PreferInvented",
    "PreferRefusal",
    "PushPull",
    "RandomLabels",
    "Redirect",
    "Reference",
    "Refuse",
    "Reinforced",
    "Retain",
    "SaturationImportance",
    "SimNPO",
    "StoppedHinge",
    "Substitute",
    "Undial",
    "Uniform",
    "UnknownCode",
    "WeightedAscent",
    "WithoutTruth",
    "Writing",
    "divergence",
    "mean_or_zero",
    "row_means",
    "soft_cross_entropy",
    "true_and_runner_up",
]

FORGET: Registry[type[Objective]] = Registry(
    "objective",
    kinds(
        InvertedHinge,
        StoppedHinge,
        GradientAscent,
        WithoutTruth,
        CrossEntropyUnlearning,
        WeightedAscent,
        SaturationImportance,
        NPO,
        SimNPO,
        Catnip,
        FlattenLogits,
        Duet,
        PushPull,
        PreferRefusal,
        PreferInvented,
        Refuse,
        Substitute,
        RandomLabels,
        Undial,
        Learn,
        Reinforced,
        Persona,
        Misdirect,
        Deviate,
        Redirect,
        UnknownCode,
        NoForget,
    ),
)
"""Objectives on forget rows by kind."""

RETAIN: Registry[type[Objective]] = Registry(
    "retain objective",
    kinds(
        CrossEntropy,
        KeepBase,
        KeepBaseAnswers,
        KeepHidden,
        Distil,
        Uniform,
        Adaptive,
        Constrained,
        Duet,
        PushPull,
        NoRetain,
    ),
)
"""Objectives on retain rows by kind."""

ForgetObjective = Annotated[Objective, OneOf(FORGET)]
RetainObjective = Annotated[Objective, OneOf(RETAIN)]
