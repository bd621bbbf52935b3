"""`alter entropy`: every figure against a loop, the model's pass against a plain one, files, and what is refused."""

import csv
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.numpy import load_file

import reference
from alter import AlterConfig, cli, metrics
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.data.rows import examples
from alter.evaluation import entropies as study
from alter.evaluation.entropies import Study, cut_rows, frequent, shares_of_bins, sides, token_entropies
from alter.evaluation.entropystudy import entropy
from alter.inference.scoring import score
from alter.models.loading import load_model
from alter.rendering import figures as plots
from alter.storage.records import read_records
from pico import PAD, byte_tokenizer, pico, save_pico, write_jsonl


def encoded(*rows):
    return [Encoded(list(row), list(row), 0) for row in rows]


ROWS = encoded([5, 6, 7, 8, 9, 10, 11], [40, 41], [PAD, 50, PAD], [60, 61, 62, 63])


# ---- the model's pass


@pytest.mark.parametrize("batch_tokens", [None, 1, 9])
def test_entropies_are_those_of_a_plain_pass(batch_tokens):
    model, double = pico(), pico().double()
    found = token_entropies(model, ROWS, [1.0, 0.5, 2.0], pad_token_id=PAD, batch_tokens=batch_tokens)
    for i, row in enumerate(ROWS):
        with torch.no_grad():
            logits = double(input_ids=torch.tensor([row.input_ids])).logits[0].tolist()
        for q, values in found.items():
            naive = [reference.naive_tsallis(logits[t], q) for t in range(len(row.input_ids) - 1)]
            np.testing.assert_allclose(values[i], naive, rtol=2e-4, atol=1e-5)


def test_shannon_is_minus_the_mean_log_probability_that_scoring_gives():
    model = pico()
    found = token_entropies(model, ROWS, [1.0], pad_token_id=PAD)[1.0]
    scored = score(model, ROWS, pad_token_id=PAD, moments=True)
    for mine, mean in zip(found, scored.mean, strict=True):
        np.testing.assert_allclose(mine, -mean, rtol=1e-5, atol=1e-6)


def test_bf16_is_taken_in_fp32_and_the_mode_is_given_back():
    model = pico().train()
    exact = token_entropies(model, ROWS, [1.0], pad_token_id=PAD)[1.0]
    assert model.training
    rough = token_entropies(model.bfloat16(), ROWS, [1.0], pad_token_id=PAD)[1.0]
    assert rough[0].dtype == np.float32
    np.testing.assert_allclose(rough[0], exact[0], rtol=0.1)


def test_broken_weights_are_said():
    model = pico()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        token_entropies(model, ROWS, [1.0], pad_token_id=PAD)


def test_pieces_keep_every_token_and_every_label():
    tokenizer = byte_tokenizer()
    rows = [{"text": "abcdefghij"}, {"text": "x"}, {"text": "klmno"}]
    found = cut_rows(tokenizer, examples(rows), 4)
    assert [tokenizer.decode(row.input_ids) for row in found] == ["abcd", "efgh", "ij", "klmn"]
    assert found[0].labels[0] == -100
    assert found[1].labels == found[1].input_ids
    assert [study._counted(row, "labelled") for row in found] == [[1, 2, 3], [1, 2, 3], [1], [1, 2, 3]]
    (row,) = cut_rows(tokenizer, examples([{"question": "Who?", "answer": "Me"}]), 100)
    assert len(study._counted(row, "labelled")) == 4  # " Me" and the end
    assert len(study._counted(row, "all")) == len(row.input_ids) - 1


# ---- figures


@pytest.fixture(params=[0, 1, 2, 3])
def values(request):
    rng = np.random.default_rng(request.param)
    return [
        np.abs(rng.normal(size=400)),
        np.concatenate([rng.normal(0.1, 0.05, 300), rng.normal(3, 0.4, 200)]),
        np.concatenate([np.zeros(100), rng.exponential(1.0, 57)]),
        np.array([0.0, 1.0, 1.0, 5.0]),
    ][request.param]


def test_sarles_coefficient_by_its_definition(values):
    n = len(values)
    mean = math.fsum(values) / n
    m2, m3, m4 = (math.fsum((x - mean) ** k for x in values) / n for k in (2, 3, 4))
    g = math.sqrt(n * (n - 1)) / (n - 2) * m3 / m2**1.5
    k = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (m4 / m2**2 - 3) + 6)
    naive = (g**2 + 1) / (k + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
    assert metrics.entropies.bimodality_coefficient(values) == pytest.approx(naive, rel=1e-9)


def test_sarles_landmarks():
    rng = np.random.default_rng(0)
    assert metrics.entropies.bimodality_coefficient(rng.uniform(size=200_000)) == pytest.approx(5 / 9, abs=0.005)
    assert metrics.entropies.bimodality_coefficient(rng.normal(size=200_000)) == pytest.approx(1 / 3, abs=0.005)
    assert metrics.entropies.bimodality_coefficient([0, 1] * 5000) == pytest.approx(1, abs=1e-3)


def normal(x, mean, deviation):
    return math.exp(-(((x - mean) / deviation) ** 2) / 2) / deviation / math.sqrt(2 * math.pi)


def naive_two_normals(values, floor, rounds=3000):
    """Expectation maximisation in loops, from the halves of the sorted values."""
    x = sorted(values)
    half = len(x) // 2
    weights = [0.5, 0.5]
    means = [math.fsum(x[:half]) / half, math.fsum(x[half:]) / (len(x) - half)]
    overall = np.std(x)
    deviations = [overall, overall]
    for _ in range(rounds):
        parts = [[w * normal(v, m, s) for w, m, s in zip(weights, means, deviations, strict=True)] for v in x]
        shares = [[a / (a + b), b / (a + b)] for a, b in parts]
        for k in (0, 1):
            total = math.fsum(share[k] for share in shares)
            weights[k] = total / len(x)
            means[k] = math.fsum(share[k] * v for share, v in zip(shares, x, strict=True)) / total
            spread = math.fsum(share[k] * (v - means[k]) ** 2 for share, v in zip(shares, x, strict=True)) / total
            deviations[k] = math.sqrt(spread + floor)
    return weights, means, deviations


def test_two_normals_by_naive_expectation_maximisation():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0.2, 0.1, 60), rng.normal(2.5, 0.5, 40)])
    fit = metrics.entropies.two_normals(values)
    weights, means, deviations = naive_two_normals(values, 1e-4 * values.var(), rounds=100)
    np.testing.assert_allclose(fit.weights, weights, atol=1e-3)
    np.testing.assert_allclose(fit.means, means, atol=1e-3)
    np.testing.assert_allclose(fit.deviations, deviations, atol=1e-3)


def test_what_follows_from_the_two_normals(values):
    fit = metrics.entropies.two_normals(values)
    n = len(values)
    floor = 1e-4 * values.var()
    (w1, w2), (m1, m2), (s1, s2) = fit.weights, fit.means, fit.deviations
    two = math.fsum(math.log(w1 * normal(x, m1, s1) + w2 * normal(x, m2, s2)) for x in values)
    one = math.fsum(math.log(normal(x, values.mean(), math.sqrt(values.var() + floor))) for x in values)
    gain = ((2 * math.log(n) - 2 * one) - (5 * math.log(n) - 2 * two)) / n
    assert fit.bic_gain == pytest.approx(gain, rel=1e-6, abs=1e-9)
    assert m1 <= m2
    assert fit.ashman == pytest.approx(math.sqrt(2) * (m2 - m1) / math.sqrt(s1**2 + s2**2))
    assert min(s1, s2) >= 0.0099 * values.std()
    # a dip between the means, by walking along the density
    walk = [m1 + (m2 - m1) * i / 1000 for i in range(1001)]
    density = [w1 * normal(x, m1, s1) + w2 * normal(x, m2, s2) for x in walk]
    dip = min(range(1001), key=lambda i: density[i])
    sides_of_dip = min(max(density[: dip + 1]), max(density[dip:]))
    assert fit.depth == pytest.approx(1 - density[dip] / sides_of_dip, abs=1e-3)
    if fit.valley is None:
        assert fit.depth == 0
    else:
        assert fit.valley == pytest.approx(walk[dip], abs=0.01)


def test_one_hump_has_no_valley_and_two_have_one():
    rng = np.random.default_rng(0)
    assert metrics.entropies.two_normals(rng.normal(size=3000)).depth < 0.02
    fit = metrics.entropies.two_normals(np.concatenate([rng.normal(0, 0.3, 500), rng.normal(4, 0.3, 500)]))
    assert fit.valley == pytest.approx(2, abs=0.3)
    assert fit.depth > 0.99
    assert fit.bic_gain > 0
    assert fit.ashman > 10


@pytest.mark.parametrize("values", [[], [1.0, 2.0, 3.0], [2.0] * 9])
def test_too_little_to_have_a_shape(values):
    with pytest.raises(ValueError, match="four values"):
        metrics.entropies.bimodality_coefficient(values)
    with pytest.raises(ValueError, match="four values"):
        metrics.entropies.two_normals(values)


def naive_stability(before, after, threshold):
    high = [(x, y) for x, y in zip(before, after, strict=True) if x > threshold]
    low = [(x, y) for x, y in zip(before, after, strict=True) if x <= threshold]
    n = len(before)
    kept_high, kept_low = sum(y > threshold for _, y in high), sum(y <= threshold for _, y in low)
    agreement = (kept_high + kept_low) / n
    share = sum(y > threshold for y in after) / n
    chance = len(high) / n * share + len(low) / n * (1 - share)
    mx, my = math.fsum(before) / n, math.fsum(after) / n
    cov = math.fsum((x - mx) * (y - my) for x, y in zip(before, after, strict=True))
    spread = math.sqrt(math.fsum((x - mx) ** 2 for x in before) * math.fsum((y - my) ** 2 for y in after))
    return [
        kept_high / len(high) if high else math.nan,
        kept_low / len(low) if low else math.nan,
        agreement,
        (agreement - chance) / (1 - chance) if chance < 1 else math.nan,
        cov / spread if spread else math.nan,
        len(high),
        len(low),
    ]


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.2, 9.0])
def test_stability_by_counting(threshold):
    rng = np.random.default_rng(0)
    before = rng.exponential(1.0, 200)
    before[:3] = [0.5, 1.2, 1.2]  # on the threshold: low
    after = before + rng.normal(0, 0.5, 200)
    found = metrics.entropies.stability(before, after, threshold)
    mine = [
        found.high_stay,
        found.low_stay,
        found.agreement,
        found.kappa,
        found.correlation,
        found.n_high,
        found.n_low,
    ]
    np.testing.assert_allclose(mine, naive_stability(before.tolist(), after.tolist(), threshold), rtol=1e-9)


def test_stability_without_change_and_without_tokens():
    same = metrics.entropies.stability([0.0, 2.0, 3.0], [0.0, 2.0, 3.0], 1.0)
    assert (same.high_stay, same.low_stay, same.kappa, same.correlation) == pytest.approx((1, 1, 1, 1))
    assert math.isnan(metrics.entropies.stability([1.0, 1.0], [0.0, 2.0], 1.5).correlation)
    with pytest.raises(ValueError, match="same number"):
        metrics.entropies.stability([1.0], [1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="above 0"):
        metrics.entropies.stability([], [], 1.0)


def test_frequent_tokens_and_their_sides_by_counting():
    rng = np.random.default_rng(3)
    ids, entropy = rng.integers(0, 12, 300), rng.exponential(1.0, 300)
    found = frequent(ids, entropy, 1.1, 20)
    counts = Counter(ids.tolist())
    assert [t.token for t in found] == sorted(counts, key=lambda i: (-counts[i], i))
    for token in found:
        mine = [x for i, x in zip(ids, entropy, strict=True) if i == token.token]
        assert token.count == len(mine)
        assert token.mean == pytest.approx(math.fsum(mine) / len(mine))
        assert token.high == pytest.approx(sum(x > 1.1 for x in mine) / len(mine))
    high, low = sides(found, 1.1)
    assert {t.token for t in high} == {t.token for t in found if t.mean > 1.1}
    assert len(high) + len(low) == len(found)
    assert [t.count for t in high] == sorted((t.count for t in high), reverse=True)


def test_histogram_by_counting():
    values, edges = [0.0, 0.1, 0.5, 1.0, 1.5, 2.0], [0.0, 0.5, 1.0, 2.0]
    naive = [sum(a <= x < b or (b == 2.0 and x == b) for x in values) / 6 for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(shares_of_bins(values, edges), naive)
    assert shares_of_bins([], edges).tolist() == [0, 0, 0]


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another of the same tokenizer, an adapter that changes the first, and a text."""
    path = tmp_path_factory.mktemp("study")
    save_pico(path / "model")
    save_pico(path / "other", seed=1)
    model, _ = load_model(str(path / "model"))
    torch.manual_seed(0)
    config = AlterConfig(r=4, num_forget_experts=2, task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(model, config).save_pretrained(path / "adapter")
    rows = [{"question": f"Who is {name}?", "answer": f"{name} is a writer."} for name in ("Ann", "Bob", "Cleo")]
    write_jsonl(path / "rows.jsonl", rows)
    (path / "text.txt").write_text("It was a dark night; the rain fell in torrents.\n\n" * 8)
    return path


def test_the_text_is_written_with_the_templates_variables(folder, tmp_path):
    save_pico(tmp_path / "model")
    template = "{% if thinking %}Think. {% endif %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path / "model")
    found = {}
    for told in ("true", "false"):
        settings = Study(
            model=str(tmp_path / "model"),
            text=str(folder / "rows.jsonl"),
            tokens="all",
            chat_template_kwargs=[f"thinking={told}"],
        )
        tokens, _ = study.measure_study(settings)
        found[told] = len(tokens.ids)
    # three rows
    assert found["true"] == found["false"] + 3 * len("Think. ")


@pytest.mark.parametrize("after", ["adapter", "other"])
def test_before_and_after_are_those_models(folder, after):
    settings = Study(model=str(folder / "model"), text=str(folder / "rows.jsonl"), after=str(folder / after))
    tokens, tokenizer = study.measure_study(settings)
    rows = cut_rows(tokenizer, examples([json.loads(x) for x in (folder / "rows.jsonl").read_text().splitlines()]), 99)
    adapter = str(folder / after) if after == "adapter" else None
    alone, _ = load_model(str(folder / "model"))
    then, _ = load_model(str(folder / ("model" if adapter else "other")), adapter)
    place = 0
    for number, row in enumerate(rows):
        for t in range(row.prompt_length, len(row.input_ids)):
            assert (tokens.ids[place], tokens.row[place], tokens.position[place]) == (row.input_ids[t], number, t)
            for model, mine in ((alone, tokens.before), (then, tokens.after)):
                if place % 5:
                    continue
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, t - 1].tolist()
                for q in (1.0, 1.5):
                    assert mine[q][place] == pytest.approx(reference.naive_tsallis(logits, q), rel=2e-3, abs=1e-4)
            place += 1
    assert place == len(tokens.ids)
    assert np.abs(tokens.before[1.0] - tokens.after[1.0]).max() > 0.01


def test_command_writes_records_tables_entropies_and_a_plot(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    args = ["entropy", "--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--q", "1.0", "2.0"]
    args += ["--quantile", "0.6", "--after", str(folder / "adapter"), "--out", str(out), "--bins", "7", "--top", "3"]
    assert cli.main([*args, "--window", "20"]) == 0
    shown = capsys.readouterr().out
    for word in ("entropy_high_stay", "entropy_low_stay", "entropy_kappa", "most frequent tokens"):
        assert word in shown
    assert sorted(p.name for p in out.iterdir()) == [
        "entropies.safetensors", "entropy.png", "histogram.csv", "records.json", "tokens.csv",
    ]  # fmt: skip
    arrays = load_file(out / "entropies.safetensors")
    assert arrays["position"].max() < 20
    assert arrays["position"].min() == 1
    for q in (1, 2):
        before, after = arrays[f"before_q{q}"], arrays[f"after_q{q}"]
        found = {r.metric: r for r in read_records(out / "records.json") if r.model == f"after, q={q}"}
        first = {r.metric: r for r in read_records(out / "records.json") if r.model == f"before, q={q}"}
        threshold = found["entropy_high_stay"].extra["threshold"]
        assert threshold == pytest.approx(np.quantile(before.astype(float), 0.6), rel=1e-6)
        assert first["entropy_high"].value == pytest.approx((before > threshold).mean())
        assert found["entropy_mean"].value == pytest.approx(after.mean(), rel=1e-5)
        naive = naive_stability(before.tolist(), after.tolist(), threshold)
        for metric, value in zip(("high_stay", "low_stay", "agreement", "kappa", "correlation"), naive, strict=False):
            assert found[f"entropy_{metric}"].value == pytest.approx(value, rel=1e-4)
        assert (found["entropy_high_stay"].n, found["entropy_low_stay"].n) == (naive[5], naive[6])
        assert found["entropy_mean"].provenance["settings"]["seed"] == 0
    with (out / "tokens.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["q"] == "1.0"]
    for row in rows:
        mine = arrays["token"] == int(row["token"])
        assert int(row["count"]) == mine.sum()
        assert float(row["mean_before"]) == pytest.approx(arrays["before_q1"][mine].mean(), rel=1e-5)
        assert float(row["mean_after"]) == pytest.approx(arrays["after_q1"][mine].mean(), rel=1e-5)
    assert sum(int(row["count"]) for row in rows) == len(arrays["token"])
    with (out / "histogram.csv").open() as file:
        bins = [row for row in csv.DictReader(file) if row["q"] == "2.0"]
    assert len(bins) == 7
    assert sum(float(row["share_before"]) for row in bins) == pytest.approx(1)
    assert sum(float(row["share_after"]) for row in bins) == pytest.approx(1)
    assert (out / "entropy.png").read_bytes()[:4] == b"\x89PNG"


def test_one_model_alone_and_a_sample_of_rows(folder, tmp_path):
    settings = Study(model=str(folder / "model"), text=str(folder / "rows.jsonl"), limit=2, out=str(tmp_path))
    found = entropy(settings)
    assert {record.model for record in found} == {"before, q=1", "before, q=1.5"}
    assert not any("stay" in record.metric for record in found)
    assert found[0].extra["rows"] == 2
    assert found[0].n < study.measure_study(settings.model_copy(update={"limit": None}))[0].ids.size
    assert "share_after" not in (tmp_path / "histogram.csv").read_text()


def test_equal_figures_are_equal_files_and_a_failed_one_leaves_nothing(tmp_path):
    for name in ("a.png", "b.png"):
        with plots.figure(tmp_path / name) as axes:
            plots.overlay(axes[0, 0], [0, 1, 2], {"before": [0.5, 0.5], "after": [0.0, 1.0]}, 1.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ZeroDivisionError), plots.figure(tmp_path / "c.png"):
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"q": [2.0]}, "threshold of 1.2 divides nothing at `q` 2"),
        ({"q": [1.0], "threshold": 6.0}, "between 0 and 5.704"),
        ({"threshold": -1.0}, "divides nothing"),
        ({"q": [1.0, 1.0]}, "an order twice"),
        ({"quantile": 0.5, "threshold": 1.0}, "give one of them"),
        ({"text": "nothing.jsonl"}, "No file or folder"),
        ({"after": "./nowhere"}, "neither the folder of an adapter nor that of a model"),
        ({"after": "builtin:tofu"}, "Did you mean"),
        ({"model": "builtin:tofu"}, "Did you mean"),
    ],
)
def test_refused_in_one_line(folder, settings, says, monkeypatch):
    monkeypatch.setattr(study, "token_entropies", lambda *args, **kwargs: pytest.fail("a model ran"))
    with pytest.raises(UserError) as caught:
        study.measure_study(Study(**{"model": str(folder / "model"), "text": str(folder / "rows.jsonl")} | settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repository_that_is_not_there_is_found_before_a_model_runs(folder, monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("owner/name is no repository\nsecond line")

    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", missing)
    tokenizer = byte_tokenizer()
    assert not study._is_adapter("owner/name")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(
        UserError, match=r"Cannot load the tokenizer of `after` owner/name: owner/name is no repository$"
    ):
        study._same_tokens(tokenizer, "owner/name")


def test_another_tokenizer_is_refused(folder, tmp_path):
    pico().save_pretrained(tmp_path)
    byte_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    settings = Study(model=str(folder / "model"), text=str(folder / "rows.jsonl"), after=str(tmp_path))
    with pytest.raises(UserError, match=r"another tokenizer .*<end>"):
        study.measure_study(settings)


def test_too_short_a_text_and_a_file_in_the_way(folder, tmp_path):
    (tmp_path / "t.txt").write_text("abc")
    with pytest.raises(UserError, match="has 2 tokens with an entropy"):
        study.measure_study(Study(model=str(folder / "model"), text=str(tmp_path / "t.txt")))
    with pytest.raises(UserError, match="not a folder"):
        study.measure_study(Study(model="nowhere", text=str(tmp_path / "t.txt"), out=str(tmp_path / "t.txt")))
