"""Facts that a model knows about a subject: words that recur in its answers, are sure, and are absent for invented subjects."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy import stats

from alter.core import MARKS, UNSPACED, caseless, edges

WORD = re.compile(rf"[^\W\d_][\w'’{MARKS}-]*(?:[^\W_]|[{MARKS}])|\d{{3,4}}")
LONGEST = 8
"""Most characters of what is looked at as a word where no spaces are set."""
BEFORE = 100
"""Characters before a word that tell whether a sentence begins with it."""
LEVEL = 0.05
"""False discovery rate at which a word shows that the model knows the subject."""
CANDIDATE = 0.1
"""Largest p-value of a word that is looked at more closely."""
RECURS = 2
"""Fewest answers that a word must occur in."""


@dataclass(frozen=True)
class Fact:
    """A word that the model knows about the subject.

    Attributes:
        word: as the answers write it most often.
        name: whether it is a proper name: written with a capital inside sentences, or see `with_names`.
        answers: answers about the subject that hold it.
        invented: answers about invented subjects that hold it, to the same questions.
        pvalue: one-sided Fisher test of the two shares.
        shows: whether it passes the test by itself, at a false discovery rate of `LEVEL` among all words.
        entropy: Shannon entropy in nats of the distribution that gives the word's first token, where the word is surest.
        gain: how much more probable the word is there than with an invented subject in the same text, in nats.
    """

    word: str
    name: bool
    answers: int
    invented: int
    pvalue: float
    shows: bool = False
    entropy: float = 0.0
    gain: float = 0.0

    def row(self) -> dict[str, object]:
        """Return the fact as a row of a JSONL file."""
        return asdict(self)


def fact_words(text: str) -> list[str]:
    """Return the words of a text, years included, as written; `J.K. Rowling's` gives `Rowling`."""
    return [re.sub(r"['’]s$", "", word) for word in WORD.findall(text)]


def _terms(text: str) -> list[str]:
    """Return the words of a text; where no spaces are set, all that two to `LONGEST` characters in a row say."""
    found: list[str] = []
    for word in fact_words(text):
        for part in filter(None, re.split(f"((?:{UNSPACED.pattern})+)", word)):
            if UNSPACED.match(part):
                sizes = range(2, min(LONGEST, len(part)) + 1)
                found += [part[start : start + size] for size in sizes for start in range(len(part) - size + 1)]
            else:
                found.append(part)
    return found


SHORT = 4
"""Letters up to which a word must end where it ends: many words begin like a short one."""


def place_of(text: str, word: str) -> int:
    """Return where a text first has the word, in any case, or -1; a plural or a genitive counts.

    A word of at most `SHORT` letters may be followed by an `s` alone: Ron is not in Ronald. In scripts without spaces a word may
    stand anywhere.
    """
    before, after = edges(word)
    end = rf"(?:['’]?s)?{after}" if after and len(word) <= SHORT else ""
    found = re.search(f"{before}{re.escape(word)}{end}", text, re.IGNORECASE)
    return -1 if found is None else found.start()


def holds(text: str, word: str) -> bool:
    """Tell whether a text has the word, as `place_of` finds it."""
    return place_of(text, word) >= 0


def named(text: str) -> set[str]:
    """Return the words that are capitalised where no sentence begins."""
    found = set()
    for match in WORD.finditer(text):
        # of a long text the whole, for each of its words, would take hours
        before = text[max(0, match.start() - BEFORE) : match.start()].rstrip(" \"'“‘(*")
        initial = re.search(r"(?<![\w])(?:[^\W\d_]\.)+$", before) is not None
        if match[0][0].isupper() and before and (initial or before[-1] not in ".!?:\n-"):
            found.add(re.sub(r"['’]s$", "", match[0]))
    return found


def candidates(answers: Sequence[str], invented: Sequence[str], ignore: str) -> list[Fact]:
    """Return words that recur in answers about a subject more often than about invented subjects; names first.

    A word counts if it has four letters, or a capital and three, or is a year, and is in at least `RECURS` answers. In a script without
    capitals three letters are enough; where no spaces are set, any run of two characters or more that is no part of a longer one in the
    very same answers. Its p-value is that of Fisher's exact test, one-sided; words up to `CANDIDATE` are returned, and names that no invented
    subject brings up, as few answers name the lesser persons of a story. Those that `shows` marks pass
    Benjamini and Hochberg's procedure: of a subject that the model does not know, there are none in 95 % of cases.

    Args:
        answers: what the model says about the subject.
        invented: what it says of invented subjects, asked the same.
        ignore: text whose words are no facts: the subject's own name and the questions.
    """
    own = {word.lower() for word in _terms(ignore)}
    # where no spaces are set, what stands beside the subject's name would make another word of it
    without = dict.fromkeys(re.findall(f"(?:{UNSPACED.pattern})+", ignore), " ")
    answers, invented = ([swap(answer, without) for answer in each] for each in (answers, invented))
    written: dict[str, Counter[str]] = {}
    capital: Counter[str] = Counter()
    for answer in answers:
        names = named(answer)
        for word in set(_terms(answer)):
            low = word.lower()
            least = 3 if word in names or low.isdigit() or caseless(word) else 4
            if low in own or len(low) < (2 if UNSPACED.match(low) else least):
                continue
            written.setdefault(low, Counter())[word] += 1
            capital[low] += word in names
    here = Counter(low for answer in answers for low in {word.lower() for word in _terms(answer)})
    there = Counter(low for answer in invented for low in {word.lower() for word in _terms(answer)})
    parts = {
        part
        for low in written
        if UNSPACED.match(low)
        for part in (low[1:], low[:-1])
        if (here[part], there[part]) == (here[low], there[low])
    }
    tried = []
    for low in written:
        if here[low] >= RECURS and low not in parts:
            both = len(answers) + len(invented)
            pvalue = stats.hypergeom.sf(here[low] - 1, both, here[low] + there[low], len(answers))
            tried.append((float(pvalue), low))
    tried.sort()
    kept = max((k for k, (p, _) in enumerate(tried, 1) if p <= LEVEL * k / len(tried)), default=0)
    found = [
        Fact(written[low].most_common(1)[0][0], 2 * capital[low] > here[low], here[low], there[low], pvalue, k < kept)
        for k, (pvalue, low) in enumerate(tried)
        if pvalue <= CANDIDATE or (2 * capital[low] > here[low] and not there[low])
    ]
    return sorted(_apart(found), key=lambda fact: (not fact.name, fact.pvalue, fact.word))


def _apart(found: Sequence[Fact]) -> list[Fact]:
    """Leave out what holds a surer word, or stands in one, where no spaces are set: a name with the particle behind it."""
    kept: list[Fact] = []
    for fact in sorted(found, key=lambda fact: (fact.pvalue, -len(fact.word))):
        if not UNSPACED.match(fact.word) or not any(
            fact.word in other.word or other.word in fact.word for other in kept
        ):
            kept.append(fact)
    return kept


def with_names(facts: Sequence[Fact], elsewhere: Sequence[str]) -> list[Fact]:
    """Call those facts names that no capital tells: of a script without them, and in no answer about an invented subject or `elsewhere`.

    A word of ordinary answers is none, whatever the model knows by it.

    Args:
        facts: about the subject.
        elsewhere: answers to unrelated requests.
    """
    named_ = [
        replace(fact, name=True)
        if caseless(fact.word) and not fact.invented and not any(holds(text, fact.word) for text in elsewhere)
        else fact
        for fact in facts
    ]
    return sorted(named_, key=lambda fact: not fact.name)


def expected(answer: str, facts: Sequence[Fact]) -> list[str]:
    """Return the facts that an answer holds: its names if it has any, else its other words."""
    there = [fact for fact in facts if holds(answer, fact.word)]
    return [fact.word for fact in there if fact.name] or [fact.word for fact in there]


def whole(text: str) -> str:
    """Return a text up to the end of its last complete sentence; all of it where no sentence ends."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"”’')]*(?=\s|$)", text)]
    # the full stop of an initial or of a number in a list ends no sentence
    ends = [end for end in ends if not re.search(r"(?:^|[\s.])(?:\w|\d+)\.$", text[:end])]
    return text[: ends[-1]] if ends else text


def swap(text: str, names: Mapping[str, str]) -> str:
    """Replace names that stand by themselves in a text, whatever their case; longer ones first, each place once."""
    if not names:
        return text
    ordered = sorted(names, key=len, reverse=True)
    pattern = "|".join(f"({before}{re.escape(old)}{after})" for old in ordered for before, after in [edges(old)])
    return re.sub(pattern, lambda found: names[ordered[(found.lastindex or 1) - 1]], text, flags=re.IGNORECASE)


def swap_turns(turns: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Replace names in all that is said in the turns of a chat, in calls of tools too."""
    return [
        {key: _swapped(value, names) if key in ("content", "tool_calls") else value for key, value in turn.items()}
        for turn in turns
    ]


def _swapped(value: Any, names: Mapping[str, str]) -> Any:
    """Return a JSON value with other names and numbers in its texts."""
    if isinstance(value, str):
        return swap(value, names)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # what stands for digits is digits
        return json.loads(swap(json.dumps(value), names))
    if isinstance(value, Mapping):
        return {key: _swapped(each, names) for key, each in value.items()}
    return [_swapped(each, names) for each in value] if isinstance(value, list) else value
