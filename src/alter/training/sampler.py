"""Which forget row is paired with which retain row, and in what order: MELU's per-entity modules, and their baselines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError, nearest

if TYPE_CHECKING:
    from alter.data import Example

RELATIONS = {
    "direct": "direct",
    "entity": "direct",
    "indirect": "indirect",
    "domain": "indirect",
    "general": "general",
}
"""What a retain row may be to its entity; `entity` and `domain` are the words of MELU's data."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Kin:
    """Each row's entity, and its relation to it: forget rows by entity, retain rows by entity and relation.

    Attributes:
        forget: entity of each forget row.
        retain: entity of each retain row; None for general knowledge.
        relation: direct, indirect or general, of each retain row.
    """

    forget: list[str]
    retain: list[str | None]
    relation: list[str]

    def at(self, forget: Sequence[int], retain: Sequence[int]) -> Kin:
        """Return the kinship of encoded rows that come from these examples, where a long one has become several rows."""
        return Kin(
            [self.forget[i] for i in forget],
            [self.retain[i] for i in retain],
            [self.relation[i] for i in retain],
        )

    def of(self, *relations: str) -> list[int]:
        """Return the numbers of the retain rows with one of these relations."""
        return [i for i, relation in enumerate(self.relation) if relation in relations]


class Sampler(BaseModel):
    """Which forget row meets which retain row (arXiv:2509.05316 and its code, praveensonu/MELU@0860d08).

    An epoch of `direct`, `indirect`, `balanced` and `cyclic` is as long as the longer of both sets, the shorter one
    starting again; an epoch of `melu` has each module as long as the longer of its entity's two parts, and then each
    general row once; an epoch of the others takes each forget row once. A row of a general kind, or of an entity that is
    not forgotten, is general knowledge.
    """

    model_config = ConfigDict(extra="forbid")

    order: Literal["mixed", "sequential", "random", "direct", "indirect", "balanced", "cyclic", "melu"] = Field(
        "mixed",
        description="mixed: drawn anew every epoch, rows of like length together. sequential: forget row i meets retain row "
        "i. random: a retain row drawn for every forget row. cyclic: both sets in their order, over and over. direct, "
        "indirect: cyclic without indirect, or direct, neighbours. balanced: cyclic with as many indirect as direct "
        "neighbours of each entity. melu: one entity after the other, its forget rows with its own direct, then indirect "
        "neighbours, then general rows with forget rows that are drawn.",
    )
    entity_column: str = Field("title", description="balanced, melu: column of both sets that names the entity.")
    relation_column: str = Field(
        "type",
        description="Column of retain rows: direct (or entity), indirect (or domain), general. melu takes every row with "
        "an entity as direct where no row has it.",
    )
    shuffle: bool = Field(
        False,
        description="Shuffle the pairs of every epoch, as the authors' trainer does; off: modules stay together.",
    )

    @property
    def related(self) -> bool:
        """Whether the order needs each row's entity and relation."""
        return self.order in ("direct", "indirect", "balanced", "melu")

    def kin(self, forget: Sequence[Example], retain: Sequence[Example]) -> Kin | None:
        """Return the rows' entities and relations, if the order needs them, else None.

        Raises:
            UserError: a column is missing, holds an unknown relation, or nothing is left to pair with.
        """
        if not self.related:
            return None
        by_entity = self.order in ("balanced", "melu")
        named = [_text(example.row, self.entity_column) for example in forget]
        if by_entity and None in named:
            raise UserError(
                f"`sampler.order` {self.order} goes by entity, and forget row {named.index(None)} has nothing in the column "
                f"{self.entity_column!r}.{nearest(self.entity_column, forget[0].row)} Give `sampler.entity_column`."
            )
        theirs = [_text(example.row, self.entity_column) for example in retain]
        said = [_text(example.row, self.relation_column) for example in retain]
        if not any(said) and not (self.order == "melu" and any(theirs)):
            raise UserError(
                f"`sampler.order` {self.order} needs retain rows that say what they are to the forget rows, and none has the "
                f"column {self.relation_column!r}.{nearest(self.relation_column, retain[0].row if retain else [])} Give "
                "`sampler.relation_column`, or `sampler.order` cyclic."
            )
        relation = []
        for i, (word, entity) in enumerate(zip(said, theirs, strict=True)):
            if word is not None and word not in RELATIONS:
                raise UserError(
                    f"Retain row {i} is {word!r} in the column {self.relation_column!r}; expected one of "
                    f"{', '.join(RELATIONS)}.{nearest(word, RELATIONS)}"
                )
            own = "general" if word is None and any(said) else RELATIONS[word or "direct"]
            foreign = by_entity and entity not in named
            relation.append("general" if foreign else own)
        found = Kin([name or "" for name in named], theirs, relation)
        if not self._taken(found, len(retain), 0):
            raise UserError(f"`sampler.order` {self.order} leaves no retain row to pair with: give another kind.")
        return found

    def epoch_length(self, kin: Kin | None, forget: int, retain: int) -> int:
        """Return the number of pairs of one epoch over sets of these sizes."""
        return len(self.epoch(kin, forget, retain, seed=0, number=0)) if retain else forget

    def take(
        self, kin: Kin | None, forget: int, retain: int, *, pairs: int, seed: int, alone: int = 0
    ) -> list[tuple[int, int | None]]:
        """Return the first `pairs` pairs of a run, the first `alone` of them without the retain row.

        Args:
            kin: what rows are to each other, where the kind asks for it.
            forget, retain: how many rows there are.
            pairs: how many are wanted.
            seed: of what is drawn.
            alone: pairs before retain rows join.
        """
        found: list[Pair] = []
        number = 0
        while len(found) < pairs:
            found += self.epoch(kin, forget, retain, seed=seed, number=number)
            number += 1
        return [(f, None if i < alone else r) for i, (f, r) in enumerate(found[:pairs])]

    def epoch(self, kin: Kin | None, forget: int, retain: int, *, seed: int, number: int) -> list[Pair]:
        """Return the pairs of epoch `number`; what is drawn for data (`balanced`, `melu`) is the same in all epochs."""
        if self.order == "sequential":
            pairs = [(f, f % retain) for f in range(forget)]
        elif self.order == "random":
            draw = random.Random(f"{seed}/{number}")
            pairs = [(f, draw.randrange(retain)) for f in range(forget)]
        elif self.order == "melu":
            assert kin is not None
            pairs = _modules(kin, random.Random(str(seed)))
        elif self.order == "mixed":
            pairs = [(f, 0) for f in range(forget)]
        else:
            pairs = _cycled(list(range(forget)), self._taken(kin, retain, seed))
        if self.shuffle:
            random.Random(f"{seed}/{number}/order").shuffle(pairs)
        return pairs

    def _taken(self, kin: Kin | None, retain: int, seed: int) -> list[int]:
        """Return the retain rows that a cyclic kind takes, in their order."""
        if kin is None or self.order == "melu":
            return list(range(retain))
        if self.order == "balanced":
            return sorted([*kin.of("direct", "general"), *_as_many(kin, random.Random(str(seed)))])
        return kin.of("general", self.order)


def pass_length(sampler: Sampler, forget: Sequence[Example], retain: Sequence[Example]) -> int:
    """Return the number of pairs of one epoch over these examples.

    Raises:
        UserError: the examples do not say what the order goes by.
    """
    return sampler.epoch_length(sampler.kin(forget, retain), len(forget), len(retain))


def _text(row: Mapping[str, object], column: str) -> str | None:
    """Return a row's value in a column as text; None for an empty one."""
    value = row.get(column)
    return None if value is None or not str(value).strip() else str(value).strip()


def _cycled(forget: Sequence[int], retain: Sequence[int]) -> list[Pair]:
    """Zip two lists, the shorter one repeated until the longer one ends."""
    length = max(len(forget), len(retain))
    return [(forget[i % len(forget)], retain[i % len(retain)]) for i in range(length)]


def _as_many(kin: Kin, draw: random.Random) -> list[int]:
    """Draw as many indirect neighbours of each entity as it has direct ones, or all if there are fewer."""
    taken: list[int] = []
    for entity in dict.fromkeys(kin.forget):
        direct = sum(kin.retain[i] == entity for i in kin.of("direct"))
        indirect = [i for i in kin.of("indirect") if kin.retain[i] == entity]
        taken += draw.sample(indirect, min(direct, len(indirect)))
    return taken


def _modules(kin: Kin, draw: random.Random) -> list[Pair]:
    """Pair each entity's forget rows with its own neighbours, then each general row with a forget row that is drawn (MELU).

    (The authors leave out an entity without neighbours, whose rows would then never be forgotten: here they meet
    general rows, or any where there are none.)
    """
    pairs: list[Pair] = []
    others = kin.of("general") or list(range(len(kin.retain)))
    for entity in dict.fromkeys(kin.forget):
        forget = [i for i, name in enumerate(kin.forget) if name == entity]
        near = [i for kind in ("direct", "indirect") for i in kin.of(kind) if kin.retain[i] == entity]
        pairs += _cycled(forget, near) if near else [(f, draw.choice(others)) for f in forget]
    return pairs + [(draw.randrange(len(kin.forget)), r) for r in kin.of("general")]
