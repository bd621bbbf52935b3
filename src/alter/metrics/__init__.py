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

from alter.metrics.catalogue import CATALOGUE
from alter.metrics.choices import multiple_choice
from alter.metrics.completeness import unlearning_completeness
from alter.metrics.entropies import bimodality_coefficient, stability, two_normals
from alter.metrics.likelihood import (
    average_loss,
    closeness_to_one,
    forget_quality,
    model_utility,
    normalised_probability,
    perplexity,
    probability,
    truth_ratio,
    truthfulness,
)
from alter.metrics.membership import (
    auc,
    mia_gradnorm,
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_reference,
    mia_zlib,
    min_k,
    privleak,
)
from alter.metrics.memorisation import exact_memorization, extraction_strength
from alter.metrics.recovery import linear_cka, recovered_fraction, recovered_interval
from alter.metrics.samples import (
    auc_interval,
    bootstrap_interval,
    leak_at_k,
    row_interval,
    share_interval,
    utility_interval,
)
from alter.metrics.text import asg, bleu, corpus_bleu, distinct_n, repetition, rouge_l

__all__ = [
    "CATALOGUE",
    "asg",
    "auc",
    "auc_interval",
    "average_loss",
    "bimodality_coefficient",
    "bleu",
    "bootstrap_interval",
    "closeness_to_one",
    "corpus_bleu",
    "distinct_n",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "leak_at_k",
    "linear_cka",
    "mia_gradnorm",
    "mia_loss",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "mia_reference",
    "mia_zlib",
    "min_k",
    "model_utility",
    "multiple_choice",
    "normalised_probability",
    "perplexity",
    "privleak",
    "probability",
    "recovered_fraction",
    "recovered_interval",
    "repetition",
    "rouge_l",
    "row_interval",
    "share_interval",
    "stability",
    "truth_ratio",
    "truthfulness",
    "two_normals",
    "unlearning_completeness",
    "utility_interval",
]
