"""Own rows: what a model knows of them before and after forgetting, and the verdict.

Before and after are of the same rows: the untouched model is the base with the adapter off, or the model named as
`before`. A row with a question is answered greedily; a plain text is continued from its first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from alter import metrics
from alter.core.console import show
from alter.core.errors import UserError
from alter.core.files import digest
from alter.core.records import Record
from alter.data.encoding import encode_all
from alter.data.examples import Example, check_overlap, load_examples
from alter.evaluation import others
from alter.evaluation.base import Evaluation
from alter.evaluation.leakage import Leak, Leaked, ask, leaked
from alter.evaluation.verdict import SLACK, Measures, Verdict, judge
from alter.models.generation import generate
from alter.models.loading import Subject
from alter.models.scoring import context_length, score

WORST = 3
"""Rows that are shown of those that were forgotten least."""


@dataclass(frozen=True)
class Answered:
    """What was measured of some rows: the figures, and the rows that were answered with what was said.

    Attributes:
        measures: the figures.
        exact: share of the answer's tokens that are the likeliest, of each scored row, [n].
        examples: the answered rows, [m]; `probability` is theirs.
        questions, truths, replies: their texts, [m].
    """

    measures: Measures
    exact: npt.NDArray[np.float64]
    examples: list[Example]
    probability: npt.NDArray[np.float64]
    questions: list[str]
    truths: list[str]
    replies: list[str]

    def summary(self) -> dict[str, Any]:
        """Return the figures without any text: those of the measures, and the exact memorisation."""
        known = self.exact[~np.isnan(self.exact)]
        return {**self.measures.summary(), "exact_memorization": float(known.mean()) if known.size else None}


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    answers: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 200,
    batch_tokens: int | None = None,
    batch_size: int = 64,
    label: str = "rows",
) -> Answered:
    """Return what a model knows of rows: one forward for each, and greedy replies to some of them.

    Args:
        model, tokenizer: as in `alter.models.scoring.score`.
        rows: one or more; those longer than the model's context are scored in overlapping windows, and answered or
            continued where prompt and reply fit into it.
        answers: number of rows that are answered, drawn by `seed`; None: all, 0: none.
        max_new_tokens: longest reply; no reply is longer than twice the longest answer, which is said.
        batch_tokens, batch_size: of scoring and of generation.
        label: of the progress bar.

    Raises:
        UserError: a row without anything to score, or what scoring and generating raise.
    """
    limit = context_length(model)
    windows, owner = encode_all(tokenizer, rows, max_length=limit)
    scores = score(
        model, windows, pad_token_id=tokenizer.pad_token_id, batch_tokens=batch_tokens, label=f"{label}: scoring"
    )
    # each labelled token is labelled in one window
    parts: list[list[int]] = [[] for _ in rows]
    for k, number in enumerate(owner):
        parts[number].append(k)
    logprob = [np.concatenate([scores.logprob[k] for k in own]) for own in parts]
    correct = [np.concatenate([scores.correct[k] for k in own]) for own in parts]
    encoded = [windows[own[0]] for own in parts]
    probability = metrics.probability(metrics.average_loss(logprob))
    chosen = np.random.default_rng(seed).permutation(len(rows))[: len(rows) if answers is None else answers]
    prompts: list[list[int]] = []
    questions: list[str] = []
    truths: list[str] = []
    taken: list[int] = []
    longest = 1
    for i in sorted(chosen.tolist()):
        asked = ask(tokenizer, rows[i], encoded[i].input_ids, max_new_tokens)
        if asked is None:
            continue
        prompts.append(asked.prompt)
        questions.append(asked.question)
        truths.append(asked.truth)
        longest = max(longest, asked.length)
        taken.append(i)
    tokens = min(max_new_tokens, 2 * longest)
    if limit is not None:
        fitting = [k for k, ids in enumerate(prompts) if len(ids) + tokens <= limit]
        prompts, taken = [prompts[k] for k in fitting], [taken[k] for k in fitting]
        questions, truths = [questions[k] for k in fitting], [truths[k] for k in fitting]
    replies = (
        generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=tokens,
            batch_size=batch_size,
            expected_lengths=[len(truth) for truth in truths],
            label=f"{label}: answering",
        )
        if prompts
        else []
    )
    return Answered(
        Measures.of(probability, questions, truths, replies),
        metrics.exact_memorization(correct),
        [rows[i] for i in taken],
        probability[taken],
        questions,
        truths,
        replies,
    )


# The benchmark -------------------------------------------------------------------------------------------------------


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
    """The model before forgetting; by default --model without the adapter."""
    answers: int = Field(400, ge=0)
    """Rows of each set to answer, drawn by the seed; all are scored."""
    max_new_tokens: int = Field(200, ge=1)
    """Longest reply, in tokens."""
    texts: bool = True
    """Keep questions, true answers and replies in the records. They hold what was to be forgotten."""
    leak: Leak = Field(default_factory=Leak)
    """Leakage over many samples of the rows to forget: leak@k."""

    @property
    def subject(self) -> str:
        """What the records call the model: one that is measured beside `before` is the unlearned one."""
        return self.name or ("unlearned" if self.adapter or self.before else "original")

    def title(self) -> str:
        return f"Rows of {self.forget}"

    def data_digest(self) -> str | None:
        sets = self._sets()
        if self.holdout is not None:
            _apart(sets)
        references = []
        for name in (self.before, self.retrained):
            identity = None if name is None else Subject(model=name).identity()
            if identity is not None and "unknown" in identity.values():
                return None
            references.append(identity)
        content = {
            name: [[row.prompt, row.answer, list(row.messages), row.kind] for row in rows]
            for name, rows in sets.items()
        }
        judge = self.leak.content()
        return None if judge is None else digest(content, references, judge)

    def _sets(self) -> dict[str, list[Example]]:
        """The rows to measure, by set, each cut to `limit`.

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
        return found

    def _people(self) -> frozenset[tuple[str, ...]]:
        """Names in the questions of all rows to forget and to keep."""
        rows = load_examples(self.forget) + ([] if self.retain is None else load_examples(self.retain))
        return others.people(row.prompt for row in rows if row.prompt is not None)

    def _drawn(self, rows: list[Example], most: int | None = None) -> list[Example]:
        count = min(len(rows), *(each for each in (self.limit, most) if each is not None), len(rows))
        chosen = np.random.default_rng(self.seed).permutation(len(rows))[:count]
        return [rows[i] for i in sorted(chosen.tolist())]

    def _measure(self, model: Any, tokenizer: Any, sets: Mapping[str, list[Example]], of: str) -> dict[str, Answered]:
        return {
            name: measure(
                model,
                tokenizer,
                rows,
                answers=self.answers,
                seed=self.seed,
                max_new_tokens=self.max_new_tokens,
                batch_tokens=self.batch_tokens,
                batch_size=self.batch_size,
                label=f"{of}, {name}",
            )
            for name, rows in sets.items()
        }

    @contextmanager
    def _untouched(self, model: Any, tokenizer: Any) -> Iterator[tuple[Any, Any] | None]:
        """The model before forgetting; None where there is no other than the one measured."""
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
        sets = self._sets()
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
            closed = closing_facts(found, before, after, reference, self.texts, self._people())
            if leaks:
                closed["leak"] = {name: each.summary() for name, each in leaks.items()}
        records = []
        if before is not None:
            records += self._records("original", before, told)
        if self.retrained is not None and reference is not None:
            records += self._records("retrained", {"forget": reference}, told)
        records += self._records(self.subject, after, told | ({} if closed is None else {"closing": closed}))
        for of, name in (("before", "original"), ("retrained", "retrained"), ("after", self.subject)):
            if of in leaks:
                records += leaks[of].records(name, told)
        return records

    def _leaks(self, model: Any, tokenizer: Any, sets: Mapping[str, list[Example]], of: str) -> dict[str, Leaked]:
        if not self.leak.samples:
            return {}
        return {of: leaked(model, tokenizer, sets["forget"], self.leak, seed=self.seed, label=of)}

    def _records(self, name: str, found: Mapping[str, Answered], extra: dict[str, Any]) -> list[Record]:
        out: list[Record] = []
        for part, answered in found.items():
            own = answered.measures
            m, told = len(own.recall), own.asked
            texts = {"questions": answered.questions, "references": answered.truths, "generations": answered.replies}
            plain = {key: value for key, value in extra.items() if key != "closing"}
            head = extra if part == "forget" else plain
            broken = np.array([a or b for a, b in zip(own.broken, own.empty, strict=True)], dtype=np.float64)
            # None: there is no telling, which JSON writes as null and reads as NaN
            said = np.array([np.nan if value is None else float(value) for value in own.said])
            for metric, values, n, more in (
                ("probability", own.probability, int(own.probability.size), head),
                ("exact_memorization", answered.exact, int((~np.isnan(answered.exact)).sum()), plain),
                ("rouge", own.recall, m, plain | (texts if self.texts else {})),
                ("said", said, told, plain),
                ("unusable", broken, m, plain),
                ("repetition", own.repetition, m, plain),
            ):
                if n:
                    better = metrics.CATALOGUE[f"{part}_{metric}"].higher_is_better
                    value = float(np.nanmean(values))
                    items = [float(x) for x in values]
                    out.append(Record(name, f"{part}_{metric}", value, n, "strict", better, items, more))
        return out


def _apart(sets: Mapping[str, list[Example]]) -> None:
    """Refuse a holdout with rows that were to be forgotten or kept.

    Raises:
        UserError: names the rows.
    """
    for name in ("forget", "retain"):
        try:
            check_overlap(sets["holdout"], sets.get(name, []))
        except UserError as error:
            raise UserError(f"The holdout must be rows that the model never saw. {error}") from None


# The end of a run ----------------------------------------------------------------------------------------------------


def closing_facts(
    found: Verdict,
    before: Mapping[str, Answered],
    after: Mapping[str, Answered],
    reference: Answered | None,
    texts: bool,
    people: frozenset[tuple[str, ...]] = frozenset(),
) -> dict[str, Any]:
    """Return what `closing_table` shows, as JSON takes it: verdict, figures, and the rows that were forgotten least.

    With `people`, the names that rows are about, replies that name somebody else are counted (`others`).
    """

    def summary(part: Answered) -> dict[str, Any]:
        told = others.count(part.questions, part.truths, part.replies, people) if people else None
        return {**part.summary(), "others": told}

    forget = after["forget"]
    order = sorted(
        range(len(forget.replies)),
        key=lambda i: (forget.measures.said[i] is not True, -forget.measures.recall[i], -forget.probability[i], i),
    )
    rows = [
        {
            "row": forget.examples[i].index,
            "recall": float(forget.measures.recall[i]),
            "probability": float(forget.probability[i]),
            "said": forget.measures.said[i],
            **(
                {"question": forget.questions[i], "truth": forget.truths[i], "reply": forget.replies[i]}
                if texts
                else {}
            ),
        }
        for i in order[:WORST]
    ]
    return {
        "verdict": found.to_dict(),
        "before": {name: summary(part) for name, part in before.items()},
        "after": {name: summary(part) for name, part in after.items()},
        "reference": None if reference is None else summary(reference),
        "worst": rows,
    }


def others_named(closed: Mapping[str, Any]) -> str | None:
    """Say that replies name somebody else where they did not before, as far as `closing_facts` knows; or None."""
    was, now = (closed.get(when, {}).get("forget", {}) for when in ("before", "after"))
    if not now.get("others") or now["others"] <= was["others"] + SLACK * now["n_answers"]:
        return None
    return (
        f"{now['others']} of {now['n_answers']} replies name somebody else of whom the rows speak, {was['others']} before: "
        "new statements about others, which may be false."
    )


def closing_of(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return what `RowsEvaluation` kept of the verdict in its records, or None where nothing was compared."""
    return next((record.extra["closing"] for record in records if "closing" in record.extra), None)


FIGURES = {
    "probability": "probability of the true answers",
    "rouge": "ROUGE-L recall of the replies",
    "said": "replies that give the answer",
    "repetition": "repetition within a reply",
    "broken": "broken replies",
    "empty": "empty replies",
    "others": "replies that name somebody else",
}
STYLES = {"forgotten": "bold green", "not forgotten": "bold red", "collapsed": "bold red", "unproven": "bold yellow"}


def _shown(figures: Mapping[str, Any] | None, name: str) -> str:
    if figures is None or figures.get(name) is None:
        return "-"
    if name in ("said", "broken", "empty", "others"):
        return f"{figures[name]} of {figures['n_said' if name == 'said' else 'n_answers']}"
    return f"{figures[name]:.3f}"


def closing_table(closed: Mapping[str, Any], commands: Sequence[str] = ()) -> Group:
    """Return the end of a run for a terminal of 80 columns: figures before and after, worst rows, verdict, what is next."""
    table = Table(title="Before and after")
    reference = closed["reference"]
    for column in ("", "before", "after", *(["reference"] if reference else [])):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for part, title in (("forget", "to forget"), ("retain", "to keep"), ("holdout", "never seen")):
        was, now = closed["before"].get(part), closed["after"].get(part)
        if was is None:
            continue
        table.add_row(Text(f"{title} ({was['n']} rows, {was['n_answers']} answered)", style="bold"))
        for name, meaning in FIGURES.items():
            other = [_shown(reference if part == "forget" else None, name)] if reference else []
            table.add_row(f"  {meaning}", _shown(was, name), _shown(now, name), *other)
    parts: list[Any] = [table]
    if closed.get("leak"):
        parts.append(leak_table(closed["leak"]))
    if closed["worst"]:
        parts.append(Text("\nForgotten least:"))
    for row in closed["worst"]:
        head = f"row {row['row']}: recall {row['recall']:.2f}, probability {row['probability']:.3f}"
        parts.append(Text(f"  {head}{', gives the answer' if row['said'] else ''}", style="dim"))
        for name in ("question", "truth", "reply"):
            if name in row:
                parts.append(Text(f"    {name}: {' '.join(str(row[name]).split())[:200] or '(empty)'}"))
    found = closed["verdict"]
    parts.append(Text(f"\n{found['word'].upper()}.", style=STYLES[found["word"]]))
    parts += [Text(sentence) for sentence in found["why"]]
    named = others_named(closed)
    if named is not None:
        refusal = "--objective.kind refuse --experts-only --least-steps 120 --learning-rate-experts 0.01"
        parts.append(Text(f"{named} A refusal as the target avoids them: {refusal}", style="yellow"))
    if commands:
        parts.append(Text("\nNext:"))
        parts += [Text(f"  {command}", overflow="fold") for command in commands]
    return Group(*parts)


def leak_table(leaks: Mapping[str, Any]) -> Table:
    """Return leak@k with its 95 % intervals, a row for each k and a column for each model."""
    names = [name for name in ("before", "after", "retrained") if name in leaks]
    settings, asked = leaks[names[0]]["settings"], leaks[names[0]]["questions"]
    table = Table(title=f"leak@k: one of k samples gives the answer (by {settings['hit']['kind']})")
    table.add_column("k", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for k in leaks[names[0]]["at"]:
        cells = []
        for name in names:
            found = leaks[name]["at"][k]
            low_high = found["interval"]
            cells.append(f"{found['value']:.3f}" + ("" if low_high is None else " [{:.2f}, {:.2f}]".format(*low_high)))
        table.add_row(k, *cells)
    unknown = leaks[names[0]]["unknown"]
    table.caption = f"{asked} questions, {settings['samples']} samples of each; in brackets the 95 % interval" + (
        f"; {unknown} more have no facts to look for" if unknown else ""
    )
    return table


def show_closing(closed: Mapping[str, Any], commands: Sequence[str] = ()) -> None:
    """Print `closing_table`."""
    show(closing_table(closed, commands), highlight=False)
