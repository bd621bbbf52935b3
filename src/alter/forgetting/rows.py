"""Rows about a subject: what the model itself says, what it would say of an invented subject, and what to keep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alter.core.errors import UserError
from alter.data.encoding import IGNORE, Encoded, encode
from alter.data.examples import Example, load_examples
from alter.forgetting.facts import CANDIDATE, Fact, candidates, expected, fact_words, holds, place_of, swap, whole
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import (
    CHOICE,
    CLOZE,
    COMPLETIONS,
    EVERY,
    EVERY_PROBE,
    GENERAL,
    GENERAL_PROBES,
    HELD,
    KINDS,
    NAMED,
    REVERSED,
    TEMPLATES,
    Kind,
)
from alter.models.scoring import score

Row = dict[str, Any]

SURE = 0.25
"""Probability that a fact must have where it is surest."""
GAIN = 1.5
"""Nats by which it must be likelier there than with an invented subject."""
LOW_ENTROPY = 1.2
"""Entropy in nats below which a token is one that the model knows: the paper's threshold."""
OWNED = 0.5
"""Share of the answers about a name that must mention the subject or its other names, for the name to be forgotten as well."""
KEPT_EACH = 3
"""Questions about each neighbour whose answers are kept."""
FACT_ROWS = 4
"""Rows that lead up to each fact, at most."""
FACT_TOKENS = 24
"""Longest ending of such a row."""
TWINS = 3
"""Invented subjects that are asked each probe: one that gets the fact as well shows nothing of the subject."""
LEAST_FACTS = 3
"""Facts without which there is nothing to forget."""


@dataclass(frozen=True)
class Material:
    """Everything a run is made of, as rows of JSONL files.

    Attributes:
        forget: question, answer (the model's own), substitute (of an invented subject, with the names put back).
        invented: the questions and answers of `forget` with invented names: what cannot be known, for the watch.
        retain: question and answer (the model's own) that must not change.
        probes: form, prompt, wanted words, the answer before, masks (invented names), and `zero`: whether the answer about
            an invented subject holds a wanted word.
        kept_probes: the same for neighbours and general requests, without twins.
        facts: words the model knows.
    """

    forget: list[Row]
    invented: list[Row]
    retain: list[Row]
    probes: list[Row]
    kept_probes: list[Row]
    facts: list[Row]


def check_name(subject: str) -> None:
    """Refuse what is no name, before any model is loaded.

    Raises:
        UserError: nothing but space or signs, or a whole text.
    """
    if not subject.strip():
        raise UserError('The subject is empty; expected the name of what to forget: alter forget "Harry Potter".')
    if not fact_words(subject) and not re.search(r"[^\W_]", subject):
        raise UserError(
            f'The subject is {subject!r}, expected the name of what to forget: alter forget "Harry Potter".'
        )
    if len(subject) > 100 or "\n" in subject.strip():
        what = f"{len(subject)} characters" if len(subject) > 100 else "several lines"
        raise UserError(
            f"The subject has {what}, expected a name of one line and at most 100 characters: give a text with --document FILE."
        )


def check_uncommon(subject: str, tokenizer: Any, kind: Kind | None) -> None:
    """Refuse a common word without a `kind`, before anything is generated.

    Raises:
        UserError: it is one.
    """
    single = len(tokenizer(f" {subject}", add_special_tokens=False)["input_ids"]) == 1
    if kind is None and (len(subject) < 3 or (subject == subject.lower() and single)):
        raise UserError(
            f"{subject!r} is a common word: what the model says with it is not one subject's, and all text that holds it "
            "would suffer. Give a name that means one thing, or say what is meant with --kind concept."
        )


def guess_kind(model: Any, tokenizer: Any, subject: str) -> Kind:
    """The kind whose phrases the model finds likelier after `SUBJECT is a` than after invented names, by most.

    A phrase's score is log p(phrase | subject) minus its mean over one invented name of each kind; a kind's score is that
    of its best phrase.
    """
    names = [subject, *(TEMPLATES[kind].invented[0] for kind in KINDS)]
    phrases = [(kind, phrase) for kind in KINDS for phrase in TEMPLATES[kind].phrases]
    rows = [fact_row(tokenizer, f"What is {n}?", f"{n} is {article(p)} ", p) for n in names for _, p in phrases]
    found = score(model, rows, pad_token_id=tokenizer.pad_token_id, label="kind of subject").logprob
    sums = np.array([row.sum() for row in found]).reshape(len(names), len(phrases))
    gain = sums[0] - sums[1:].mean(axis=0)
    return max(KINDS, key=lambda kind: max(g for g, (k, _) in zip(gain, phrases, strict=True) if k == kind))


def article(phrase: str) -> str:
    """`a` or `an`."""
    return "an" if phrase[0] in "aeiou" else "a"


def fact_row(tokenizer: Any, prompt: str, start: str, word: str) -> Encoded:
    """Prompt and the beginning of an answer, encoded with labels on the tokens of its last word alone."""
    whole = encode(tokenizer, Example(prompt, start + word, "qa"))
    ids, first = whole.input_ids, whole.prompt_length
    # spaces around the answer's beginning depend on how prompt and answer are joined
    length = len(start.strip())
    place = first
    while place < len(ids) - 2 and len(tokenizer.decode(ids[first : place + 1]).strip()) <= length:
        place += 1
    # the end of the answer is no part of the word
    end = len(ids) - 1
    labels = [IGNORE] * place + ids[place:end] + [IGNORE] * (len(ids) - end)
    return Encoded(ids, labels, place)


def sure_facts(
    model: Any,
    tokenizer: Any,
    found: Sequence[Fact],
    pairs: Sequence[tuple[str, str]],
    subject: str,
    invented: Sequence[str],
) -> list[Fact]:
    """The words that the model is sure of, and because of the subject.

    A word must have the probability `SURE` somewhere. A name must have shown itself by its frequency, or be likelier there
    than with an invented subject by `GAIN`, or twice that where it is rare. Any other word must have shown itself, be
    likelier, and of low entropy: "series" comes with every title.

    Args:
        found: candidates.
        pairs: prompts and answers in which they occur; up to three occurrences of each are looked at.
        invented: names to put in the subject's place, in prompt and answer, where the word is surest.
    """
    rows, places = [], []
    for number, fact in enumerate(found):
        having = [(p, a) for p, a in pairs if holds(a, fact.word)]
        for prompt, answer in having[:: max(1, len(having) // 3)][:3]:
            at = place_of(answer, fact.word)
            places.append((number, prompt, answer[:at], answer[at : at + len(fact.word)]))
            rows.append(fact_row(tokenizer, *places[-1][1:]))
    if not rows:
        return []
    told = score(model, rows, pad_token_id=tokenizer.pad_token_id, moments=True, label="how sure")
    assert told.mean is not None
    sums = [float(row.sum()) for row in told.logprob]
    best: dict[int, int] = {}
    for k, (number, *_) in enumerate(places):
        if number not in best or sums[k] > sums[best[number]]:
            best[number] = k
    best = {number: k for number, k in best.items() if sums[k] >= np.log(SURE)}
    if not best:
        return []
    others = [
        fact_row(tokenizer, swap(prompt, {subject: name}), swap(start, {subject: name}), word)
        for number, k in best.items()
        for _, prompt, start, word in [places[k]]
        for name in invented
    ]
    zero = score(model, others, pad_token_id=tokenizer.pad_token_id, label="whether by the subject").logprob
    mean = np.array([row.sum() for row in zero]).reshape(len(best), -1).mean(axis=1)
    out = []
    for (number, k), there in zip(best.items(), mean, strict=True):
        fact, gain, entropy = found[number], sums[k] - float(there), float(-told.mean[k][0])
        own = gain >= (GAIN if fact.pvalue <= CANDIDATE else 2 * GAIN)
        if (own or fact.shows) if fact.name else own and fact.shows and entropy <= LOW_ENTROPY:
            out.append(replace(fact, entropy=round(entropy, 4), gain=round(gain, 4)))
    return out


def kept_rows(source: str | None) -> list[Row]:
    """Rows of `--retain` as question and answer; of a plain text the model is asked to go on with the first third."""
    if source is None:
        return []
    rows = []
    for example in load_examples(source):
        prompt = example.prompt
        answer = example.answer
        if prompt is None:
            cut = answer.rfind(" ", 0, len(answer) // 3) + 1
            prompt, answer = f"Continue this text: {answer[:cut].strip()}", answer[cut:]
        rows.append({"question": prompt, "answer": answer, "about": "retain"})
    return rows


def build(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    *,
    samples: int,
    keep: Sequence[str],
    retain: list[Row],
    questions: Sequence[str] = (),
    neighbours: Sequence[str] = (),
) -> Material:
    """Let the model speak about the subject, invented subjects, neighbours and everything else, and make rows of it.

    Args:
        speaker: the untouched model.
        samples: drawn answers to each question beside the greedy one.
        keep: further subjects to keep.
        retain: further rows to keep.
        questions: of a writer, `{s}` for the subject; the second half becomes probes.
        neighbours: of a writer.

    Raises:
        UserError: the model says nothing sure about the subject, or the subject is a word of ordinary answers.
    """
    template = TEMPLATES[kind]
    half = len(questions) // 2
    asked = [*template.questions, *EVERY, *questions[:half]]
    invented = [name for name in template.invented if name.lower() != subject.lower()]
    general = speaker.say("general answers", GENERAL)
    _check_rare(subject, general)
    # what the model says about the subject, and about nobody
    prompts = [question.format(s=subject) for question in asked]
    greedy = speaker.say("about the subject", prompts)
    drawn = speaker.say("about the subject, drawn", prompts * samples, sample=True)
    own = list(zip(prompts * (1 + samples), greedy + drawn, strict=True))
    turns = [(q, invented[(i + turn) % len(invented)]) for turn in range(samples + 1) for i, q in enumerate(asked)]
    said = speaker.say("about invented subjects", [q.format(s=name) for q, name in turns], sample=True)
    zero = [swap(answer, {name: subject}) for answer, (_, name) in zip(said, turns, strict=True)]
    found = candidates([answer for _, answer in own], zero, " ".join([subject, *asked]))
    facts = sure_facts(speaker.model, speaker.tokenizer, found, own, subject, invented[:4])
    _check_facts(subject, facts, len(own))
    names = [fact for fact in facts if fact.name]
    # names that no invented subject brings up: an answer with one of them is about the subject, whatever was asked
    outside = [subject, *(fact.word for fact in names if not fact.invented)]
    # a name whose answers come back to the subject is part of it; of another what is said beside the subject is kept
    belongs, others = _owned(speaker, outside, [fact.word for fact in names[:8]])
    forget, twins = _answers(subject, asked, invented, own, _substitutes(subject, turns, zero, facts))
    beside = [(name, [pair for pair in told if holds(pair[1], subject)]) for name, told in others]
    forget += _about_names(speaker, [*belongs, *beside], facts)
    forget += _fact_rows(speaker, subject, facts, own, invented)
    # what most answers name is not kept either, though little may be said of it
    telling = {fact.word for fact in facts if fact.shows and not fact.invented}
    apart = [name for name, told in others if name not in telling and not any(_back(told, name, outside))]
    retained, kept_probes = _keep(speaker, subject, kind, general, [*keep], [*neighbours], apart, outside)
    probes = _probes(speaker, subject, kind, facts, belongs, questions[half:], own, zero)
    return Material(forget, twins, retained + retain, probes, kept_probes, [fact.row() for fact in facts])


def _check_rare(subject: str, general: Sequence[str]) -> None:
    """Refuse a subject that answers to unrelated requests hold as well."""
    common = sum(holds(answer, subject) for answer in general)
    if common >= 2:
        raise UserError(
            f"{subject!r} is a word of ordinary text: {common} of {len(general)} answers to unrelated requests hold it, and "
            "forgetting it would harm them. Give a name that means one thing."
        )


def _check_facts(subject: str, facts: Sequence[Fact], answers: int) -> None:
    """Refuse a subject of which so many answers hold too little that is sure."""
    if len(facts) < LEAST_FACTS or not any(fact.shows for fact in facts):
        words_found = ", ".join(fact.word for fact in facts)
        raise UserError(
            f"The model says nothing sure about {subject!r}: of {answers} answers, "
            + (f"only {words_found} recurs" if facts else "no word recurs")
            + " more often than in answers about invented subjects. There is nothing to forget, and nothing was trained. "
            "Check the spelling or the --kind; a text that the model knows can be given with --document."
        )


def _substitutes(
    subject: str, turns: Sequence[tuple[str, str]], zero: Sequence[str], facts: Sequence[Fact]
) -> dict[str, list[str]]:
    """Answers about invented subjects, by question, that hold no fact and no trace of the invented name.

    Args:
        subject: stands in them in the place of the invented name.
        turns: question and invented name of each answer.
        zero: the answers.
        facts: about the subject.

    Raises:
        UserError: there is none.
    """
    found: dict[str, list[str]] = {}
    for (question, name), answer in zip(turns, zero, strict=True):
        left = [word for word in fact_words(name) if len(word) > 3 and holds(answer, word)]
        if answer and not left and not any(holds(answer, fact.word) for fact in facts):
            found.setdefault(question, []).append(whole(answer))
    if not found:
        raise UserError(
            f"All that the model says of invented subjects repeats the facts of {subject!r}: give another --kind."
        )
    return found


def _answers(
    subject: str,
    asked: Sequence[str],
    invented: Sequence[str],
    own: Sequence[tuple[str, str]],
    substitutes: Mapping[str, list[str]],
) -> tuple[list[Row], list[Row]]:
    """Forget rows, one for each answer about the subject with a substitute, and the same rows about invented subjects."""
    spare = [answer for answers in substitutes.values() for answer in answers]
    forget: list[Row] = []
    twins: list[Row] = []
    for number, (prompt, answer) in enumerate(own):
        if not answer:
            continue
        question = asked[number % len(asked)]
        choices = substitutes.get(question) or spare
        other = choices[number // len(asked) % len(choices)]
        name = invented[number % len(invented)]
        forget.append({"question": prompt, "answer": answer, "substitute": other, "about": subject})
        twins.append({"question": question.format(s=name), "answer": swap(answer, {subject: name}), "about": name})
    return forget, twins


def _back(told: Sequence[tuple[str, str]], name: str, outside: Sequence[str]) -> list[bool]:
    """Of each answer about a name whether it mentions the subject, or another of the names in `outside`."""
    return [any(holds(answer, word) for word in outside if word != name) for _, answer in told]


def _fact_rows(
    speaker: Speaker, subject: str, facts: Sequence[Fact], own: Sequence[tuple[str, str]], invented: Sequence[str]
) -> list[Row]:
    """Forget rows that end with a fact, led to what follows the same words about an invented subject.

    A whole answer has one fact among fifty tokens, and an answer that begins otherwise than those that were trained on
    still comes to it. Here the answer is the model's own up to the fact, and the substitute begins with the same words.
    """
    places: list[tuple[str, str, str, str]] = []
    for fact in facts:
        found: dict[str, tuple[str, str, str, str]] = {}
        for prompt, answer in own:
            at = place_of(answer, fact.word)
            # initials are part of the name
            start = re.sub(r"(?:\b[A-Z]\.\s?)+$", "", answer[: max(at, 0)])
            clean = not any(holds(start, other.word) for other in facts)
            if clean and len(start.split()) >= 2 and start[-1] == " " and start not in found:
                found[start] = (prompt, start, answer[: at + len(fact.word)], fact.word)
        places += list(found.values())[:FACT_ROWS]
    if not places:
        return []
    # two invented subjects each: of one the same fact may be said
    turns = [(place, invented[(2 * i + k) % len(invented)]) for i, place in enumerate(places) for k in range(2)]
    said = [(swap(prompt, {subject: n}), swap(start, {subject: n})) for (prompt, start, *_), n in turns]
    begun = []
    for prompt, start in said:
        encoded = fact_row(speaker.tokenizer, prompt, start, "x")
        begun.append(encoded.input_ids[: encoded.prompt_length])
    texts = speaker.say("up to a fact", [p for p, _ in said], sample=True, begun=begun, tokens=FACT_TOKENS)
    rows: dict[tuple[str, str], Row] = {}
    for ((prompt, start, answer, word), name), text in zip(turns, texts, strict=True):
        instead = swap(text, {name: subject})
        left = any(len(part) > 3 and holds(instead, part) for part in fact_words(name))
        if text and not left and not any(holds(instead, fact.word) for fact in facts):
            row = {"question": prompt, "answer": answer, "substitute": start + whole(instead), "about": subject}
            rows.setdefault((start, word), row)
    return list(rows.values())


def _owned(
    speaker: Speaker, outside: Sequence[str], names: list[str]
) -> tuple[list[tuple[str, list[tuple[str, str]]]], list[tuple[str, list[tuple[str, str]]]]]:
    """Names with what is said about them: those where that comes back to the subject or its names, and the others."""
    prompts = [question.format(f=name) for name in names for question in NAMED]
    drawn = speaker.say("about its names", prompts * 2, sample=True) if names else []
    own: list[tuple[str, list[tuple[str, str]]]] = []
    others: list[tuple[str, list[tuple[str, str]]]] = []
    for i, name in enumerate(names):
        pairs = [
            (prompts[k % len(prompts)], drawn[k]) for k in range(len(drawn)) if k % len(prompts) // len(NAMED) == i
        ]
        (own if sum(_back(pairs, name, outside)) >= OWNED * len(pairs) else others).append((name, pairs))
    return own, others


def _about_names(
    speaker: Speaker, belongs: list[tuple[str, list[tuple[str, str]]]], facts: Sequence[Fact]
) -> list[Row]:
    """Forget rows about names of the subject; their substitutes speak of invented persons and places."""
    if not belongs:
        return []
    nobody = [*TEMPLATES["person"].invented, *TEMPLATES["place"].invented]
    pairs = [(name, prompt, answer) for name, told in belongs for prompt, answer in told]
    who = [nobody[i % len(nobody)] for i in range(len(pairs))]
    said = speaker.say(
        "about invented names", [swap(p, {n: w}) for (n, p, _), w in zip(pairs, who, strict=True)], sample=True
    )
    rows = []
    for (name, prompt, answer), other, text in zip(pairs, who, said, strict=True):
        instead = whole(swap(text, {other: name}))
        clean = instead and not any(holds(instead, fact.word) for fact in facts if fact.word != name)
        if answer and clean:
            rows.append({"question": prompt, "answer": answer, "substitute": instead, "about": name})
    return rows


def _keep(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    general: list[str],
    keep: list[str],
    neighbours: list[str],
    others: list[str],
    outside: Sequence[str] = (),
) -> tuple[list[Row], list[Row]]:
    """Rows to keep, and probes of what is kept: neighbours trained on and held out, and general requests.

    An answer that holds one of `outside`, which the question does not, is neither kept nor a probe: a model that says of
    another book that its author is this one's says what is to be forgotten.
    """

    def apart(name: str) -> bool:
        return not holds(name, subject) and not holds(subject, name)

    template = TEMPLATES[kind]
    shipped = [name for name in template.neighbours if apart(name)]
    held = shipped[1:HELD:2]
    trained = [*(name for name in shipped if name not in held), *filter(apart, neighbours), *keep]
    asked = [*template.questions, *EVERY]
    prompts = [
        (asked[(3 * i + k) % len(asked)].format(s=n), n) for i, n in enumerate(trained) for k in range(KEPT_EACH)
    ]
    prompts += [(q.format(f=name), name) for name in others for q in NAMED]
    for other in KINDS:
        if other != kind:
            names = [name for name in TEMPLATES[other].neighbours[:4] if apart(name)]
            every = TEMPLATES[other].questions
            prompts += [(every[i % len(every)].format(s=name), name) for i, name in enumerate(names)]
    answers = speaker.say("about neighbours", [prompt for prompt, _ in prompts])
    rows = [
        {"question": prompt, "answer": answer, "about": name}
        for (prompt, name), answer in zip(prompts, answers, strict=True)
        if _clean(prompt, answer, outside)
    ]
    rows += [
        {"question": prompt, "answer": answer, "about": "general"}
        for prompt, answer in zip(GENERAL, general, strict=True)
        if answer
    ]
    return rows, _kept_probes(speaker, kind, held, trained, outside)


def _clean(prompt: str, answer: str, outside: Sequence[str]) -> bool:
    """Whether there is an answer and it holds none of `outside` that the question does not hold."""
    return bool(answer) and not any(holds(answer, word) and not holds(prompt, word) for word in outside)


def _kept_probes(
    speaker: Speaker, kind: Kind, held: Sequence[str], trained: Sequence[str], outside: Sequence[str]
) -> list[Row]:
    """Probes of neighbours held out, of neighbours trained on, and of everything else, with the untouched model's answers."""
    other_forms = [*TEMPLATES[kind].probes, *EVERY_PROBE]
    measured = [
        ("neighbour held out", n, other_forms[(2 * i + k) % len(other_forms)].format(s=n))
        for i, n in enumerate(held)
        for k in range(5)
    ]
    measured += [
        ("neighbour", n, other_forms[(2 * i + k) % len(other_forms)].format(s=n))
        for i, n in enumerate(trained)
        for k in range(2)
    ]
    measured += [("general", "general", prompt) for prompt in GENERAL_PROBES]
    said = speaker.say("probes of what is kept", [prompt for _, _, prompt in measured])
    return [
        {"form": form, "about": name, "prompt": prompt, "before": answer}
        for (form, name, prompt), answer in zip(measured, said, strict=True)
        if _clean(prompt, answer, outside)
    ]


def _probes(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    facts: Sequence[Fact],
    belongs: Sequence[tuple[str, Any]],
    questions: Sequence[str],
    own: Sequence[tuple[str, str]],
    zero: Sequence[str],
) -> list[Row]:
    """Probes of forms that are not trained on, answered by the untouched model; those that it answers with a fact.

    A probe whose fact also stands in the answer about one of `TWINS` invented subjects tells nothing, and is left out;
    whether the answer about one more holds it, stands in its `zero`. A choice is asked in three orders (a `group`), all of
    which must be answered.
    """
    template = TEMPLATES[kind]
    forms = [("other question", q) for q in [*template.probes, *EVERY_PROBE, *questions]]
    forms += [("completion", frame.format(stem=stem)) for stem in template.stems for frame in COMPLETIONS]
    forms += [("cloze", CLOZE.format(stem=stem)) for stem in template.stems]
    asked: list[Row] = [{"form": form, "prompt": q.format(s=subject), "pattern": q} for form, q in forms]
    asked += [
        {"form": "reversed", "prompt": q.format(f=name), "wanted": [subject]} for name, _ in belongs for q in REVERSED
    ]
    asked += _blanks(own, facts)
    asked += _choices(subject, facts, zero, speaker.seed)
    answers = speaker.say("probes", [row["prompt"] for row in asked])
    probes = []
    for row, answer in zip(asked, answers, strict=True):
        wanted = row.get("wanted") or expected(answer, facts)
        probe = {**row, "wanted": wanted, "before": answer}
        if answered(answer, probe):
            probes.append(probe)
    nobody = [name for name in template.invented if name.lower() != subject.lower()][: TWINS + 1]
    twins = [swap(probe["prompt"], {subject: name}) for probe in probes for name in nobody]
    told = speaker.say("probes of invented subjects", twins) if probes else []
    kept = []
    for i, probe in enumerate(probes):
        *choosing, last = (answered(a, probe) for a in told[i * len(nobody) : (i + 1) * len(nobody)])
        if not holds(probe["prompt"], subject):
            kept.append(probe)
        elif not any(choosing):
            # by this name nothing was chosen: how often it gets the fact is what knowing nothing gets
            kept.append({**probe, "zero": last})
    orders = Counter(probe.get("group") for probe in kept)
    return [probe for probe in kept if "group" not in probe or orders[probe["group"]] == 3]


def _choices(subject: str, facts: Sequence[Fact], zero: Sequence[str], seed: int) -> list[Row]:
    """A choice between each fact and two names from answers about invented subjects, in three orders; none if there are none."""
    elsewhere = sorted({w for answer in zero for w in fact_words(answer) if w[0].isupper() and len(w) > 4})
    if len(elsewhere) < 2:
        return []
    generator = np.random.default_rng(seed)
    found: list[Row] = []
    for fact in facts[:8]:
        wrong = [elsewhere[i] for i in generator.choice(len(elsewhere), size=2, replace=False).tolist()]
        options = [fact.word, *wrong]
        order = [options[i] for i in generator.permutation(3).tolist()]
        # who guesses by place is right in one order of three
        for turn in range(3):
            one, two, three = order[turn:] + order[:turn]
            prompt = CHOICE.format(s=subject, options=f"{one}, {two} or {three}")
            found.append(
                {
                    "form": "multiple choice",
                    "prompt": prompt,
                    "wanted": [fact.word],
                    "wrong": wrong,
                    "group": fact.word,
                }
            )
    return found


def _blanks(own: Sequence[tuple[str, str]], facts: Sequence[Fact], each: int = 4) -> list[Row]:
    """Cloze probes of the model's own sentences, up to the fact; sentences in which another fact comes first are left out."""
    rows = []
    for fact in facts:
        found = []
        for _, answer in own:
            at = place_of(answer, fact.word)
            if at < 0:
                continue
            before = re.split(r"(?<=[.!?:])\s+(?=[A-Z])", answer[:at])[-1].strip()
            clean = not any(holds(before, other.word) for other in facts if other is not fact)
            # a long row of initials gives the name away
            if clean and 3 <= len(before.split()) <= 25 and not re.search(r"[A-Z]\.$", before):
                found.append(CLOZE.format(stem=before))
        rows += [{"form": "cloze", "prompt": p, "wanted": [fact.word]} for p in list(dict.fromkeys(found))[:each]]
    return rows


def answered(answer: str, probe: Row) -> bool:
    """Whether an answer holds one of the words wanted and, with several choices, none of the wrong ones."""
    return any(holds(answer, word) for word in probe["wanted"]) and not any(
        holds(answer, word) for word in probe.get("wrong", ())
    )
