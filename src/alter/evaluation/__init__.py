"""Benchmarks and the verdict: what a model knows, before and after.

A benchmark is a file and a subclass of `base.Evaluation`: `tofu`, `muse`, `book`, `rwku`, `lume`, `knowundo`,
`fluency`, `rows`, and WMDP, MMLU and others through `harness`. `answered` measures rows, `giving` and `others` read
replies, `leakage` samples them, `ordinary` is the cost on other text, `judge` a language model that grades. `verdict`
says whether it was forgotten, `told` and `closing` how that is shown; `run` holds `alter evaluate` and its kin,
`entropies` what `alter entropy` measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.evaluation.added import ADDED as ADDED
    from alter.evaluation.added import added_to as added_to
    from alter.evaluation.added import check_added as check_added
    from alter.evaluation.added import with_added as with_added
    from alter.evaluation.answered import Answered as Answered
    from alter.evaluation.answered import answer_rows as answer_rows
    from alter.evaluation.base import Evaluation as Evaluation
    from alter.evaluation.closing import FIGURES as FIGURES
    from alter.evaluation.closing import closing_facts as closing_facts
    from alter.evaluation.closing import closing_of as closing_of
    from alter.evaluation.closing import others_named as others_named
    from alter.evaluation.closing import show_closing as show_closing
    from alter.evaluation.figures import Figures as Figures
    from alter.evaluation.figures import Groups as Groups
    from alter.evaluation.figures import metric_record as metric_record
    from alter.evaluation.fluency import alone as alone
    from alter.evaluation.giving import broken as broken
    from alter.evaluation.giving import gives as gives
    from alter.evaluation.leakage import Leak as Leak
    from alter.evaluation.leakage import leaked as leaked
    from alter.evaluation.measures import Measures as Measures
    from alter.evaluation.measures import mean_interval as mean_interval
    from alter.evaluation.measures import unit_interval as unit_interval
    from alter.evaluation.ordinary import ordinary_loss as ordinary_loss
    from alter.evaluation.ordinary import ordinary_sentence as ordinary_sentence
    from alter.evaluation.others import people as people
    from alter.evaluation.rows import RowsEvaluation as RowsEvaluation
    from alter.evaluation.run import evaluate as evaluate
    from alter.evaluation.run import measured as measured
    from alter.evaluation.run import show_records as show_records
    from alter.evaluation.tofu.benchmark import TofuEvaluation as TofuEvaluation
    from alter.evaluation.tofu.measuring import tofu_metrics as tofu_metrics
    from alter.evaluation.tofu.measuring import tofu_metrics_beside_base as tofu_metrics_beside_base
    from alter.evaluation.tofu.reference import read_reference as read_reference
    from alter.evaluation.tofu.results import TofuReference as TofuReference
    from alter.evaluation.tofu.results import TofuResult as TofuResult
    from alter.evaluation.tofu.sets import SETS as SETS
    from alter.evaluation.tofu.sets import rows_fingerprint as rows_fingerprint
    from alter.evaluation.verdict import BROKEN as BROKEN
    from alter.evaluation.verdict import FIRM as FIRM
    from alter.evaluation.verdict import GONE as GONE
    from alter.evaluation.verdict import KEPT as KEPT
    from alter.evaluation.verdict import LEAST as LEAST
    from alter.evaluation.verdict import SAID as SAID
    from alter.evaluation.verdict import SLACK as SLACK
    from alter.evaluation.verdict import UNKNOWN as UNKNOWN
    from alter.evaluation.verdict import WORDED as WORDED
    from alter.evaluation.verdict import WORDINGS as WORDINGS
    from alter.evaluation.verdict import Verdict as Verdict
    from alter.evaluation.verdict import Word as Word
    from alter.evaluation.verdict import collapse as collapse
    from alter.evaluation.verdict import refuse_missed as refuse_missed

lazy(globals())
