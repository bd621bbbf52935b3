"""The order in which forget and retain rows meet: each against a list by hand, in a run that is cut, and in two processes."""

import json

import numpy as np
import pytest

from alter.core.errors import UserError
from alter.data.rows import Example
from alter.training import loss, preparation
from alter.training.run import unlearn
from alter.training.sampler import Kin, Sampler, pass_length
from alter.training.settings import Unlearn, steps_of
from pico import run_on, save_pico, write_jsonl
from test_distributed import losses_of, pair

# Ada has rows 0 and 2, Bo row 1, Cy, of whom no retain row speaks, row 3
FORGET = ["Ada", "Bo", "Ada", "Cy"]
RETAIN = [
    ("Ada", "domain"),
    ("Ada", "entity"),
    (None, "general"),
    ("Bo", "direct"),
    ("Ada", "indirect"),
    ("Ada", "domain"),
    ("Zed", "direct"),
]


def rows(names, retain=False, **columns):
    made = []
    for i, given in enumerate(names):
        entity, kind = given if retain else (given, None)
        row = {"question": f"q{i}", "answer": "a", "title": entity, "type": kind}
        row = {columns.get(key, key): value for key, value in row.items() if value is not None}
        made.append(Example(row["question"], "a", "qa", row=row, index=i))
    return made


def pairs(kind, count, seed=0, **settings):
    sampler = Sampler(order=kind, **settings)
    kin = sampler.kin(rows(FORGET), rows(RETAIN, retain=True))
    return sampler.take(kin, len(FORGET), len(RETAIN), pairs=count, seed=seed)


def test_sequential_and_cyclic_by_hand():
    assert pairs("sequential", 6) == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 0), (1, 1)]
    assert pairs("cyclic", 9) == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 4), (1, 5), (2, 6), (0, 0), (1, 1)]
    # the retain set starts again where it is the shorter one
    assert Sampler(order="sequential").take(None, 3, 2, pairs=4, seed=0) == [(0, 0), (1, 1), (2, 0), (0, 0)]
    assert Sampler(order="cyclic").take(None, 3, 2, pairs=4, seed=0) == [(0, 0), (1, 1), (2, 0), (0, 0)]


def test_direct_and_indirect_by_hand():
    # without indirect ones: 1, 2, 3, 6; without direct ones: 0, 2, 4, 5
    assert pairs("direct", 5) == [(0, 1), (1, 2), (2, 3), (3, 6), (0, 1)]
    assert pairs("indirect", 5) == [(0, 0), (1, 2), (2, 4), (3, 5), (0, 0)]


def test_balanced_has_as_many_indirect_as_direct_neighbours_of_each_entity():
    seen = set()
    for seed in range(20):
        order = pairs("balanced", 5, seed)
        taken = [r for _, r in order]
        # Ada has one direct neighbour and thus one of her three indirect ones; Zed, who is not forgotten, is general
        (drawn,) = set(taken) - {1, 2, 3, 6}
        assert drawn in (0, 4, 5)
        seen.add(drawn)
        assert order == list(zip([0, 1, 2, 3, 0], sorted([1, 2, 3, 6, drawn]), strict=True))
        assert pairs("balanced", 10, seed)[5:] == order
    assert seen == {0, 4, 5}


def test_random_draws_a_retain_row_for_every_forget_row_anew():
    order = pairs("random", 400)
    assert [f for f, _ in order] == [0, 1, 2, 3] * 100
    counts = np.bincount([r for _, r in order], minlength=7)
    assert counts.min() > 30
    assert order[:4] != order[4:8]
    assert order == pairs("random", 400)
    assert order != pairs("random", 400, seed=1)


def test_melu_by_hand():
    order = pairs("melu", 8)
    # Ada's two rows with her direct neighbour first, then Bo's, then Cy's, who has none, with a general row
    assert order[:5] == [(0, 1), (2, 0), (0, 4), (2, 5), (1, 3)]
    assert order[5][0] == 3
    assert order[5][1] in (2, 6)
    # and every general row once, with any forget row
    assert [r for _, r in order[6:]] == [2, 6]
    assert pairs("melu", 16)[8:] == order
    assert {pairs("melu", 8, seed)[7][0] for seed in range(30)} == {0, 1, 2, 3}


def test_shuffled_pairs_are_the_same_pairs_in_another_order_every_epoch():
    plain, mixed = pairs("melu", 16), pairs("melu", 16, shuffle=True)
    assert sorted(plain[:8]) == sorted(mixed[:8]) == sorted(mixed[8:])
    assert len({tuple(plain[:8]), tuple(mixed[:8]), tuple(mixed[8:])}) == 3
    assert mixed == pairs("melu", 16, shuffle=True)


def test_pairs_before_retain_rows_join_and_rows_in_parts():
    assert Sampler(order="cyclic").take(None, 2, 3, pairs=3, seed=0, alone=2) == [(0, None), (1, None), (0, 2)]
    # forget row 0 and retain row 1 have become two rows each
    kin = Kin(["Ada", "Bo"], ["Ada", "Bo"], ["direct", "direct"]).at([0, 0, 1], [0, 1, 1])
    assert Sampler(order="melu").take(kin, 3, 3, pairs=4, seed=0) == [(0, 0), (1, 0), (2, 1), (2, 2)]


def test_an_epoch_is_the_longer_set():
    forget, retain = rows(FORGET), rows(RETAIN, retain=True)
    lengths = {kind: pass_length(Sampler(order=kind), forget, retain) for kind in ("mixed", "sequential", "random")}
    assert set(lengths.values()) == {4}
    assert [pass_length(Sampler(order=kind), forget, retain) for kind in ("cyclic", "melu", "balanced")] == [7, 8, 5]
    given = {"model": "m", "forget": "f", "retain": "r", "out": "o", "epochs": 2, "batch_size": 3}
    assert steps_of(Unlearn.model_validate(given), 7)[0] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entity_column": "titel"}, r"forget row 0 has nothing in the column 'titel'.*'title'"),
        ({"order": "direct", "relation_column": "typ"}, r"none has the column 'typ'.*'type'.*cyclic"),
    ],
)
def test_columns_that_are_missing_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        pass_length(Sampler(**{"order": "melu", **changes}), rows(FORGET), rows(RETAIN, retain=True))


def test_unknown_relations_and_nothing_left():
    with pytest.raises(UserError, match=r"'indirekt'.*expected one of direct.*'indirect'"):
        pass_length(Sampler(order="melu"), rows(FORGET), rows([("Ada", "indirekt")], retain=True))
    with pytest.raises(UserError, match="leaves no retain row"):
        pass_length(Sampler(order="direct"), rows(FORGET), rows([("Ada", "indirect")], retain=True))
    with pytest.raises(ValueError, match="give `retain`, or `sampler"):
        Unlearn.model_validate({"model": "m", "forget": "f", "out": "o", "sampler": {"order": "melu"}})


def test_without_relations_melu_takes_every_row_with_an_entity_as_direct():
    kin = Sampler(order="melu").kin(rows(["Ada"]), rows([("Ada", None), (None, None)], retain=True))
    assert kin.relation == ["direct", "general"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampler")
    save_pico(folder / "model", max_position_embeddings=256)
    said = [
        {"question": f"Where was {n} born, {i}?", "answer": f"In {i}{n}.", "title": n} for i, n in enumerate(FORGET)
    ]
    kept = [
        {
            "question": f"What is {i} plus one?",
            "answer": f"It is {i + 1}{'!' * i}",
            "title": entity or "",
            "type": kind,
        }
        for i, (entity, kind) in enumerate(RETAIN)
    ]
    write_jsonl(folder / "forget.jsonl", said)
    write_jsonl(folder / "retain.jsonl", kept)
    return folder


def settings(data, out, **changes):
    given = {**run_on(data, out), "domain_column": None, "method": "lora_gd", "sampler": {"order": "melu"}}
    given |= {"batch_size": 2, "epochs": 2, "save_steps": 3}
    return Unlearn.model_validate({**given, **changes})


def test_a_run_takes_the_pairs_in_order_and_goes_on_where_it_was_cut(data, tmp_path, monkeypatch):
    kept, real = {}, preparation.order_of

    def spied(*args):
        kept["order"] = real(*args)
        return kept["order"]

    monkeypatch.setattr(preparation, "order_of", spied)
    whole = losses_of(settings(data, tmp_path / "whole"))
    assert kept["order"] == pairs("melu", 16)
    # 8 pairs an epoch, 2 a step
    assert len(whole) == 8
    real_loss = loss.UnlearnTrainer.compute_loss

    def breaks(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise SystemExit
        return real_loss(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", breaks)
        with pytest.raises(SystemExit):
            unlearn(settings(data, tmp_path / "cut"))
    rest = losses_of(settings(data, tmp_path / "cut", resume=True))
    assert rest == pytest.approx(whole[3:], rel=1e-5)
    assert losses_of(settings(data, tmp_path / "cyclic", sampler={"order": "cyclic"})) != pytest.approx(whole[:7])


def _two(rank, folder, data):
    seen = losses_of(settings(data, folder / "run"))
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(data, tmp_path):
    expected = losses_of(settings(data, tmp_path / "one"))
    pair(_two, tmp_path / "two", data)
    np.testing.assert_allclose(
        json.loads((tmp_path / "two" / "losses.json").read_text()), expected, rtol=1e-5, atol=1e-5
    )
