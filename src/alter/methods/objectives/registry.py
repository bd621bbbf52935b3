"""Registries of the objectives that a recipe may name, open to plugins (`alter.plugins`)."""

from __future__ import annotations

from typing import Annotated

from alter.methods.objectives.answers import PreferInvented, PreferRefusal, RandomLabels, Refuse, Substitute
from alter.methods.objectives.base import Objective
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
from alter.plugins import OneOf, Registry, kinds

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
