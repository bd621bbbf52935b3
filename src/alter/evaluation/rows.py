"""Own rows: what a model knows of them before and after forgetting, and the verdict.

Before and after are of the same rows: the untouched model is the base with the adapter off, or the model named as
`before`. A row with a question is answered greedily; a plain text is continued from its first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from pydantic import Field

from alter import metrics
from alter.core import Array, UserError
from alter.data import Example, check_overlap, data_hash, encode, load_examples, row_hash
from alter.evaluation import others
from alter.evaluation.answered import Answered, answer_rows
from alter.evaluation.base import Evaluation, say
from alter.evaluation.closing import closing_facts
from alter.evaluation.figures import Groups, metric_record
from alter.evaluation.knowledge import Contradictions, over_refusal, rates
from alter.evaluation.leakage import Leak, Leaked, leaked
from alter.evaluation.measures import unit_interval
from alter.evaluation.verdict import WORDINGS, judge
from alter.models import ModelSettings
from alter.settings import Rows, Tokens
from alter.storage import Record, cache_folder, digest


class RowsEvaluation(Evaluation):
    """Own rows before and after: probability, ROUGE-L, answers still given, broken replies, and the verdict."""

    benchmark: Literal["rows"] = "rows"
    """The benchmark: rows."""
    forget: str
    """Rows that were to be forgotten: a file, builtin:SPLIT, or a hub id with :SPLIT."""
    retain: str | None = None
    """Rows that were to stay; as many are measured as forget rows, 200 at most."""
    holdout: str | None = None
    """Rows of the same kind that the model never saw: the reference of what not knowing looks like."""
    retrained: str | None = None
    """Model retrained without the forget rows: a better reference than a holdout."""
    before: str | None = None
    """The model before forgetting; by default `model` without the adapter."""
    answers: Rows = Field(400, ge=0)
    """Rows of each set to answer, drawn by the seed; all are scored."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Longest reply, in tokens."""
    texts: bool = True
    """Keep questions, true answers and replies in the records. They hold what was to be forgotten."""
    domain_column: str = "author"
    """Column whose value rows share that are about one subject: 95 % intervals of figures draw such rows together."""
    rates: bool = False
    """Also knowledge forgetting and retention rates (KFR, KRR) of the replies and, with a retrained model, IAM."""
    nli: str | None = None
    """Sequence classifier with a label for contradiction, for the rates: a folder or a hub id."""
    harmless: str | None = None
    """Harmless questions about the topic: how many replies to them refuse (SARR)."""
    leak: Leak = Field(default_factory=Leak)
    """Leakage over many samples of the rows to forget: leak@k."""

    @property
    def label(self) -> str:
        """What the records call the model: one that is measured beside `before` is the unlearned one."""
        return self.name or ("unlearned" if self.adapter or self.before else "original")

    def title(self) -> str:
        return f"Rows of {self.forget}"

    def data_digest(self) -> str | None:
        sets = self._sets()
        if self.holdout is not None:
            _apart(sets)
        references = []
        for name in (self.before, self.retrained, self.nli):
            identity = None if name is None else ModelSettings(model=name).identity()
            if identity is not None and "unknown" in identity.values():
                return None
            references.append(identity)
        content = {
            name: [[row.prompt, row.answer, list(row.messages), row.kind] for row in rows]
            for name, rows in sets.items()
        }
        # a record also says which rows there are, and counts names out of all of them
        whole = data_hash(list(map(row_hash, load_examples(self.forget))))
        judge = self.leak.content()
        return None if judge is None else digest(content, whole, sorted(self._people()), references, judge)

    def _sets(self) -> dict[str, list[Example]]:
        """Return the rows to measure, by set, each cut to `limit`.

        Raises:
            UserError: a source cannot be read, or rows are to be forgotten and kept.
        """
        forget = load_examples(self.forget)
        found = {"forget": self._drawn(forget)}
        if self.retain is not None:
            retain = load_examples(self.retain)
            check_overlap(forget, retain)
            found["retain"] = self._drawn(retain, min(200, max(20, len(found["forget"]))))
        if self.holdout is not None:
            found["holdout"] = self._drawn(load_examples(self.holdout))
        if self.harmless is not None:
            found["harmless"] = self._drawn(_questions(load_examples(self.harmless), self.harmless))
        return found

    def _people(self) -> frozenset[tuple[str, ...]]:
        """Return the names in the questions of all rows to forget and to keep."""
        rows = load_examples(self.forget) + ([] if self.retain is None else load_examples(self.retain))
        return others.people(row.prompt for row in rows if row.prompt is not None)

    def _drawn(self, rows: list[Example], most: int | None = None) -> list[Example]:
        count = min(len(rows), *(each for each in (self.limit, most) if each is not None), len(rows))
        chosen = np.random.default_rng(self.seed).permutation(len(rows))[:count]
        return [rows[i] for i in sorted(chosen.tolist())]

    def _measure(self, model: Any, tokenizer: Any, sets: Mapping[str, list[Example]], of: str) -> dict[str, Answered]:
        return {
            name: answer_rows(
                model,
                tokenizer,
                rows,
                answers=self.answers,
                seed=self.seed,
                max_new_tokens=self.max_new_tokens,
                batch_tokens=self.batch_tokens,
                batch_size=self.batch_size,
                label=f"{of}, {name}",
                wordings=WORDINGS if name == "forget" else (),
            )
            for name, rows in sets.items()
        }

    @contextmanager
    def _untouched(self, model: Any, tokenizer: Any) -> Iterator[tuple[Any, Any] | None]:
        """Return the model before forgetting; None if the measured model has no other to compare with."""
        if self.before is not None:
            yield self.alike(self.before).load()
        elif self.adapter is None:
            yield None
        elif not self.merged and hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield model, tokenizer
        else:
            yield self.alike(self.model).load()

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        if self.retrained is not None:
            _another(self, self.retrained)
        sets = self._sets()
        for name, what in ((self.before, "The model before, {},"), (self.retrained, "The retrained model {}")):
            if name is not None:
                _same_tokens(tokenizer, self.alike(name).load_tokenizer(), sets["forget"], what.format(name))
        judge_of = None if self.nli is None else Contradictions(self.nli, next(model.parameters()).device)
        after = self._measure(model, tokenizer, sets, "after")
        leaks = self._leaks(model, tokenizer, sets, "after")
        before: dict[str, Answered] | None = None
        with self._untouched(model, tokenizer) as other:
            if other is not None:
                before = self._measure(*other, sets, "before")
                leaks |= self._leaks(*other, sets, "before")
        reference, by = None, "holdout"
        if self.retrained is not None:
            other_model = self.alike(self.retrained).load()
            reference, by = self._measure(*other_model, {"forget": sets["forget"]}, "retrained")["forget"], "retrained"
            leaks |= self._leaks(*other_model, sets, "retrained")
        elif before is not None and "holdout" in before:
            # the untouched model's: what it says of rows that it never saw
            reference = before["holdout"]
        told: dict[str, Any] = {"benchmark": "rows", "forget": self.forget}
        closed = None
        if before is not None:
            found = judge(
                before["forget"].measures,
                after["forget"].measures,
                reference=None if reference is None else reference.measures,
                by="retrained model" if by == "retrained" else "holdout",
                kept=(before["retain"].measures, after["retain"].measures) if "retain" in after else None,
            )
            was, now = ({name: own for name, own in each.items() if name != "harmless"} for each in (before, after))
            closed = closing_facts(found, was, now, reference, self.texts, self._people())
            closed["rows"] = data_hash(list(map(row_hash, load_examples(self.forget))))
            if leaks:
                closed["leak"] = {name: each.summary() for name, each in leaks.items()}
        judged = [] if before is None else self._judged("original", before, told, judge_of)
        judged += self._judged(self.label, after, told, judge_of)
        if self.rates and self.retrained is not None and before is not None and reference is not None:
            judged += self._completeness(after["forget"], before["forget"], reference, told)
        if closed is not None and judged:
            closed["judged"] = [
                {
                    "model": each.model,
                    "metric": each.metric,
                    "value": each.value,
                    "n": each.n,
                    "interval": each.extra["interval"],
                }
                for each in judged
            ]
        records = []
        if before is not None:
            records += self._records("original", before, told)
        if self.retrained is not None and reference is not None:
            records += self._records("retrained", {"forget": reference}, told)
        records += self._records(self.label, after, told | ({} if closed is None else {"closing": closed}))
        records += judged
        for of, name in (("before", "original"), ("retrained", "retrained"), ("after", self.label)):
            if of in leaks:
                records += leaks[of].records(name, told)
        return records

    def _leaks(self, model: Any, tokenizer: Any, sets: Mapping[str, list[Example]], of: str) -> dict[str, Leaked]:
        if not self.leak.samples:
            return {}
        return {of: leaked(model, tokenizer, sets["forget"], self.leak, seed=self.seed, label=of)}

    def _judged(
        self, name: str, found: Mapping[str, Answered], extra: dict[str, Any], judge_of: Contradictions | None
    ) -> list[Record]:
        """Compute the judged rates of replies, KFR and KRR, and of refusals, SARR, as far as they are asked for."""
        out = []
        for part, metric in (("forget", "kfr"), ("retain", "krr")):
            if part not in found or not (self.rates or self.nli):
                continue
            own = found[part]
            values = rates(own.questions, own.truths, own.replies, forget=part == "forget", contradictions=judge_of)
            told = int((~np.isnan(values)).sum())
            if told < len(values):
                say(
                    [
                        f"{name}: {len(values) - told} of {len(values)} answers of {part} say nothing that their question does not: left out of {metric}."
                    ]
                )
            if told:
                known = values[~np.isnan(values)]
                groups = self._groups(own.examples)
                more: dict[str, Any] = {"nli": self.nli, "unknown": len(values) - told}
                more["interval"] = _over(values, groups, unit_interval(known))
                out.append(metric_record(name, metric, known.mean(), told, values, groups=groups, extra=extra | more))
        if "harmless" in found:
            own = found["harmless"]
            values = over_refusal(own.replies)
            texts = {"questions": own.questions, "generations": own.replies} if self.texts else {}
            groups = self._groups(own.examples)
            refused: dict[str, Any] = {**texts, "interval": _over(values, groups, unit_interval(values))}
            more = extra | refused
            out.append(metric_record(name, "sarr", values.mean(), len(values), values, groups=groups, extra=more))
        return out

    def _completeness(
        self, after: Answered, before: Answered, reference: Answered, extra: dict[str, Any]
    ) -> list[Record]:
        """Compute IAM of the rows to forget, between the model before and the retrained one.

        Rows that are too few or too alike for it have none, which is said: all else is measured by then.
        """
        try:
            values = metrics.completeness.unlearning_completeness(
                after.measures.probability, before.measures.probability, reference.measures.probability
            )
        except ValueError as error:
            say([f"No {error}."])
            return []
        groups = self._groups(after.rows)
        more = extra | {"interval": _over(values, groups, metrics.samples.row_interval(values))}
        return [metric_record(self.label, "iam", values.mean(), len(values), values, groups=groups, extra=more)]

    def _groups(self, rows: Sequence[Example]) -> Groups | None:
        """Return which rows are about one subject; None where no row says so."""
        return Groups.of(self.domain_column, [row.row.get(self.domain_column) for row in rows])

    def _records(self, name: str, found: Mapping[str, Answered], extra: dict[str, Any]) -> list[Record]:
        out: list[Record] = []
        for part, answered in found.items():
            if part == "harmless":
                continue
            own = answered.measures
            m, told = len(own.recall), own.asked
            texts = {"questions": answered.questions, "references": answered.truths, "generations": answered.replies}
            plain = {key: value for key, value in extra.items() if key != "closing"}
            head = extra if part == "forget" else plain
            broken = np.array([a or b for a, b in zip(own.broken, own.empty, strict=True)], dtype=np.float64)
            # None: there is no telling, which JSON writes as null and reads as NaN
            said = np.array([np.nan if value is None else float(value) for value in own.said])
            scored, replied = self._groups(answered.rows), self._groups(answered.examples)
            for metric, values, n, more in (
                ("probability", own.probability, int(own.probability.size), head),
                ("exact_memorization", answered.exact, int((~np.isnan(answered.exact)).sum()), plain),
                ("rouge", own.recall, m, plain | (texts if self.texts else {})),
                ("said", said, told, plain),
                ("unusable", broken, m, plain),
                ("repetition", own.repetition, m, plain),
            ):
                if n:
                    groups = scored if len(values) == len(answered.rows) else replied
                    mean = np.nanmean(values)
                    out.append(metric_record(name, f"{part}_{metric}", mean, n, values, groups=groups, extra=more))
        return out


def _over(values: Array, groups: Groups | None, plain: tuple[float, float] | None) -> list[float] | None:
    """Return the 95 % interval of the mean over groups, or where there are none the `plain` one over rows."""
    found = plain if groups is None else metrics.samples.grouped_interval(values, groups.numbers)
    return None if found is None else list(found)


def _another(measured: Evaluation, retrained: str) -> None:
    """Refuse as the retrained model the very one that is measured: nothing is ever more than itself.

    Raises:
        UserError: they have the same weights.
    """
    memo = cache_folder(measured.cache)
    own, other = measured.identity(memo), ModelSettings(model=retrained).identity(memo)
    if own == other and "unknown" not in own.values():
        raise UserError(
            f"The retrained model {retrained} has the weights of the model that is measured: it would be compared with itself. Give "
            "one that was trained without the rows, or leave `retrained` out."
        )


def _same_tokens(tokenizer: Any, other: Any, rows: list[Example], what: str) -> None:
    """Refuse to compare with a model that tokenises the rows differently: probabilities per token say nothing of one another.

    Raises:
        UserError: names the model and a row.
    """
    for row in rows:
        if encode(tokenizer, row).input_ids != encode(other, row).input_ids:
            raise UserError(
                f"{what} has another tokenizer or chat template ({row.name} becomes other tokens): its probabilities per token "
                "cannot be compared. Give the model that was unlearned, or one of its kind."
            )


def _questions(rows: list[Example], source: str) -> list[Example]:
    """Refuse rows without a question: a continued text cannot be refused.

    Raises:
        UserError: names the first such row.
    """
    for row in rows:
        if row.kind == "text":
            raise UserError(f"{source}: {row.name} is a plain text; harmless rows are questions with their answers.")
    return rows


def _apart(sets: Mapping[str, list[Example]]) -> None:
    """Refuse a holdout that shares rows with the forget or retain set.

    Raises:
        UserError: names the rows.
    """
    for name in ("forget", "retain"):
        try:
            check_overlap(sets["holdout"], sets.get(name, []))
        except UserError as error:
            raise UserError(f"The holdout must be rows that the model never saw. {error}") from None
