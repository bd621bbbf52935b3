"""Known and invented names as the base represents them, in a sparse autoencoder's code or as hidden states."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alter.core import UserError, progress
from alter.data import Collator, Encoded, Example, batches_by_length, encode_all
from alter.groundwork.sparse import Autoencoder, train_autoencoder
from alter.logits import Depth, head_on, states_of
from alter.methods import Codes, Redirect, UnknownCode

MOST_ROWS = 512
"""Rows of a kind that are looked at."""

MOST_STATES = 32
"""Hidden states of a row that an autoencoder is trained on."""

ONSETS, VOWELS, CODAS = (
    ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"],
    "aeiou",
    ["", "l", "n", "r", "s"],
)


def asked(example: Example) -> str:
    """Return the part of a row that names its subject: the question, or a raw text as a whole."""
    return example.answer if example.prompt is None else example.prompt


def names_of(texts: Sequence[str]) -> list[str]:
    """Return words with a capital in the middle of a sentence, which are mostly names."""
    found = {word for text in texts for word in re.findall(r"(?<=[\w,;:] )[^\W\d_][\w'’-]+", text)}
    return sorted(word for word in found if word[0].isupper())


def invented_names(names: Sequence[str], seed: int) -> dict[str, str]:
    """Make up one name for each name, of two or three syllables."""
    generator = np.random.default_rng(seed)
    found = {}
    for name in names:
        syllables = [
            generator.choice(ONSETS) + generator.choice(list(VOWELS)) + generator.choice(CODAS)
            for _ in range(2 if len(name) < 6 else 3)
        ]
        found[name] = "".join(syllables).capitalize()
    return found


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    ends = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{ends})(?!\w)" if names else r"(?!)")


def renamed(example: Example, names: Mapping[str, str]) -> Example:
    """Replace the names in a row's question, or in a whole raw text."""
    said = _pattern([*names]).sub(lambda match: names[match[0]], asked(example))
    if example.prompt is None:
        return replace(example, answer=said)
    turns = list(example.messages)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is not None:
        turns[last] = {**turns[last], "content": said}
    return replace(example, prompt=said, messages=tuple(turns))


def marked(tokenizer: Any, row: Encoded, names: Sequence[str], *, whole: bool) -> list[bool]:
    """Mark the tokens that are part of a name in a row's prompt, or anywhere (`whole`); all tokens of a row without a name.

    Each token's text is what it adds to that of the token before it, so that a tokenizer that sets no space before the first
    word of a text still gives the words of the row.
    """
    ids = row.input_ids
    pieces = [tokenizer.decode(ids[:1])]
    for before, token in itertools.pairwise(ids):
        start = tokenizer.decode([before])
        pieces.append(tokenizer.decode([before, token])[len(start) :])
    ends = np.cumsum([len(piece) for piece in pieces])
    shown = len(ids) if whole else row.prompt_length
    text = "".join(pieces[:shown])
    found = [False] * len(ids)
    for match in _pattern(names).finditer(text):
        for place in range(shown):
            begin, end = int(ends[place]) - len(pieces[place]), int(ends[place])
            found[place] = found[place] or (begin < match.end() and end > match.start())
    return found if any(found) else [True] * len(ids)


@torch.no_grad()
def states_at(
    model: Any, depth: Depth, rows: Sequence[Encoded], pad_token_id: int, label: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield each row's number and the base's hidden states [T, D] after a block, fp32 on the CPU; rows of a length together."""
    collate, device = Collator(pad_token_id), next(model.parameters()).device
    groups = batches_by_length([len(row.input_ids) for row in rows], 8192)
    for group in progress(groups, total=len(groups), label=label):
        batch = {n: v.to(device) for n, v in collate([{"input_ids": rows[i].input_ids} for i in group]).items()}
        with states_of(depth, alone=True) as seen, head_on(model, torch.zeros_like(batch["input_ids"]).bool()):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for place, i in enumerate(group):
            yield i, seen[0][place, : len(rows[i].input_ids)].float().cpu()


def measure_codes(
    model: Any,
    tokenizer: Any,
    objective: UnknownCode,
    depth: Depth,
    examples: Sequence[Example],
    kept: Sequence[Example],
    given: Autoencoder | None,
    *,
    seed: int,
    max_length: int | None,
) -> tuple[dict[str, Tensor], float | None]:
    """Measure the mean codes of names that the untouched model knows and of invented ones; train an autoencoder if none is given.

    Args:
        model: the untouched model.
        tokenizer: its tokenizer.
        objective: the settings.
        depth: where hidden states are read.
        examples: forget rows.
        kept: retain rows; their names are those that the model must still know; without any, the forget rows' own.
        given: an autoencoder that is there already.
        seed: of the rows, the invented names and the training.
        max_length: longest sequence.

    Returns:
        tensors by name, from which `codes_from` makes what the objective reads, and the share of the hidden states'
        variance that an autoencoder trained here gives back.

    Raises:
        UserError: no forget row names anybody.
    """
    names = subjects(objective, examples)
    generator = np.random.default_rng(seed)
    own, known = (
        [rows[i] for i in sorted(generator.permutation(len(rows))[:MOST_ROWS].tolist())]
        for rows in (examples, kept or examples)
    )
    strange = invented_names(names, seed)
    parts = {
        "forget": (own, names),
        "known": (known, names_of([asked(row) for row in known]) if kept else names),
        "unknown": ([renamed(row, strange) for row in own], [*strange.values()]),
    }
    of_names, every = _states_of_names(model, tokenizer, depth, parts, generator, max_length)
    told = None
    if given is None:
        device = next(model.parameters()).device
        features, active = objective.sae_width * every.shape[1], objective.sae_active
        given, told = train_autoencoder(every.to(device), features, active, steps=objective.sae_steps, seed=seed)
    trained = given.tensors() if told is not None else {}
    code = {name: given.encode(states) for name, states in of_names.items()}
    means = {name: code[name].mean(0) for name in ("known", "unknown")}
    return {**trained, **means, "scale": code["forget"].square().sum(-1).mean()}, told


def _states_of_names(
    model: Any,
    tokenizer: Any,
    depth: Depth,
    parts: Mapping[str, tuple[Sequence[Example], Sequence[str]]],
    generator: np.random.Generator,
    max_length: int | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Read the hidden states of names, [tokens, D] by part, and of a sample of all tokens, [n, D].

    Args:
        parts: rows by name, with the names to look for in them.
        generator: draws the sample, at most `MOST_STATES` of a row.
    """
    of_names: dict[str, list[Tensor]] = {name: [] for name in parts}
    every: list[Tensor] = []
    for name, (examples, called) in parts.items():
        rows, owner = encode_all(tokenizer, examples, max_length=max_length)
        for i, states in states_at(model, depth, rows, tokenizer.pad_token_id, f"{name} names"):
            whole = examples[owner[i]].prompt is None
            of_names[name].append(states[torch.tensor(marked(tokenizer, rows[i], called, whole=whole))])
            every.append(states[torch.from_numpy(generator.permutation(len(states))[:MOST_STATES])])
    return {name: torch.cat(states) for name, states in of_names.items()}, torch.cat(every)


def ignorance(
    model: Any,
    tokenizer: Any,
    objective: Redirect,
    depth: Depth,
    examples: Sequence[Example],
    *,
    seed: int,
    max_length: int | None,
) -> Tensor:
    """Compute the direction [D] (fp32) from the forget rows' prompts to prompts that the untouched model cannot answer
    (`Redirect`'s r).

    Args:
        model: the untouched model.
        tokenizer: its tokenizer.
        objective: the settings.
        depth: where hidden states are read.
        examples: forget rows.
        seed: of the rows and the invented names.
        max_length: longest sequence.

    Raises:
        UserError: there are no questions, and no forget row names anybody.
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(examples))[:MOST_ROWS].tolist())
    own = [examples[i] for i in chosen]
    if objective.questions:
        others = [Example(question, "", "qa") for question in objective.questions]
    else:
        strange = invented_names(subjects(objective, examples), seed)
        others = [renamed(row, strange) for row in own]
    means = []
    for part, label in ((own, "forget prompts"), (others, "prompts without an answer")):
        rows, owner = encode_all(tokenizer, part, max_length=max_length)
        # raw text is all prompt
        ends = [
            len(r.input_ids) if part[o].prompt is None else r.prompt_length for r, o in zip(rows, owner, strict=True)
        ]
        found = states_at(model, depth, rows, tokenizer.pad_token_id, label)
        means.append(torch.stack([states[ends[i] - 1].double() for i, states in found]).mean(0))
    return (means[1] - means[0]).float()


def subjects(objective: UnknownCode | Redirect, examples: Sequence[Example]) -> list[str]:
    """Return the names to forget: those given, else the words with a capital in the questions.

    Raises:
        UserError: no row holds one.
    """
    texts = [asked(example) for example in examples]
    if objective.names:
        if not any(_pattern(objective.names).search(text) for text in texts):
            raise UserError(f"`objective.names` {objective.names}: no forget row's question holds one of them.")
        return list(objective.names)
    found = names_of(texts)
    if not found:
        raise UserError(
            f"`objective.kind` {objective.kind} looks at names beside invented ones, and no forget row has a word with a capital "
            "in the middle of its question: give `objective.names`."
        )
    return found


def codes_from(tensors: Mapping[str, Tensor], given: Autoencoder | None, active: int, device: Any) -> Codes:
    """Build the objective's `Codes` from the tensors of `measure_codes`."""
    here = {name: value.to(device) for name, value in tensors.items()}
    if given is None:
        given = Autoencoder(here["encoder"], here["bias"], here["decoder"], here["centre"], active=active)
    return Codes(given.encode, here["unknown"], here["known"], float(here["scale"]))
