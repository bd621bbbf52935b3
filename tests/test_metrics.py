"""Metrics against their naive twins, their limits, and their errors."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import reference
from alter import metrics
from alter.metrics.likelihood import ForgetQuality
from alter.metrics.membership import relative_difference

LOSS = st.floats(0.01, 20)
BOOLS = st.lists(st.booleans(), min_size=1, max_size=12)
LOGPROB = st.lists(st.floats(-20, 0), min_size=2, max_size=12)


def pairs(width):
    return st.lists(st.tuples(LOSS, st.lists(LOSS, min_size=width, max_size=width)), min_size=1, max_size=6)


def ragged(rng, n=7, low=2, high=30):
    return [-rng.exponential(2, size=rng.integers(low, high)) for _ in range(n)]


# ---- likelihood


@given(st.lists(LOGPROB, min_size=1, max_size=5))
def test_average_loss_and_probability(rows):
    expected = [reference.naive_loss(row) for row in rows]
    loss = metrics.likelihood.average_loss([np.array(row, dtype=np.float32).astype(np.float64) for row in rows])
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(metrics.likelihood.probability(expected), [math.exp(-x) for x in expected], rtol=1e-12)


def test_average_loss_refuses_a_row_without_tokens():
    with pytest.raises(ValueError, match="row 1 has no labelled token"):
        metrics.likelihood.average_loss([[-1.0], []])


@given(pairs(3), st.booleans())
def test_normalised_probability(rows, compat):
    loss, wrong = [r[0] for r in rows], [r[1] for r in rows]
    found = metrics.likelihood.normalised_probability(loss, wrong, compat=compat)
    np.testing.assert_allclose(found, reference.naive_normalised(loss, wrong, 1e-10 if compat else 0), rtol=1e-9)
    assert ((found >= 0) & (found <= 1)).all()


@given(pairs(5), st.booleans())
def test_truth_ratio(rows, compat):
    loss, wrong = [r[0] for r in rows], [r[1] for r in rows]
    found = metrics.likelihood.truth_ratio(loss, wrong, compat=compat)
    np.testing.assert_allclose(found, reference.naive_truth_ratio(loss, wrong, 1e-10 if compat else 0), rtol=1e-9)


def test_truth_ratio_is_geometric_and_not_arithmetic():
    wrong = [[0.0, 4.0]]
    assert metrics.likelihood.truth_ratio([0.0], wrong)[0] == pytest.approx(math.exp(-2))
    assert metrics.likelihood.truth_ratio([0.0], wrong)[0] != pytest.approx((1 + math.exp(-4)) / 2)


def test_ratios_stay_finite_where_probabilities_underflow():
    assert metrics.likelihood.normalised_probability([900.0], [[900.0, 900.0, 900.0]])[0] == pytest.approx(0.25)
    assert metrics.likelihood.truth_ratio([1000.0], [[1000.0] * 5])[0] == 1.0
    assert np.isfinite(metrics.likelihood.truth_ratio([5000.0], [[0.0] * 5])).all()
    assert metrics.likelihood.truth_ratio([0.0], [[5000.0] * 5])[0] > 0
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        metrics.likelihood.normalised_probability([0.0, 5000.0], [[5000.0] * 3, [0.0] * 3])


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_aggregations_of_the_truth_ratio(ratios):
    close = metrics.likelihood.closeness_to_one(ratios)
    np.testing.assert_allclose(close, [min(x, 1 / x) for x in ratios])
    np.testing.assert_allclose(close, metrics.likelihood.closeness_to_one([1 / x for x in ratios]), rtol=1e-9)
    np.testing.assert_allclose(metrics.likelihood.truthfulness(ratios), [max(0, 1 - x) for x in ratios])
    np.testing.assert_allclose(
        metrics.likelihood.closeness_to_one(ratios, compat=True), [min(x, 1 / (x + 1e-10)) for x in ratios], rtol=1e-12
    )


def test_forget_quality():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=40), rng.lognormal(0.7, 1, size=33)
    found = metrics.likelihood.forget_quality(a, b)
    assert found.statistic == pytest.approx(reference.naive_ks(a, b), abs=1e-12)
    assert found.pvalue == stats.ks_2samp(a, b, method="exact").pvalue
    assert found.log10 == pytest.approx(math.log10(found.pvalue))
    assert metrics.likelihood.forget_quality(1 / a, 1 / b).pvalue == pytest.approx(found.pvalue, rel=1e-9)
    assert metrics.likelihood.forget_quality(a, a) == ForgetQuality(1.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan]])
def test_forget_quality_refuses_what_it_cannot_compare(bad):
    with pytest.raises(ValueError, match="the model are empty or hold NaN"):
        metrics.likelihood.forget_quality(bad, [1.0])
    with pytest.raises(ValueError, match="the reference are empty or hold NaN"):
        metrics.likelihood.forget_quality([1.0], bad)


def test_model_utility():
    nine = np.linspace(0.1, 0.9, 9)
    assert metrics.likelihood.model_utility(nine) == pytest.approx(9 / math.fsum(1 / x for x in nine))
    assert metrics.likelihood.model_utility([0.0, *nine[1:]]) == 0.0
    for bad in (nine[:8], [-0.1, *nine[1:]], [math.nan, *nine[1:]]):
        with pytest.raises(ValueError, match="nine figures"):
            metrics.likelihood.model_utility(bad)


# ---- memorisation


@given(st.lists(BOOLS, min_size=1, max_size=6), st.booleans())
def test_memorisation(rows, compat):
    exact = metrics.memorisation.exact_memorization([np.array(row) for row in rows])
    np.testing.assert_allclose(exact, [reference.naive_exact_memorization(row) for row in rows])
    strength = metrics.memorisation.extraction_strength([np.array(row) for row in rows], compat=compat)
    np.testing.assert_allclose(
        strength, [reference.naive_extraction_strength(row, compat) for row in rows], atol=1e-15
    )


def test_extraction_strength_differs_only_where_the_last_token_is_wrong():
    wrong, right = [True, True, False, True], [False, False, True, False]
    assert metrics.memorisation.extraction_strength([wrong]).tolist() == [0.0]
    assert metrics.memorisation.extraction_strength([wrong], compat=True)[0] == pytest.approx(1 / 3)
    assert (
        metrics.memorisation.extraction_strength([right])[0]
        == metrics.memorisation.extraction_strength([right], compat=True)[0]
        == 1 - 2 / 3
    )
    assert metrics.memorisation.extraction_strength([[True]]).tolist() == [0.0]


# ---- text


# the first example may load the library
@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=7),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=7),
)
def test_rouge(a, b):
    found = metrics.text.rouge_l([" ".join(a)], [" ".join(b)], stem=False)
    common = reference.naive_lcs(a, b)
    assert found.recall[0] == pytest.approx(common / len(a))
    assert found.precision[0] == pytest.approx(common / len(b))
    assert found.f1[0] == pytest.approx(2 * common / (len(a) + len(b)))


def test_rouge_stems_and_recall_is_of_the_reference():
    assert metrics.text.rouge_l(["She writes novels"], ["she writing a novel today"]).recall[0] == 1.0
    assert metrics.text.rouge_l(["She writes novels"], ["she writing a novel today"], stem=False).recall[0] < 1.0
    assert metrics.text.rouge_l(["a"], [""]).recall.tolist() == [0.0]
    with pytest.raises(ValueError):
        metrics.text.rouge_l(["a", "b"], ["a"])


def test_distinct_and_repetition():
    texts = ["the cat the cat", "The cat sat"]
    assert metrics.text.distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert metrics.text.distinct_n(texts, 2) == pytest.approx(3 / 5)
    assert metrics.text.distinct_n(["", "one"], 2) == 0.0
    assert metrics.text.repetition(["a b c d a b c d", "a b c d e", "a b", ""], 4).tolist() == pytest.approx(
        [0.2, 0, 0, 0]
    )
    assert metrics.text.repetition(["no " * 200])[0] > 0.99


# ---- membership inference


@pytest.mark.parametrize("k", [0.0, 0.2, 0.4, 1.0])
def test_min_k(k):
    rows = ragged(np.random.default_rng(1))
    np.testing.assert_allclose(
        metrics.membership.mia_min_k(rows, k=k), [reference.naive_min_k(row[:-1], k) for row in rows]
    )


def test_min_k_plus_plus():
    rng = np.random.default_rng(2)
    rows = ragged(rng)
    mean, var = ([rng.normal(size=len(r)) for r in rows], [rng.uniform(0, 2, size=len(r)) for r in rows])
    var[0][0] = 0.0
    expected = [
        reference.naive_min_k(
            [(x - m) / math.sqrt(max(v, 1e-6)) for x, m, v in zip(r[:-1], a[:-1], b[:-1], strict=True)], 0.4
        )
        for r, a, b in zip(rows, mean, var, strict=True)
    ]
    np.testing.assert_allclose(metrics.membership.mia_min_k_plus_plus(rows, mean, var), expected)


def test_loss_attacks_leave_the_end_token_out_unless_compat():
    rows = ragged(np.random.default_rng(3))
    other = ragged(np.random.default_rng(4), low=2)
    texts = [f"text number {i} " * (i + 1) for i in range(len(rows))]
    for compat in (False, True):
        loss = [reference.naive_loss(row if compat else row[:-1]) for row in rows]
        second = [reference.naive_loss(row if compat else row[:-1]) for row in other]
        np.testing.assert_allclose(metrics.membership.mia_loss(rows, compat=compat), loss)
        sizes = [len(zlib.compress(text.encode())) for text in texts]
        np.testing.assert_allclose(metrics.membership.mia_zlib(rows, texts, compat=compat), np.divide(loss, sizes))
        own, theirs = (metrics.membership.mia_loss(each, compat=compat) for each in (rows, other))
        np.testing.assert_allclose(metrics.membership.mia_reference(own, theirs), np.subtract(loss, second))


def test_attacks_on_rows_without_text():
    only_end = [[-1.0]]
    for attack in (metrics.membership.mia_loss, metrics.membership.mia_min_k):
        with pytest.raises(ValueError, match="row 0 has no labelled token"):
            attack(only_end)
    with pytest.raises(ValueError, match="row 0 has no labelled token"):
        metrics.membership.mia_min_k_plus_plus(only_end, [[0.0]], [[1.0]])
    assert metrics.membership.mia_min_k(only_end, compat=True).tolist() == [0.0]
    assert metrics.membership.mia_min_k_plus_plus(only_end, [[0.0]], [[1.0]], compat=True).tolist() == [0.0]
    with pytest.raises(ValueError, match="2 texts"):
        metrics.membership.mia_zlib([[-1.0, -1.0]], ["a", "b"])
    with pytest.raises(ValueError, match="2 of the reference"):
        metrics.membership.mia_reference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="mia_gradnorm: row 1 has no"):
        metrics.membership.mia_gradnorm([[1.0], []])


def test_gradnorm_is_the_mean_over_tensors_and_not_the_whole_norm():
    rows = [[3.0, 4.0], [1.0, 2.0, 6.0]]
    assert metrics.membership.mia_gradnorm(rows).tolist() == [reference.naive_mean(row) for row in rows] == [3.5, 3.0]
    assert metrics.membership.mia_gradnorm(rows)[0] != math.hypot(3, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_auc(forget, holdout):
    assert metrics.membership.auc(forget, holdout) == pytest.approx(reference.naive_auc(forget, holdout))
    assert metrics.membership.auc(forget, holdout) == pytest.approx(1 - metrics.membership.auc(holdout, forget))


def test_auc_says_one_when_forgotten_rows_are_still_known():
    known, unseen = [0.1, 0.2], [3.0, 4.0]
    assert metrics.membership.auc(known, unseen) == 1.0
    with pytest.raises(ValueError, match="empty or hold NaN"):
        metrics.membership.auc([], unseen)


def test_privleak():
    assert metrics.membership.privleak(0.5, 0.5) == 0.0
    assert metrics.membership.privleak(1.0, 0.5) == pytest.approx(-100)
    assert metrics.membership.privleak(0.2, 0.6) == pytest.approx(100)
    assert metrics.membership.privleak(0.2, None, compat=True) == pytest.approx(60)
    assert metrics.membership.privleak(0.2, 0.5, compat=True) != metrics.membership.privleak(0.2, 0.5)
    with pytest.raises(ValueError, match="retrained model's AUC"):
        metrics.membership.privleak(0.2, None)
    with pytest.raises(ValueError, match="reference of 0"):
        metrics.membership.privleak(0.2, 1.0)
    assert relative_difference(3.0, 2.0) == 50.0
