"""Metrics of unlearning: arrays in, numbers out. No model and no tokeniser is touched here.

Conventions, as in TOFU (Maini et al. 2024, arXiv:2401.06121) and OpenUnlearning (Dorna et al. 2025,
arXiv:2506.12618): `a` is the sequence of labelled tokens of a row (the answer and its end-of-sequence token), `a'` is
`a` without its last token; log-probabilities are natural logs of the probability that the model gives the label;
everything here is float64.

Where the definition and the tool that everyone compares with differ, `compat=True` gives the tool's number and
`compat=False` (called strict) the definition's. The differences, all of them:

==========================  ====================================================  =================================
metric                      strict                                                compat
==========================  ====================================================  =================================
truth ratio, normalised     no epsilon, computed from the losses                  1e-10 in each denominator
probability, PrivLeak
extraction strength         a row whose last token is wrong scores 0              it scores 1/n'
MIA loss, zlib, reference   over the text, a'                                     over a, the end token included
PrivLeak without reference  refused                                               0.5 is taken
empty rows in an attack     refused                                               0 is taken
==========================  ====================================================  =================================

Average loss and probability are over `a` in both: that is how TOFU defines them. The gradient's norm is the same in both
and refuses empty rows; the tool has the model in training mode for it, which only a model with dropout would notice.

What takes long to import (SciPy's statistics, ROUGE, BLEU) is imported by the functions that need it.
"""

from __future__ import annotations

from alter.metrics import (
    catalogue,
    choices,
    completeness,
    entropies,
    likelihood,
    membership,
    memorisation,
    recovery,
    samples,
    text,
)
from alter.metrics.catalogue import CATALOGUE

__all__ = [
    "CATALOGUE",
    "catalogue",
    "choices",
    "completeness",
    "entropies",
    "likelihood",
    "membership",
    "memorisation",
    "recovery",
    "samples",
    "text",
]
