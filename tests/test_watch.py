"""Checks during training: their numbers, the rules, no disturbance, stopping, keeping the best, resuming, mistakes."""

import json
import math
import random
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import children
from alter import cli
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import examples, load_examples
from alter.evaluation.tofu.sets import rows_fingerprint
from alter.models.loading import load_model
from alter.storage.records import Record, write_records
from alter.training import folder, loaded, loss
from alter.training import watcher as watching
from alter.training.rules import KeepLast, LikeRetrained, LikeUnseen, rows_needed, told_apart
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from alter.training.watch import Watch
from alter.training.watched import read_watched
from pico import byte_tokenizer, pico, run_on, write_jsonl

NAMES = ["Ada", "Bo", "Cy", "Di"]
STRANGERS = ["Ed", "Flo", "Gus", "Hy"]


def people(names, seed):
    generator = random.Random(seed)
    rows = []
    for name in names:
        for i in range(6):
            towns = ["".join(generator.choices("aeioukmnrst", k=5)) for _ in range(4)]
            rows.append(
                {
                    "question": f"Town {i} of {name}?",
                    "answer": f"It is {towns[0]}.",
                    "paraphrased_answer": f"{towns[0]} it is.",
                    "perturbed_answer": [f"{town} it is." for town in towns[1:]],
                    "who": name,
                }
            )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model that has learned the forget and the retain rows by heart, and has never seen the holdout rows."""
    folder = tmp_path_factory.mktemp("watch")
    forget, holdout = people(NAMES, 0), people(STRANGERS, 1)
    retain = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(40)]
    for name, rows in (("forget", forget), ("holdout", holdout), ("retain", retain)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    model, tokenizer = pico(), byte_tokenizer()
    model.save_pretrained(folder / "unseen")
    tokenizer.save_pretrained(folder / "unseen")
    rows = [encode(tokenizer, example) for example in examples(forget) + examples(retain)]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [257] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=(ids != 257).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def settings(data, out, watched=None, **changes):
    given = dict(
        **run_on(data, out),
        objective={"kind": "without_truth", "hinge": 1.0},
        epochs=4,
        batch_size=8,
        save_steps=2,
        adapter={"r": 4, "entropy_quantile": 0.5, "alter_dropout": 0.1},
        router_fit={"steps": 50, "background": False},
        learning_rate_experts=2e-2,
        learning_rate_shared=1e-3,
        watch=watched or {},
    )
    return Unlearn.model_validate({**given, **changes})


def by_holdout(data, **changes):
    rule = {"kind": "holdout", "margin": 0.2, "utility_loss": 0.9}
    given = {"every_steps": 2, "holdout": str(data / "holdout.jsonl"), "rule": rule}
    return {**given, **changes}


SLOWLY = {"objective": {"kind": "gradient_ascent"}, "learning_rate_experts": 1e-2, "epochs": 10, "beta": 0.5}
"""A run that passes by the holdout's level and goes on to over-forgetting."""


def weights(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def seen(out):
    return json.loads((out / "run.json").read_text())["watch"]


# ---- statistics -----------------------------------------------------------------------------------------------------


def naive_told_apart(forget, holdout):
    """All pairs for the AUC; the normal approximation with tie and continuity correction from its textbook formula."""
    n, m = len(forget), len(holdout)
    wins = math.fsum(1.0 if y > x else 0.5 if y == x else 0.0 for x in forget for y in holdout)
    everything = [*forget, *holdout]
    ties = math.fsum(everything.count(x) ** 3 - everything.count(x) for x in set(everything))
    total = n + m
    variance = n * m / 12 * ((total + 1) - ties / (total * (total - 1)))
    if variance <= 0:
        return wins / (n * m), 1.0
    z = (wins - n * m / 2 - 0.5) / math.sqrt(variance)
    return wins / (n * m), 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 7), (5, 3), (24, 31)])
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_told_apart_is_its_naive_twin(sizes, digits):
    generator = random.Random(sum(sizes) + digits)
    x, y = ([round(generator.gauss(0.3 * side, 1), digits) for _ in range(sizes[side])] for side in (0, 1))
    assert told_apart(x, y) == pytest.approx(naive_told_apart(x, y), abs=1e-12)


def naive_clustered(forget, holdout, forget_groups, holdout_groups):
    """Each row's share of won pairs; the variance of a mean of groups, from sums over each group; Student's t."""
    from scipy.stats import t

    def won(x, y):
        return 1.0 if y > x else 0.5 if y == x else 0.0

    n, m = len(forget), len(holdout)
    auc = math.fsum(won(x, y) for x in forget for y in holdout) / (n * m)
    shares = [[math.fsum(won(x, y) for y in holdout) / m for x in forget]]
    shares.append([math.fsum(won(x, y) for x in forget) / n for y in holdout])
    variance, groups = 0.0, 0
    for share, labels in zip(shares, (forget_groups, holdout_groups), strict=True):
        names = sorted(set(labels))
        squares = 0.0
        for name in names:
            total = math.fsum(v - auc for v, label in zip(share, labels, strict=True) if label == name)
            squares += total**2
        variance += len(names) / (len(names) - 1) * squares / len(share) ** 2
        groups += len(names)
    if variance < 1e-18:
        return auc, 0.0 if auc > 0.5 else 1.0
    return auc, 1 - t.cdf((auc - 0.5) / math.sqrt(variance), groups - 2)


@pytest.mark.parametrize("sizes", [(3, 4), (12, 7), (24, 31)])
@pytest.mark.parametrize("digits", [0, 9])
def test_told_apart_in_groups_is_its_naive_twin(sizes, digits):
    generator = random.Random(sum(sizes) + digits)
    x, y = ([round(generator.gauss(0.3 * side, 1), digits) for _ in range(sizes[side])] for side in (0, 1))
    groups = tuple([f"{side}{i % (2 + side)}" for i in range(sizes[side])] for side in (0, 1))
    assert told_apart(x, y, groups) == pytest.approx(naive_clustered(x, y, *groups), abs=1e-9)
    assert told_apart([1, 1], [1, 1], (["a", "b"], ["c", "d"])) == (0.5, 1.0)
    assert told_apart([1, 1], [2, 2], (["a", "b"], ["c", "d"])) == (1.0, 0.0)
    assert told_apart([2, 2], [1, 1], (["a", "b"], ["c", "d"])) == (0.0, 1.0)
    with pytest.raises(ValueError, match="two or more"):
        told_apart(x, y, (["a"] * sizes[0], groups[1]))


def test_rows_that_resemble_each_other_do_not_count_as_many():
    """Authors of ten rows each, no difference between the sides: only with groups are 5 % rejected."""
    generator = np.random.default_rng(0)
    names = [str(i // 10) for i in range(100)]
    rejected = {None: 0, (tuple(names), tuple(names)): 0}
    for _ in range(400):
        x, y = (np.repeat(generator.normal(size=10), 10) + generator.normal(size=100) for _ in range(2))
        for groups in rejected:
            rejected[groups] += told_apart(x, y, groups)[1] < 0.05
    plain, grouped = rejected.values()
    assert plain > 400 * 0.15
    assert 400 * 0.02 < grouped < 400 * 0.08


def test_told_apart_of_equal_scores_and_of_none():
    assert told_apart([1, 1, 1], [1, 1]) == (0.5, 1.0)
    assert told_apart([1, 2], [3, 4])[0] == 1.0
    for x, y in (([], [1]), ([1], []), ([math.nan], [1])):
        with pytest.raises(ValueError, match="empty or hold NaN"):
            told_apart(x, y)


@pytest.mark.parametrize(
    ("n", "margin", "level"), [(200, 0.05, 0.05), (24, 0.2, 0.05), (10, 0.2, 0.05), (400, 0.1, 0.01)]
)
def test_rows_needed_is_the_first_number_that_resolves_the_margin(n, margin, level):
    z = {0.05: 1.6448536269514722, 0.01: 2.3263478740408408}[level]
    enough = [m for m in range(1, 3000) if math.sqrt((n + m + 1) / (12 * n * m)) * z <= margin]
    assert rows_needed(n, margin, level) == (enough[0] if enough else None)


def test_unseen_rows_pass_and_known_ones_fail_at_the_promised_rate():
    """With the rows that `rows_needed` asks for: a gap of twice the margin is passed in about `level` of the cases."""
    generator, rule = np.random.default_rng(0), LikeUnseen(margin=0.1)
    m = rows_needed(60, 0.1, 0.05)
    shift = math.sqrt(2) * 0.5244005127080407  # P(y > x) = 0.7
    passed = {0.0: 0, shift: 0}
    for gap in passed:
        for _ in range(1000):
            auc, p = told_apart(generator.normal(size=60), gap + generator.normal(size=m))
            passed[gap] += rule._state({"auc_loss": auc, "p_loss": p}) < 2
    assert passed[shift] / 1000 < 0.06
    assert passed[0.0] / 1000 > 0.93


# ---- rules ----------------------------------------------------------------------------------------------------------


def naive_holdout(checks, rule):
    """The rule of `LikeUnseen` read sentence by sentence."""
    floor = (1 - rule.utility_loss) * checks[0]["retain_probability"]
    groups = {"satisfied": [], "over": [], "known": []}
    for check in checks[1:]:
        if check["retain_probability"] < floor:
            continue
        if check["auc_loss"] > 0.5 + rule.margin or check["p_loss"] < rule.level:
            groups["known"].append(check)
        elif check["auc_loss"] < 0.5 - rule.margin:
            groups["over"].append(check)
        else:
            groups["satisfied"].append(check)
    for name, members in groups.items():
        best = None
        for check in members:
            if best is None or abs(check["auc_loss"] - 0.5) < abs(best["auc_loss"] - 0.5):
                best = check
        if best is not None:
            return finish(checks, rule, best, name == "satisfied")
    return finish(checks, rule, None, False)


def naive_reference(checks, rule):
    floor = (1 - rule.utility_loss) * checks[0]["retain_probability"]
    best = None
    for check in checks[1:]:
        if check["retain_probability"] < floor:
            continue
        if best is None or check["forget_quality_statistic"] < best["forget_quality_statistic"]:
            best = check
    return finish(checks, rule, best, best is not None and best["forget_quality"] >= rule.level)


def finish(checks, rule, best, good):
    if best is None:
        best = checks[1]
        for check in checks[2:]:
            if check["retain_probability"] > best["retain_probability"]:
                best = check
        return best["step"], False, False
    after = 0
    for check in checks:
        if check["step"] > best["step"]:
            after += 1
    return best["step"], good, good and after >= rule.patience


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_rules_are_their_naive_twins(patience):
    generator = random.Random(patience)
    unseen, retrained = LikeUnseen(patience=patience), LikeRetrained(patience=patience)
    outcomes = set()
    for _ in range(400):
        checks = [{"step": 0, "retain_probability": 0.9}]
        for k in range(1, generator.randint(2, 7)):
            checks.append(
                {
                    "step": 5 * k,
                    "retain_probability": generator.choice([0.9, 0.86, 0.855, 0.84, 0.5]),
                    "auc_loss": generator.choice([0.9, 0.6, 0.55, 0.53, 0.5, 0.48, 0.3]),
                    "p_loss": generator.choice([1e-9, 0.04, 0.05, 0.3]),
                    "forget_quality": (quality := generator.choice([1e-12, 0.02, 0.05, 0.4])),
                    "forget_quality_statistic": 1 - quality,
                }
            )
        for rule, naive in ((unseen, naive_holdout), (retrained, naive_reference)):
            verdict = rule.judge(checks)
            assert (verdict.step, verdict.met, verdict.stop) == naive(checks, rule)
            outcomes.add((rule.kind, verdict.met, verdict.stop))
        last = KeepLast().judge(checks)
        assert (last.step, last.stop) == (checks[-1]["step"], False)
    # with no patience a satisfied rule always stops
    assert len(outcomes) == (4 if patience == 0 else 6)


def test_reasons_name_what_is_wrong():
    def why(rule, **last):
        return rule.judge([{"step": 0, "retain_probability": 0.9}, {"step": 5, "retain_probability": 0.9, **last}]).why

    assert "known like holdout rows" in why(LikeUnseen(), auc_loss=0.52, p_loss=0.3)
    assert "0.520 by loss (p 0.3), 0.718 by min_k" in why(LikeUnseen(), auc_loss=0.52, p_loss=0.3, auc_min_k=0.718)
    assert "still better known" in why(LikeUnseen(), auc_loss=0.52, p_loss=0.01)
    assert "less known" in why(LikeUnseen(), auc_loss=0.3, p_loss=1.0)
    overshot = LikeUnseen().judge(
        [
            {"step": step, "retain_probability": 0.9, "auc_loss": auc, "p_loss": p}
            for step, auc, p in ((0, 1.0, 0.0), (5, 0.8, 1e-9), (10, 0.1, 1.0))
        ]
    )
    assert (overshot.step, overshot.met, overshot.stop) == (10, False, False)
    assert "lost least" in why(LikeUnseen(), auc_loss=0.5, p_loss=0.5, retain_probability=0.1)
    assert "still below" in why(LikeRetrained(), forget_quality=0.01, forget_quality_statistic=0.3)


# ---- one check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [None, "who"])
def test_a_check_is_what_separate_passes_give(data, tmp_path, column):
    """Each number once more: rows one by one through the model, then the metric's definition in loops."""
    from reference import naive_exact_memorization, naive_loss, naive_min_k, naive_truth_ratio

    run = settings(data, tmp_path, by_holdout(data, forget=str(data / "forget.jsonl"), forget_rows=23, retain_rows=7))
    watched, left = read_watched(
        run.watch,
        load_examples(run.forget),
        load_examples(run.retain),
        domain_column=column,
        seed=3,
        steps=12,
        steps_per_epoch=3,
    )
    assert len(watched.forget) == 23
    assert len(watched.retain) == 7
    assert len(left) == 33
    assert not {row.prompt for row in left} & {row.prompt for row in watched.retain}
    model, tokenizer = load_model(run.model, device="cpu")
    watcher = watching.Watcher(run.watch, watched, tokenizer, max_length=128, folder=tmp_path, device="cpu")
    got = watcher.check(model)

    def one(example, answer=None):
        row = encode(tokenizer, example, answer=answer)
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        places = [i for i, label in enumerate(row.labels) if label != -100]
        values = [logp[i - 1, row.labels[i]].item() for i in places]
        return values, [int(logp[i - 1].argmax()) == row.labels[i] for i in places]

    scores = {}
    for name, rows in (("forget", watched.forget), ("retain", watched.retain), ("holdout", watched.holdout)):
        answers = [one(row) for row in rows]
        losses = [naive_loss(logp) for logp, _ in answers]
        right = [naive_exact_memorization(correct) for _, correct in answers]
        assert got[f"{name}_loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-5)
        assert got[f"{name}_probability"] == pytest.approx(sum(math.exp(-x) for x in losses) / len(rows), rel=1e-5)
        assert got[f"{name}_exact_memorization"] == pytest.approx(sum(right) / len(rows), rel=1e-6)
        scores[name] = {
            "loss": [naive_loss(logp[:-1]) for logp, _ in answers],
            "min_k": [naive_min_k(logp[:-1], 0.4) for logp, _ in answers],
            "exact_memorization": [1 - x for x in right],
        }
        if name != "retain":
            good = [naive_loss(one(row, row.row["paraphrased_answer"])[0]) for row in rows]
            bad = [[naive_loss(one(row, text)[0]) for text in row.row["perturbed_answer"]] for row in rows]
            ratios = naive_truth_ratio(good, bad)
            scores[name]["truth_ratio"] = ratios
            closeness = [min(x, 1 / x) for x in ratios]
            assert got[f"{name}_truth_ratio"] == pytest.approx(sum(closeness) / len(rows), rel=1e-5)
    assert (watcher.groups is None) == (column is None)
    for score in scores["forget"]:
        pair = scores["forget"][score], scores["holdout"][score]
        auc, p = naive_told_apart(*pair)
        if column is not None:
            auc, p = naive_clustered(
                *pair, *([row.row["who"] for row in rows] for rows in (watched.forget, watched.holdout))
            )
        assert got[f"auc_{score}"] == pytest.approx(auc, abs=1e-9), score
        assert got[f"p_{score}"] == pytest.approx(p, rel=1e-6, abs=1e-9), score
    assert got["auc_loss"] > 0.9


def test_calibration_counts_the_loss_beyond_another_models(data, tmp_path):
    from reference import naive_loss, naive_min_k

    run = settings(data, tmp_path, by_holdout(data))
    sets = [load_examples(path) for path in (run.forget, run.retain)]
    watched, _ = read_watched(run.watch, *sets, seed=0, steps=12, steps_per_epoch=3)
    # the other way round, so that no score is at its end: how the blank model looks beside the one that knows
    run = settings(data, tmp_path, by_holdout(data, calibrate=str(data / "model")))
    model, tokenizer = load_model(str(data / "unseen"), device="cpu")
    watcher = watching.Watcher(run.watch, watched, tokenizer, max_length=128, folder=tmp_path, device="cpu")
    got = watcher.check(model)
    other, _ = load_model(str(data / "model"), device="cpu")

    def logprobs(network, rows):
        encoded = [encode(tokenizer, row) for row in rows]
        found = [watching.score(network, [row], pad_token_id=257, progress=False).logprob[0] for row in encoded]
        return [values[:-1].tolist() for values in found]

    both = {
        name: list(zip(logprobs(model, rows), logprobs(other, rows), strict=True))
        for name, rows in (("forget", watched.forget), ("holdout", watched.holdout))
    }
    for score, naive in (("loss", naive_loss), ("min_k", lambda values: naive_min_k(values, 0.4))):
        beyond = {name: [naive(x) - naive(y) for x, y in rows] for name, rows in both.items()}
        auc, p = naive_told_apart(beyond["forget"], beyond["holdout"])
        assert got[f"auc_{score}"] == pytest.approx(auc, abs=1e-9)
        assert got[f"p_{score}"] == pytest.approx(p, rel=1e-6)
        assert auc != told_apart(*([naive(x) for x, _ in both[name]] for name in ("forget", "holdout")))[0]
    changed = byte_tokenizer(eos_token="<unused258>")
    with pytest.raises(UserError, match="other tokens than the model"):
        watching.Watcher(run.watch, watched, changed, max_length=128, folder=tmp_path, device="cpu")


def test_a_check_leaves_modes_and_generators_alone(data, tmp_path):
    leak = {"samples": 3, "questions": 2, "max_new_tokens": 4, "hit": {"kind": "rouge"}}
    run = settings(data, tmp_path, by_holdout(data, replies=2, reply_tokens=5, leak=leak))
    sets = [load_examples(path) for path in (run.forget, run.retain)]
    watched, _ = read_watched(run.watch, *sets, seed=0, steps=12, steps_per_epoch=3)
    model, tokenizer = load_model(run.model, device="cpu")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    watcher = watching.Watcher(run.watch, watched, tokenizer, max_length=128, folder=tmp_path, device="cpu")

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    got = watcher.check(model)
    assert 0 <= got["forget_rouge"] <= 1
    assert 0 <= got["leak@1"] <= got["leak@2"] <= got["leak@3"] <= 1
    assert draw() == expected
    assert [module.training for module in model.modules()] == modes
    with watching.undisturbed():
        draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    with watching.undisturbed():
        draw()
    assert draw() == expected


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}]
)
def test_a_watched_run_trains_what_an_unwatched_one_trains(data, tmp_path, changes):
    """With retain rows of its own, a watch that never stops changes no bit of the weights, dropout included."""
    extra = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(50, 60)]
    path = write_jsonl(tmp_path / "extra.jsonl", extra)
    changes = {"epochs": 2, **changes}
    plain = unlearn(settings(data, tmp_path / "plain", **changes))
    given = by_holdout(data, every_steps=1, retain=str(path), rule={"kind": "none"}, replies=2, reply_tokens=5)
    watched = unlearn(settings(data, tmp_path / "watched", given, **changes))
    assert equal(weights(plain / "adapter"), weights(watched / "adapter"))
    assert seen(plain) is None
    record = seen(watched)
    assert [check["step"] for check in record["checks"]] == list(range(len(record["checks"])))
    assert record["kept"]["step"] == len(record["checks"]) - 1 == (3 if "bf16" in changes else 6)
    log = json.loads((watched / "run.json").read_text())["log"]
    assert log
    assert not any("watch" in entry for entry in log)


def test_rows_set_aside_are_not_trained_on(data, tmp_path):
    """A run that sets rows aside is the run without them in its retain set; so nothing else has seen them either."""
    rows = [json.loads(line) for line in (data / "retain.jsonl").read_text().splitlines()]
    watched = unlearn(settings(data, tmp_path / "watched", {"every_steps": 2, "retain_rows": 100}, max_steps=5))
    assert [check["step"] for check in seen(watched)["checks"]] == [0, 2, 4, 5]
    assert seen(watched)["rows"]["retain"] == len(rows) // 5
    aside, left = read_watched(
        Watch(every_steps=6),
        load_examples(str(data / "forget.jsonl")),
        examples(rows),
        seed=0,
        steps=12,
        steps_per_epoch=3,
    )
    assert len(aside.retain) + len(left) == len(rows)
    path = write_jsonl(tmp_path / "left.jsonl", [row.row for row in left])
    plain = unlearn(settings(data, tmp_path / "plain", retain=str(path), max_steps=5))
    assert equal(weights(plain / "adapter"), weights(watched / "adapter"))


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    return unlearn(
        settings(data, tmp_path_factory.mktemp("stopped") / "run", by_holdout(data), keep_working=True, **SLOWLY)
    )


def test_the_holdout_rule_stops_and_the_adapter_is_that_of_its_step(data, stopped):
    record = seen(stopped)
    kept = record["kept"]
    assert record["stopped_early"]
    assert kept["met"]
    assert json.loads((stopped / "run.json").read_text())["steps"] == kept["step"] < 30
    before, last = record["checks"][-2:]
    assert before["auc_loss"] > 0.7 or before["p_loss"] < 0.05
    assert last["auc_loss"] <= 0.7
    assert last["p_loss"] >= 0.05
    assert last["step"] == kept["step"]
    # measured once more, on the adapter as a user loads it
    run = settings(data, stopped, by_holdout(data))
    sets = [load_examples(path, domain_column=column) for path, column in ((run.forget, "who"), (run.retain, None))]
    watched, _ = read_watched(run.watch, *sets, domain_column="who", seed=0, steps=12, steps_per_epoch=3)
    model, tokenizer = load_model(run.model, str(stopped / "adapter"), device="cpu")
    watcher = watching.Watcher(run.watch, watched, tokenizer, max_length=128, folder=stopped, device="cpu")
    for name, value in watcher.check(model).items():
        assert value == pytest.approx(last[name], rel=1e-4), name


def test_without_stopping_the_best_step_is_kept_in_the_end(data, stopped, tmp_path):
    out = unlearn(
        settings(data, tmp_path / "run", by_holdout(data, stop=False), **{**SLOWLY, "epochs": 6}, keep_working=True)
    )
    record = seen(out)
    assert record["checks"][-1]["step"] == 18
    assert not record["stopped_early"]
    assert record["kept"]["step"] < 18
    assert [path.name for path in (out / "kept").iterdir()] == [f"step-{record['kept']['step']}"]
    assert equal(weights(out / "adapter"), weights(out / "kept" / f"step-{record['kept']['step']}"))
    newest = folder.last_whole_checkpoint(out / "checkpoints")
    assert not equal(weights(out / "adapter"), weights(newest))


BROKEN = {"epochs": 4, "save_steps": 4}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    given = by_holdout(data, every_steps=3, stop=False)
    return unlearn(settings(data, tmp_path_factory.mktemp("straight") / "run", given, **BROKEN))


@pytest.mark.parametrize("step", [3, 8, 11])
def test_a_broken_run_goes_on_with_the_same_decisions(data, straight, tmp_path, monkeypatch, step):
    """Broken before the first checkpoint, right after one, and after a check that no checkpoint knows of."""
    given, changes = by_holdout(data, every_steps=3, stop=False), BROKEN
    real = loss.UnlearnTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", broken)
        with pytest.raises(KeyboardInterrupt):
            unlearn(settings(data, tmp_path / "broken", given, **changes))
    resume = folder.last_whole_checkpoint(tmp_path / "broken" / "checkpoints") is not None
    assert resume == (step > 4)
    again = unlearn(settings(data, tmp_path / "broken", given, resume=True, **changes))
    first, second = seen(straight), seen(again)
    assert first["checks"] == second["checks"]
    assert first["kept"] == second["kept"]
    assert equal(weights(straight / "adapter"), weights(again / "adapter"))


def test_a_run_that_had_stopped_resumes_to_the_same_adapter(data, stopped, tmp_path):
    before = seen(stopped)
    again = unlearn(settings(data, stopped, by_holdout(data), resume=True, **SLOWLY))
    assert seen(again)["checks"] == before["checks"]
    assert seen(again)["kept"] == before["kept"]


def test_resuming_with_another_watch_is_refused(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", {"every_steps": 2}, epochs=1))
    with pytest.raises(UserError, match=r"watch\.every_steps was 2 and is 3"):
        unlearn(settings(data, out, {"every_steps": 3}, resume=True, epochs=1))
    plain = unlearn(settings(data, tmp_path / "plain", epochs=1))
    with pytest.raises(UserError, match=r"watch\.every_steps was None and is 2"):
        unlearn(settings(data, plain, {"every_steps": 2}, resume=True, epochs=1))


@pytest.mark.slow
def test_a_killed_run_keeps_its_best_adapter_and_resumes(data, tmp_path):
    given = by_holdout(data, every_steps=1, stop=False)
    changes = {"epochs": 7, "save_steps": 3, "closing_rows": 0}
    straight = unlearn(settings(data, tmp_path / "straight", given, **changes))
    out = tmp_path / "broken"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings(data, out, given, **changes).model_dump()))
    process = children.Child("unlearn", recipe)
    until = time.time() + 120
    while len(list((out / "checkpoints").glob("checkpoint-*"))) < 2:
        assert time.time() < until, "no checkpoint appeared"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert any(weights(path) for path in (out / "kept").glob("step-*"))
    assert cli.main(["unlearn", str(recipe), "--resume"]) == 0
    assert seen(out)["checks"] == seen(straight)["checks"]
    assert seen(out)["kept"] == seen(straight)["kept"]
    assert equal(weights(out / "adapter"), weights(straight / "adapter"))


def records_of(path, ratios, rows, **extra):
    extra = {"split": "forget10", "fingerprint": rows_fingerprint(rows)} | extra
    ratio = Record("retrained", "forget_truth_ratio", 0.5, len(ratios), "strict", True, list(ratios), extra)
    write_records(path, [ratio])
    return str(path)


def test_the_reference_rule_keeps_the_step_nearest_to_the_retrained_model(data, tmp_path):
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    run = settings(data, tmp_path, by_holdout(data, forget=str(data / "forget.jsonl")))
    sets = [load_examples(path) for path in (run.forget, run.retain)]
    watched, _ = read_watched(run.watch, *sets, seed=0, steps=12, steps_per_epoch=3)
    model, tokenizer = load_model(str(data / "unseen"), device="cpu")
    watcher = watching.Watcher(run.watch, watched, tokenizer, max_length=128, folder=tmp_path, device="cpu")
    scores = watching.score(model, watcher.encoded, pad_token_id=257, progress=False)
    rated = watching.metrics.likelihood.average_loss(scores[watcher.where["forget_rated"]].logprob).reshape(
        len(rows), -1
    )
    ratios = watching.metrics.likelihood.truth_ratio(rated[:, 0], rated[:, 1:])
    path = records_of(tmp_path / "retrained.json", ratios, rows)
    given = {
        "every_steps": 2,
        "forget": str(data / "forget.jsonl"),
        "retain_records": path,
        "rule": {"kind": "reference", "utility_loss": 0.9, "patience": 2},
    }
    record = seen(unlearn(settings(data, tmp_path / "run", given, epochs=4)))
    checks = record["checks"]
    assert checks[0]["forget_quality"] < 0.05
    best = min(checks[1:], key=lambda check: (check["forget_quality_statistic"], check["step"]))
    assert record["kept"]["step"] == best["step"]
    assert record["kept"]["met"] == (best["forget_quality"] >= 0.05)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"every_steps": 1, "every_epoch": 0.5}, "not both"),
        ({"holdout": "x"}, "nothing is watched without"),
        ({"every_steps": 1, "rule": {"kind": "holdout"}}, "needs `watch.holdout`"),
        ({"every_steps": 1, "rule": {"kind": "reference"}}, "needs `watch.retain_records`"),
        ({"every_steps": 1, "retain_records": "x"}, "watch.forget"),
        ({"every_steps": 1, "calibrate": "x"}, "watch.holdout"),
        ({"every_steps": 0}, "greater than or equal to 1"),
        ({"every_steps": 1, "rule": {"kind": "holdout", "margin": 0.5}, "holdout": "x"}, "less than 0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Watch.model_validate(given)


def refused(data, tmp_path, watched, **changes):
    with pytest.raises(UserError) as caught:
        unlearn(settings(data, tmp_path / "run", watched, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "adapter").exists()
    return str(caught.value)


def test_data_that_cannot_work_is_refused_before_the_model_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    forget, holdout, retain = (
        [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("forget", "holdout", "retain")
    )

    def file(name, rows):
        return str(write_jsonl(tmp_path / f"{name}.jsonl", rows))

    def say(watched, **changes):
        return refused(data, tmp_path, watched, **changes)

    leaky = file("leaky", [*holdout, {**forget[3], "answer": forget[3]["answer"].upper()}])
    assert "row 24 = forget row 3" in say(by_holdout(data, holdout=leaky))
    leaky = file("leaky", [*holdout, retain[5]])
    assert "row 24 = retain row 5" in say(by_holdout(data, holdout=leaky))
    assert "= retain row 0" in say(by_holdout(data, retain=file("same", retain[:3])))
    assert "= forget row 0" in say(by_holdout(data, retain=file("same", forget[:3])))
    few = say(by_holdout(data, holdout=file("few", holdout[:5])))
    assert f"at least {rows_needed(24, 0.2, 0.05)} holdout rows" in few
    assert "margin of 0." in few
    sharp = by_holdout(data, rule={"kind": "holdout", "margin": 0.05})
    assert "181 of each" in say(sharp)
    assert "every_steps is 13, but the run has 12 steps" in say({"every_steps": 13})
    assert "every_epoch is 5.0, but the run has 12 steps" in say({"every_epoch": 5})
    assert "the run has 3 steps" in say({"every_steps": 4}, max_steps=3)
    assert "too few to set one in 5 aside" in say({"every_steps": 1}, retain=file("tiny", retain[:4]))
    assert "are not in the forget set" in say({"every_steps": 1, "forget": str(data / "holdout.jsonl")})
    bare = [{key: row[key] for key in ("question", "answer")} for row in forget]
    assert "lacks paraphrased_answer" in say({"every_steps": 1, "forget": file("bare", bare)})
    rated = by_holdout(data, holdout=file("bare", bare_holdout(holdout)))
    rated["rule"] = {**rated["rule"], "score": "truth_ratio"}
    assert "truth_ratio needs paraphrased_answer" in say(rated)
    texts = file("texts", [{"text": f"Once {i}"} for i in range(30)])
    assert "plain text" in say(by_holdout(data, holdout=texts, replies=1))
    given = {"every_steps": 1, "forget": str(data / "forget.jsonl"), "rule": {"kind": "reference"}}
    other = records_of(tmp_path / "other.json", [0.5] * 24, holdout)
    assert "(forget10) that are not the 24 rows" in say({**given, "retain_records": other})
    other = records_of(tmp_path / "other.json", [0.5] * 20, forget)
    assert "truth ratios of 20 rows" in say({**given, "retain_records": other})
    assert "No file at" in say({**given, "retain_records": str(tmp_path / "none.json")})


def bare_holdout(rows):
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def test_a_model_that_never_knew_the_forget_set_is_refused(data, tmp_path):
    said = refused(data, tmp_path, by_holdout(data), model=str(data / "unseen"))
    assert "Before any training" in said
    assert "never knew" in said


def test_the_command_line_knows_the_watch(data, tmp_path, capsys):
    line = ["unlearn", "--out", str(tmp_path / "run"), "--domain-column", "who", "--device", "cpu"]
    for name in ("forget", "retain"):
        line += [f"--{name}", str(data / f"{name}.jsonl")]
    line += ["--model", str(data / "model"), "--epochs", "1", "--router-fit.steps", "5", "--method", "alter"]
    line += ["--closing-rows", "0"]
    wanted = [*line, "--watch.every-epoch", "0.5", "--watch.rule.kind", "holdout"]
    assert cli.main(wanted) == 2
    assert "needs --watch.holdout" in capsys.readouterr().err
    assert cli.main([*line, "--watch.rule.kind", "hold"]) == 2
    assert "holdout" in capsys.readouterr().err
    wanted += ["--watch.holdout", str(data / "holdout.jsonl"), "--watch.rule.margin", "0.2"]
    assert cli.main(wanted) == 0
    shown = capsys.readouterr().err
    assert "step 3/6:" in shown
    assert "best so far step 3" in shown
    assert "Watched" in shown
