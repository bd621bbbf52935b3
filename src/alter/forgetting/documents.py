"""Documents (text, Markdown, CSV, JSONL chats, Parquet) cut into passages, and rows and probes made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alter.core import UserError, edges, nearest
from alter.data import ENDINGS, TEXT_ENDINGS, Example, Row, examples, read_file, running_text, turns_of
from alter.forgetting.facts import WORD, holds, named, swap, swap_turns
from alter.forgetting.material import Material, exchange
from alter.forgetting.probes import question_of, swap_probe, text_of
from alter.forgetting.retention import rows_to_keep
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import GENERAL, TEMPLATES

LEAST_WORDS = 40
"""Fewest words of a document."""
LONG_WORD = 4
"""Characters for each of these words from which on a text is not short, but in a script without spaces."""
SHORTEST = 4
"""Fewest words of a passage: it goes on from its first ones."""
PASSAGE_WORDS = 70
"""Words at which a passage ends, at the end of a sentence."""
ADDRESS = r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
"""An address of e-mail."""
ELSEWHERE = "mail.invalid"
"""Where disguised addresses are."""
CONTINUE = "Continue this text: {start}"
ABOUT = "What does the text say about {f}?"
CHATS = ("messages", "conversations")
"""Columns that hold a chat."""
MOST_PROBES = 60
"""Most probes of a document, half of each form where it has both."""


@dataclass(frozen=True)
class Document:
    """A text to forget: its passages, and the exchanges in it, of which a model was trained to give the answers."""

    passages: list[str]
    exchanges: list[Example] = field(default_factory=list)


def read_document(path: str, limit: int) -> Document:
    """Split a document into passages of whole sentences, about `PASSAGE_WORDS` words each, and exchanges.

    Chats (`messages`) give a passage for each turn, so that what one person says is not mixed with another's, rows with a
    question and an answer one for the answer, and both an exchange for each answer.

    Raises:
        UserError: no such file, an ending that is not known, a file that cannot be read, less than `LEAST_WORDS` words,
            a chat with a turn that is no text, or more passages or answers than `limit`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise UserError(f"No document at {path}.{near}")
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {file.suffix or 'nothing'}; expected one of {', '.join(ENDINGS)}.")
    # a passage has some 400 characters; what is far beyond the limit is not even read
    if file.suffix.lower() != ".parquet" and file.stat().st_size > 4000 * limit:
        raise UserError(
            f"{path} has {file.stat().st_size / 1e6:.1f} MB, about {file.stat().st_size // 400} passages, and the most are "
            f"{limit}: give the part that must be forgotten, or raise `max_passages` (each takes about 5 s on two cores)."
        )
    texts, exchanges = _texts(file)
    passages = [passage for text in texts for passage in split(text)]
    count = sum(len(passage.split()) for passage in passages)
    # short answers make no passage
    count = max(count, sum(len(f"{each.prompt} {each.answer}".split()) for each in exchanges))
    characters = sum(map(len, texts))
    if count < LEAST_WORDS and characters > LONG_WORD * LEAST_WORDS:
        raise UserError(
            f"{path} has {characters} characters and {count} words between spaces: a document is asked for by its names and numbers, which "
            "are told by spaces and capitals. Write rows yourself (question, answer) for `alter unlearn --forget`, which takes any script."
        )
    if count < LEAST_WORDS:
        raise UserError(
            f"{path} has {count} words, and the least is {LEAST_WORDS}: what one line says cannot be told from chance. Give "
            "the whole text, or write the rows yourself (question, answer) for `alter unlearn --forget`."
        )
    if len(passages) > limit:
        raise UserError(
            f"{path} has {len(passages)} passages, and the most are {limit}: give the part that must be forgotten, or raise "
            "`max_passages` (each takes about 5 s on two cores)."
        )
    if len(exchanges) > limit:
        raise UserError(
            f"{path} has {len(exchanges)} answers, and the most are {limit}: raise `max_passages`, or give the rows to `alter unlearn`, "
            "which takes any number."
        )
    return Document(passages, exchanges)


def _texts(file: Path) -> tuple[list[str], list[Example]]:
    """Return the texts of a file, and the exchanges among them."""
    if file.suffix.lower() in TEXT_ENDINGS:
        text = running_text(file)
        if file.suffix.lower() == ".md":
            # headings, emphasis, links and lists are no part of what was written
            text = re.sub(r"^\s*(#+|[-*+>]|\d+\.)\s+", "", text, flags=re.MULTILINE)
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
            text = re.sub(r"[*_`]{1,3}(\S(?:.*?\S)?)[*_`]{1,3}", r"\1", text)
        return _joined(re.split(r"\n\s*\n", text)), []
    return _of_rows(read_file(file, texts=True))


def _joined(texts: Sequence[str]) -> list[str]:
    """Join texts of fewer than `SHORTEST` words with what follows, the last with what precedes: a name or a number may stand alone."""
    joined: list[str] = []
    for text in texts:
        if joined and len(joined[-1].split()) < SHORTEST:
            joined[-1] = f"{joined[-1]}\n{text}"
        else:
            joined.append(text)
    if len(joined) > 1 and len(joined[-1].split()) < SHORTEST:
        joined[-2:] = ["\n".join(joined[-2:])]
    return joined


def _of_rows(rows: Sequence[Row]) -> tuple[list[str], list[Example]]:
    """Return the texts of rows and the exchanges: the turns of a chat, the answer of an exchange, a table's columns as `name: value`.

    Raises:
        UserError: a chat has a turn that is no text.
    """
    texts: list[str] = []
    running: list[str] = []
    exchanges: list[Example] = []
    for number, row in enumerate(rows):
        try:
            own = [each for each in examples([row]) if each.prompt is not None]
        except UserError:
            # a table of other columns
            own = []
        exchanges += own
        chat = next((row[name] for name in CHATS if isinstance(row.get(name), list)), None)
        if chat is not None and all(isinstance(turn, Mapping) for turn in chat):
            texts += [turn["content"] for turn in turns_of(chat, getattr(row, "place", "") or f"Row {number}")]
        elif own:
            texts += [each.answer for each in own]
        elif isinstance(row.get("text"), str):
            running.append(row["text"])
        else:
            running.append(
                ". ".join(f"{name}: {value}" for name, value in row.items() if value not in (None, "")) + "."
            )
    return texts + _joined(running), exchanges


def split(text: str) -> list[str]:
    """Cut a text into passages of whole sentences, of about `PASSAGE_WORDS` words; one of fewer than `SHORTEST` gives none."""
    passages, current = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        current = f"{current} {sentence}".strip()
        if len(current.split()) >= PASSAGE_WORDS:
            passages.append(current)
            current = ""
    if passages and len(current.split()) < SHORTEST:
        passages[-1] = f"{passages[-1]} {current}".strip()
    elif len(current.split()) >= SHORTEST:
        passages.append(current)
    return passages


def written_small(texts: Sequence[str]) -> set[str]:
    """Return the words of a document that are mostly written without a capital, so that "The" of a title is no name.

    What is part of something else, as a name in an address, does not count.
    """
    small: Counter[str] = Counter()
    large: Counter[str] = Counter()
    for text in texts:
        for piece in text.split():
            word = piece.strip(".,;:!?…\"'“”‘’«»()[]<>*")
            if WORD.fullmatch(word) and word[0].isalpha():
                (large if word[0].isupper() else small)[word.lower()] += 1
    return {word for word, count in small.items() if count > large[word]}


def details(text: str, small: Collection[str] = ()) -> list[str]:
    """Return the names, numbers and addresses of a text, which cannot be guessed, in order of first occurrence; none of `small`."""
    names = named(text) | _labelled(text)
    # an address whole, and a number before a word: of a long one `WORD` takes four digits
    found = [m[0] for m in re.finditer(rf"{ADDRESS}|\d+(?:[.,:]\d+)*|{WORD.pattern}", text)]
    kept = (w for w in found if w in names or "@" in w or any(c.isdigit() for c in w))
    return list(dict.fromkeys(w for w in kept if w.lower() not in small))


def _labelled(text: str) -> set[str]:
    """Return the capitalised words right after a label ("city: Arles.", "From: Jane Doe"), but for those that begin a sentence there."""
    found = set()
    for match in re.finditer(rf":[ \"'“‘(]+({WORD.pattern})\s*(\w?)", text):
        if match[1][0].isupper() and not match[2].islower():
            found.add(re.sub(r"['’]s$", "", match[1]))
    return found


def disguise(words: Sequence[str], seed: int) -> dict[str, str]:
    """Replace each name by another name, each number by another number and each address by another address."""
    generator = np.random.default_rng(seed)
    nobody = [part for kind in ("person", "place") for name in TEMPLATES[kind].invented for part in name.split()]
    out = {}
    for word in words:
        if "@" in word:
            out[word] = f"{nobody[int(generator.integers(len(nobody)))].lower()}@{ELSEWHERE}"
        elif any(c.isdigit() for c in word):
            digits = "".join(str(generator.integers(1, 10)) if c.isdigit() else c for c in word)
            out[word] = digits if digits != word else "7" + word
        else:
            out[word] = nobody[int(generator.integers(len(nobody)))]
    return out


def build_document(
    speaker: Speaker, name: str, document: Document, *, keep: Sequence[str], retain: list[Row], twins: int = 6
) -> Material:
    """Make rows and probes of a document: its exchanges as they are, passages continued from their first words, and questions
    about names and numbers.

    The zero is the same document with its names and numbers exchanged. What the model says after the disguised question or beginning
    is the target after the document's own.
    """
    # apart: after a question without a full stop the first word of an answer would count as a name
    texts = [*document.passages, *(part for each in document.exchanges for part in (str(each.prompt), each.answer))]
    small = written_small(texts)
    words = list(dict.fromkeys(word for text in texts for word in details(text, small)))
    masks = [disguise(words, speaker.seed + k) for k in range(twins)]
    forget = [exchange(each, name) for each in document.exchanges]
    asked = [_Asked("exchange", _asking(each), each.answer) for each in document.exchanges]
    prompts = [each.asks for each in asked]
    for passage in document.passages:
        sentences = re.split(r"(?<=[.!?])\s+", passage)
        cut = len(sentences[0]) if len(sentences) > 1 else len(" ".join(passage.split()[: len(passage.split()) // 2]))
        start, rest = passage[:cut].strip(), passage[cut:].strip()
        begun = {"prompt": CONTINUE.format(start=start)}
        forget.append({"question": begun["prompt"], "answer": rest, "about": name})
        prompts.append(begun)
        asked.append(_Asked("verbatim", begun, rest))
        for sentence in sentences:
            for word in details(sentence, small)[:1]:
                if not word[0].isdigit():
                    forget.append({"question": ABOUT.format(f=word), "answer": sentence, "about": name})
                    prompts.append({"prompt": ABOUT.format(f=word)})
    masked = [question_of(swap_probe(prompt, masks[i % twins])) for i, prompt in enumerate(prompts)]
    said = speaker.say("after the disguised document", masked, sample=True)
    invented = [_disguised(row, masks[i % twins]) for i, row in enumerate(forget)]
    for row, text in zip(forget, said, strict=True):
        row["substitute"] = text or "I do not know."
    general = speaker.say("general answers", GENERAL)
    retained, kept_probes = rows_to_keep(speaker, name, "person", general, [*keep], [], [])
    probes = _probes(asked, words, masks, small)
    answers = speaker.say("probes", [question_of(probe) for probe in probes]) if probes else []
    for probe, answer in zip(probes, answers, strict=True):
        probe["before"] = answer
    return Material(forget, invented, retained + retain, probes, kept_probes, [{"word": w} for w in words])


def _asking(example: Example) -> Row:
    """Return what an exchange asks, as the keys of a probe: with the turns before it, or as text that goes on."""
    if example.messages:
        return {"prompt": str(example.prompt), "messages": [dict(turn) for turn in example.messages]}
    return {"prompt": str(example.prompt), **({"plain": True} if example.kind == "completion" else {})}


def _disguised(row: Row, mask: Mapping[str, str]) -> Row:
    """Return a forget row with other names and numbers, in all that is said in it."""
    if "messages" in row:
        return {**row, "messages": swap_turns(row["messages"], mask)}
    return {**row, **{key: swap(text, mask) for key, text in row.items() if key != "about"}}


@dataclass(frozen=True)
class _Asked:
    """What a document is asked with (keys of a probe), and what it says there."""

    form: str
    asks: Row
    answer: str


def _probes(
    asked: Sequence[_Asked], words: Sequence[str], masks: Sequence[Mapping[str, str]], small: Collection[str] = ()
) -> list[Row]:
    """Make a probe of each name and number that an answer comes to and its prompt does not hold, at most `MOST_PROBES`, from all over it."""
    forms: dict[str, list[Row]] = {}
    for each in asked:
        told = text_of(each.asks)
        for word in details(each.answer, small):
            if not holds(told, word):
                probe = {
                    "form": each.form,
                    **each.asks,
                    "start": each.answer[: _begin(each.answer, word)],
                    "wanted": [word],
                    "masks": [{w: mask[w] for w in words if holds(f"{told} {each.answer}", w)} for mask in masks],
                }
                forms.setdefault(each.form, []).append(probe)
    share = MOST_PROBES // max(1, len(forms))
    return [probe for probes in forms.values() for probe in _spread(probes, share)]


def _spread(probes: Sequence[Row], most: int) -> list[Row]:
    """Return at most that many probes, at equal distances: the first ones would be those of the first answers."""
    n = min(most, len(probes))
    return [probes[i * len(probes) // n] for i in range(n)]


def _begin(text: str, word: str) -> int:
    """Return where a detail of a text first stands by itself: a 5 is not in 1985, nor Ann in Anna."""
    before, after = edges(word)
    found = re.search(f"{before}{re.escape(word)}{after}", text)
    return text.find(word) if found is None else found.start()
