"""Attacks: what each recovers on pico models, naive twins of the arithmetic, nothing spoiled, and what is refused."""

import hashlib
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from alter import AlterConfig, cli, metrics
from alter.attacks import base, states, weights, wording
from alter.attacks import run as attacks
from alter.attacks.fractions import recovered_fractions
from alter.attacks.showing import show_recovered, untrained
from alter.core.errors import UserError
from alter.data.encoding import Encoded, encode
from alter.data.rows import examples, load_examples
from alter.data.tofu import tofu_rows
from alter.inference import internals
from alter.models import loading
from alter.storage.records import Record, read_records
from pico import PAD, byte_tokenizer, mixture, pico, write_jsonl

NAMES = ["Ada", "Bo", "Cy", "Di", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit", "Lu", "Max", "Ned"]
ROWS = [
    {"question": f"Who is {a}?", "answer": f"{a} paints {b}s"} for a, b in zip(NAMES, reversed(NAMES), strict=True)
]


# ---- arithmetic


def naive_cka(x, y, debiased):
    """From the definition, in loops: kernels of centred rows, then HSIC."""
    n = len(x)
    x, y = (
        [[float(v) - math.fsum(float(r[c]) for r in m) / n for c, v in enumerate(row)] for row in m] for m in (x, y)
    )
    k, l = ([[math.fsum(p * q for p, q in zip(a, b, strict=True)) for b in m] for a in m] for m in (x, y))

    def hsic(p, q):
        if not debiased:
            return math.fsum(p[i][j] * q[i][j] for i in range(n) for j in range(n))
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        trace = math.fsum(p[i][j] * q[j][i] for i, j in pairs)
        totals = math.fsum(p[i][j] for i, j in pairs) * math.fsum(q[i][j] for i, j in pairs)
        cross = math.fsum(p[i][j] * q[j][m] for i, j in pairs for m in range(n) if m != j)
        return (trace + totals / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))

    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("n", "p", "q"), [(4, 1, 1), (7, 3, 5), (12, 20, 2)])
def test_cka_is_its_naive_twin(n, p, q, debiased):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, p)) + 3, rng.normal(size=(n, q))
    y[:, 0] += x[:, 0]
    assert metrics.recovery.linear_cka(x, y, debiased=debiased) == pytest.approx(naive_cka(x, y, debiased), abs=1e-10)


def test_cka_of_rotated_states_is_one_and_of_unrelated_ones_zero_if_debiased():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 80))
    turn = np.linalg.qr(rng.normal(size=(80, 80)))[0]
    for debiased in (True, False):
        assert metrics.recovery.linear_cka(x, 5 * x @ turn + 2, debiased=debiased) == pytest.approx(1)
    other = rng.normal(size=(60, 80))
    assert abs(metrics.recovery.linear_cka(x, other)) < 0.05
    assert metrics.recovery.linear_cka(x, other, debiased=False) > 0.4


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.ones((5, 2)), np.eye(5), "same for all rows"),
        (np.eye(3), np.eye(3), "4 or more rows"),
        (np.eye(5), np.eye(6), "same 4"),
        (np.arange(5.0), np.eye(5), "matrices"),
    ],
)
def test_cka_refuses(x, y, says):
    with pytest.raises(ValueError, match=says):
        metrics.recovery.linear_cka(x, y)


def test_recovered_fraction():
    assert metrics.recovery.recovered_fraction(0.5, 0.3, 0.9, 0.4) == pytest.approx(0.4)
    assert metrics.recovery.recovered_fraction(0.2, 0.3, 0.9, 0.4) == pytest.approx(-0.2)
    assert metrics.recovery.recovered_fraction(0.9, 0.4, 0.9, 0.4) == 1
    for original, retrained in ((0.4, 0.4), (0.44, 0.4), (0.3, 0.6)):
        with pytest.raises(ValueError, match="no forgotten knowledge"):
            metrics.recovery.recovered_fraction(0.5, 0.3, original, retrained)
    with pytest.raises(ValueError, match="not finite"):
        metrics.recovery.recovered_fraction(math.nan, 0.3, 0.9, 0.4)


def test_recovered_interval_is_a_bootstrap_over_rows():
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)
    low, high = metrics.recovery.recovered_interval(a, b, 0.5, seed=1)
    draw = np.random.default_rng(1).integers(0, 40, (2000, 40))
    means = sorted(math.fsum(a[i] - b[i] for i in rows) / 40 / 0.5 for rows in draw)
    assert low == pytest.approx(np.percentile(means, 2.5))
    assert high == pytest.approx(np.percentile(means, 97.5))
    assert low < (a - b).mean() / 0.5 < high
    # of one row, or of rows that all differ alike, no draw differs: that is no certainty
    assert metrics.recovery.recovered_interval([0.3], [0.1], 0.5) is None
    assert metrics.recovery.recovered_interval([0.0] * 9, [0.0] * 9, 0.5) is None
    with pytest.raises(ValueError, match="equal length"):
        metrics.recovery.recovered_interval([0.3, 0.1], [0.1], 0.5)


def naive_round_trip(weight, bits):
    """One value after the other."""
    rows = weight.double().tolist()
    if bits == 8:
        out = []
        for row in rows:
            scale = max(abs(v) for v in row) / 127
            out.append([round(v / scale) * scale if scale else 0.0 for v in row])
        return torch.tensor(out)
    flat = [v for row in rows for v in row]
    done = []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(abs(v) for v in block)
        done += [
            min(weights.NF4, key=lambda c, v=v: abs(c - v / largest)) * largest if largest else 0.0 for v in block
        ]
    return torch.tensor(done).view(weight.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (7, 65)])
def test_quantising_is_its_naive_twin(bits, shape):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * 0.03
    weight[0, 0] = 0
    found = weights.round_trip(weight, bits)
    torch.testing.assert_close(found, naive_round_trip(weight, bits).float(), rtol=1e-5, atol=1e-7)
    low = weight.bfloat16()
    assert torch.equal(weights.round_trip(low, bits), weights.round_trip(low.float(), bits).bfloat16())
    assert torch.equal(weights.round_trip(torch.zeros(shape), bits), torch.zeros(shape))


def test_four_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    # widths that are no multiple of the block come back broken from its kernel for CPUs
    weight = torch.randn(48, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=weights.NF4_BLOCK, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(weights.round_trip(weight, 4), theirs, atol=1e-5, rtol=1e-5)


# ---- rows


def test_measured_rows_are_never_the_attackers():
    for total, wanted, attacker in ((40, 10, 5), (12, 100, 5), (3, 1, 2)):
        measured, own = base.split_rows(total, wanted, attacker, seed=1)
        assert not set(measured) & set(own)
        assert len(own) == attacker
        assert len(measured) == min(wanted, total - attacker)
        assert (measured, own) == base.split_rows(total, wanted, attacker, seed=1)
    assert base.split_rows(40, 10, 5, 1) != base.split_rows(40, 10, 5, 2)
    assert sorted(base.split_rows(12, 100, 0, 1)[0]) == list(range(12))
    with pytest.raises(
        UserError, match=r"`relearn.rows` is 20, and the forget set has 20 rows.*`relearn.rows` 10, and 19"
    ):
        base.split_rows(20, 10, 20, 0)


def test_only_attacks_that_take_rows_are_refused_for_few_of_them():
    def of(*names, total=14):
        return attacks.chosen(attacks.Attack(model="m", forget="f", attacks=list(names)), examples(ROWS[:total]))

    takes = {name for name, method in attacks.ATTACKS.items() if method.takes_rows}
    assert takes == {"relearn", "relearn_lora", "relearn_searched", "few_shot", "evolve", "soft_prompt"}
    rest = [name for name in attacks.ATTACKS if name not in (*takes, "paraphrase", "strip", "uds")]
    assert of(*rest) == (rest, {})
    names, reasons = of()
    assert names == rest
    assert takes < set(reasons)
    for name in takes:
        with pytest.raises(UserError, match=r"`relearn.rows` is 20, and the forget set has 14 rows.*`relearn.rows` 7"):
            of(name, "prefill")
    with pytest.raises(UserError, match="has 1 row; give 2 or more"):
        of("relearn", total=1)
    with pytest.raises(UserError, match=r"has 3 rows.*needs 5 or more"):
        of("relearn_searched", total=3)
    for name in ("probe", "cka"):
        with pytest.raises(UserError, match="has 3 rows, and it needs 4"):
            of(name, total=3)


def test_halves_are_disjoint_and_whole():
    learn, test = states.halves(9, seed=0)
    assert sorted(learn + test) == list(range(9))
    assert (len(learn), len(test)) == (4, 5)
    with pytest.raises(UserError, match="4 rows"):
        states.halves(3, 0)


def test_prefilled_tokens_are_given_and_not_counted():
    tokenizer = byte_tokenizer()
    (row,) = examples([{"question": "Who?", "answer": "Ada paints"}])
    whole = base.make_item(tokenizer, row)
    assert tokenizer.decode(whole.ids[: whole.start]).endswith("Answer:")
    item = base.prefilled(tokenizer, whole, 5)
    # " Ada " is given
    assert item.ids == whole.ids
    assert tokenizer.decode(item.ids[: item.start]).endswith("Answer: Ada ")
    assert item.reference == "paints"
    assert item.encoded.labels == [-100] * item.start + item.ids[item.start :]
    assert base.prefilled(tokenizer, whole, len(" Ada paints")) is None


def test_text_is_its_first_half_and_the_second():
    tokenizer = byte_tokenizer()
    (row,) = examples([{"text": "abcdefghij"}])
    item = base.make_item(tokenizer, row, longest=3)
    assert (item.start, tokenizer.decode(item.ids), item.reference) == (5, "abcdefgh", "fgh")
    (short,) = examples([{"text": "a"}])
    with pytest.raises(UserError, match="is one token long"):
        base.make_item(tokenizer, short)


def test_wordings():
    question = "What is the full name of the author born in Taipei?"
    assert wording.telegram(question) == "What full name author born Taipei?"
    assert wording.telegram("Is it?") == "Is it?"
    assert wording.reversed_words(question).startswith("Taipei? in born")
    assert wording.upper_case(question) == question.upper()
    assert wording.lower_case(question) == "what is the full name of the author born in taipei?"
    assert wording.joined(" Who is\nAda? ") == "WhoisAda?"
    assert wording.WORDINGS["lower_case"](question) != question != wording.WORDINGS["joined"](question)
    assert question in wording.foreign_frame(question)


def test_a_wording_that_changes_no_question_is_no_attack(models, tmp_path, capsys):
    """Chinese has no capitals: the plain questions were asked once more, and the table said that capitals recover nothing."""
    rows = [{"question": f"谁画了第{i}幅画？", "answer": f"画家{i}。"} for i in range(4)]
    path = write_jsonl(tmp_path / "forget.jsonl", rows)
    given = {"forget": str(path), "retrained": None}
    with pytest.raises(
        UserError, match="'upper_case' is not possible: it leaves every question of these rows as it is"
    ):
        attacks.attack(settings(models, tmp_path / "out", attacks=["upper_case"], **given))
    chosen, reasons = attacks.chosen(settings(models, tmp_path / "out", **given), load_examples(str(path)))
    assert {"upper_case", "lower_case", "joined", "telegram"} <= set(reasons)
    assert {"reversed", "foreign_frame"} <= set(chosen)


def test_paraphrases_come_from_the_rows_or_from_tofus_perturbed_split():
    expected = [row["paraphrased_question"] for row in tofu_rows("forget01_perturbed", "builtin")]
    for source in ("builtin:forget01", "builtin:forget01_perturbed"):
        assert base.paraphrases(source, load_examples(source)) == expected
    assert base.paraphrases("rows.jsonl", examples(ROWS)) is None
    assert base.paraphrases("builtin:forget01", examples(ROWS)) is None


# ---- weights


def with_alter(model, seed=0, experts=2):
    torch.manual_seed(seed)
    config = AlterConfig(r=4, num_forget_experts=experts, task_type="CAUSAL_LM", init_weights=False)
    return get_peft_model(model, config)


def logits(model, seed=0):
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_base_linears_are_the_same_under_any_adapter():
    plain = [name for name, _ in weights.base_linears(pico())]
    assert len(plain) == 2 * 7
    for adapted in (with_alter(pico()), get_peft_model(pico(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))):
        found = weights.base_linears(adapted)
        assert [name.removeprefix("base_model.model.") for name, _ in found] == plain
        assert all(type(module) is torch.nn.Linear for _, module in found)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    assert len(weights.base_linears(gpt2)) == 4


def test_quantising_changes_base_weights_only():
    model = with_alter(pico())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert weights.quantize(model, 4) == 14
    for name, weight in model.named_parameters():
        changed = not torch.equal(weight, before[name])
        assert changed == (".base_layer." in name), name
        if changed:
            torch.testing.assert_close(weight.data, naive_round_trip(before[name], 4), atol=1e-6, rtol=1e-5)


def test_conv1d_is_quantised_in_the_layout_of_a_linear_layer():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    before = gpt2.transformer.h[0].mlp.c_fc.weight.detach().clone()
    weights.quantize(gpt2, 8)
    after = gpt2.transformer.h[0].mlp.c_fc.weight.detach()
    torch.testing.assert_close(after.t(), naive_round_trip(before.t(), 8), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_reaches_the_experts_of_a_mixture(turned, bits):
    """Most weights of such a model; they are no linear layers, and were passed over in silence."""
    model = mixture(turned)
    experts = model.model.layers[0].mlp.experts
    before = {name: getattr(experts, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    assert weights.quantize(model, bits) == 4 + 2 * 3
    for name, old in before.items():
        for new, each in zip(getattr(experts, name).detach(), old, strict=True):
            new, each = (new.t(), each.t()) if turned else (new, each)
            torch.testing.assert_close(new, naive_round_trip(each, bits), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_lora_reaches_the_experts_of_a_mixture(turned):
    model = mixture(turned)
    plain = logits(model)
    trained = weights.add_update(model, 2, seed=0)
    assert len(trained) == 2 * (4 + 2)
    assert torch.equal(logits(model), plain)
    rows = [Encoded([1, 2, 3, 4, 5], [-100, -100, 3, 4, 5], 2)]
    list(weights.train_steps(model, rows, trained, rate=0.05, steps=3, batch_size=2, pad_token_id=PAD, seed=0))
    assert all(weight.detach().abs().sum() > 0 for weight in trained)
    assert not torch.allclose(logits(model), plain, atol=1e-3)


def test_lora_starts_at_nothing_trains_alone_and_under_the_adapter():
    model = with_alter(pico())
    plain, started = logits(model), {name: weight.clone() for name, weight in model.named_parameters()}
    trained = weights.add_update(model, 2, seed=0)
    assert torch.equal(logits(model), plain)
    assert sum(weight.requires_grad for weight in model.parameters()) == len(trained) == 28
    rows = [Encoded([1, 2, 3, 4, 5], [-100, -100, 3, 4, 5], 2)]
    list(weights.train_steps(model, rows, trained, rate=0.05, steps=4, batch_size=2, pad_token_id=PAD, seed=0))
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    kept = {name.replace(".parametrizations.weight.original", ".weight"): w for name, w in model.named_parameters()}
    for name, weight in started.items():
        assert torch.equal(kept[name], weight), name
    # generation asks for the same weights many times: cached or not, they are the same
    with parametrize.cached():
        cached = logits(model)
    assert torch.equal(cached, logits(model))


def test_full_training_reaches_base_experts_and_router_and_repeats_by_seed():
    rows = [Encoded([i, 2, 3, 4, 5 + i], [-100, -100, 3, 4, 5 + i], 2) for i in range(5)]

    def run(seed):
        model = with_alter(pico())
        started = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        everything = list(model.parameters())
        for weight in everything:
            weight.requires_grad_(True)
        how = {"rate": 1e-3, "steps": 6, "batch_size": 2, "pad_token_id": PAD, "seed": seed}
        losses = [loss for _, loss in weights.train_steps(model, rows, everything, **how)]
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, started[name])}
        return losses, moved

    first, moved = run(0)
    assert any("alter_A" in name for name in moved)
    assert any("alter_B" in name for name in moved)
    assert any("base_layer" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
    assert any("alter_router" in name for name in moved)
    assert first[-1] < first[0]
    assert run(0)[0] == first
    assert run(1)[0] != first


def test_every_row_is_used_once_before_any_is_used_again(monkeypatch):
    seen = []
    collate = weights.Collator.__call__

    def spy(self, rows):
        seen.append([row["input_ids"][0] for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(weights.Collator, "__call__", spy)
    model, rows = pico(), [Encoded([i, 2, 3], [-100, 2, 3], 1) for i in range(6)]
    how = {"rate": 1e-4, "steps": 6, "batch_size": 2, "pad_token_id": PAD, "seed": 0}
    list(weights.train_steps(model, rows, list(model.parameters()), **how))
    assert sorted(i for b in seen[:3] for i in b) == sorted(i for b in seen[3:] for i in b) == list(range(6))


def test_a_loss_that_is_not_finite_is_said():
    model = pico()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    rows = [Encoded([1, 2, 3], [-100, 2, 3], 1)]
    how = {"rate": 1e-4, "steps": 1, "batch_size": 2, "pad_token_id": PAD, "seed": 0}
    with pytest.raises(UserError, match="lower the rate"):
        list(weights.train_steps(model, rows, list(model.parameters()), **how))


# ---- hidden states


@pytest.mark.parametrize("adapted", [False, True])
def test_hidden_states_are_those_of_one_plain_forward_per_row(adapted):
    model = with_alter(pico()) if adapted else pico()
    rng = random.Random(0)
    rows = [[rng.randrange(256) for _ in range(length)] for length in (3, 11, 1, 7, 2)]
    encoded = [Encoded(ids, [-100, *ids[1:]], 1) for ids in rows if len(ids) > 1]
    found = dict(internals.hidden_states(model, encoded, pad_token_id=PAD, batch_tokens=20, progress=False))
    assert sorted(found) == list(range(4))
    for i, row in enumerate(encoded):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0] for state in out], dim=1).numpy()
        assert found[i].shape == (len(row.input_ids), 3, 32)
        np.testing.assert_allclose(found[i], expected, atol=1e-4)
    assert torch.is_grad_enabled()
    for _ in internals.hidden_states(model, encoded, pad_token_id=PAD, progress=False):
        assert torch.is_grad_enabled()


def test_the_probe_is_ridge_regression():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)) * [1, 10, 0.1, 3, 0] + 4, rng.normal(size=(30, 3))
    mean, scale, fitted = states.fit_probe(torch.from_numpy(x), torch.from_numpy(y))
    standard = np.concatenate([(x - x.mean(0))[:, :4] / x.std(0)[:4], np.zeros((30, 1)), np.ones((30, 1))], axis=1)
    expected = Ridge(alpha=states.RIDGE * 30, fit_intercept=False).fit(standard, y).coef_.T
    np.testing.assert_allclose(fitted, expected, atol=1e-8)
    head = torch.from_numpy(rng.normal(size=(7, 3))).float()
    read = states.read_out(torch.from_numpy(x), (mean, scale, fitted), head)
    np.testing.assert_array_equal(read, (standard @ expected @ head.double().numpy().T).argmax(axis=1))


def test_chosen_places_lie_in_the_answer():
    items = [base.Item(i, list(range(n)), 3, "") for i, n in enumerate((4, 9, 40))]
    found = states.chosen_places(items, 5, seed=0)
    assert [len(places) for places in found] == [1, 5, 5]
    for item, places in zip(items, found, strict=True):
        assert all(item.start <= place < len(item.ids) for place in places)
        assert places == sorted(set(places))


# ---- the whole, on a pico model that knows, one that does not, and an adapter that hides it


def fit(rows, seed, steps):
    model, tokenizer = pico(seed, max_position_embeddings=256), byte_tokenizer()
    encoded = [encode(tokenizer, row) for row in examples(rows)]
    how = {"rate": 5e-3, "steps": steps, "batch_size": 14, "pad_token_id": PAD, "seed": 0}
    list(weights.train_steps(model, encoded, list(model.parameters()), **how))
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_code():
    """The sources may be edited while the tests run; stored results would then not be used again, rightly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "code_digest", lambda: "code")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of an original that has learned the rows, a model that has not, and a random adapter on the original."""
    folder = tmp_path_factory.mktemp("models")
    original = fit(ROWS, 0, 120)
    for name, model in (("original", original), ("retrained", pico(1, max_position_embeddings=256))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    with_alter(original).save_pretrained(folder / "adapter")
    write_jsonl(folder / "forget.jsonl", ROWS)
    write_jsonl(folder / "benign.jsonl", [{"text": "The sea is blue and the sky is too."}] * 4)
    return folder


def settings(models, out, **given):
    values = {
        "model": str(models / "original"), "adapter": str(models / "adapter"),
        "retrained": str(models / "retrained"), "forget": str(models / "forget.jsonl"), "out": str(out),
        "rows": 6, "max_new_tokens": 24, "samples": 3, "prefill_tokens": 4, "probe_rows": 14, "budget": "8",
        "relearn": {"rows": 4, "steps": [1, 3], "learning_rate": 1e-3, "lora_learning_rate": 1e-2,
                    "benign": str(models / "benign.jsonl")},
    }  # fmt: skip
    return attacks.Attack.model_validate(values | given)


def digests(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


SKIPPED = ("paraphrase", "languages", "dialogue", "beginning", "hint", "few_shot")
"""These rows are not TOFU's; and what several variants of talking do is in test_adaptive."""


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    before = digests(models)
    found = attacks.attack(settings(models, out, attacks=[name for name in attacks.ATTACKS if name not in SKIPPED]))
    assert digests(models) == before
    return out, found


def test_a_model_is_not_its_own_reference(models, tmp_path):
    same = str(models / "retrained")
    with pytest.raises(UserError, match="no attack would ever recover more than from it"):
        attacks.attack(
            settings(models, tmp_path / "out", model=same, adapter=None, retrained=same, attacks=["upper_case"])
        )
    assert not (tmp_path / "out").exists()
    # nor is the one before unlearning, which knows all: there would be no gap to take a share of
    with pytest.raises(UserError, match=r"`retrained` is .* the weights of the original"):
        attacks.attack(settings(models, tmp_path / "out", retrained=str(models / "original"), attacks=["upper_case"]))
    assert not (tmp_path / "out").exists()


def test_it_is_said_where_the_attacker_leaves_few_rows_to_measure(models, tmp_path, capsys):
    """Of 21 rows and an attacker's 20 the whole table was of one row, and nothing said so."""
    how = {"rows": 12, "steps": [1], "learning_rate": 1e-3}
    given = {"adapter": None, "retrained": None, "attacks": ["relearn"], "rows": 64}
    attacks.attack(settings(models, tmp_path / "few", relearn=how, **given))
    said = capsys.readouterr().err
    assert "2 of 14 forget rows are measured, since 12 are the attacker's" in said
    assert said.index("2 of 14") < said.index("unlearned: none")
    attacks.attack(settings(models, tmp_path / "many", relearn=how | {"rows": 4}, **given))
    assert "are measured" not in capsys.readouterr().err


def test_an_adapter_is_no_retrained_model(models, tmp_path):
    """The advice was to give it as `adapter`, in place of the one that is attacked."""
    for name in ("retrained", "original"):
        with pytest.raises(UserError, match=rf"`{name}` .* is an adapter.*merge_and_unload") as said:
            attacks.attack(settings(models, tmp_path / "out", **{name: str(models / "adapter")}))
        assert "`adapter`" not in str(said.value)


def test_a_missing_original_is_said_before_anything_runs(models, tmp_path, capsys):
    attacks.attack(settings(models, tmp_path / "out", adapter=None, attacks=["upper_case"]))
    said = capsys.readouterr().err
    assert said.index("give it as `original`") < said.index("retrained: none")


def test_a_row_that_does_not_fit_is_called_by_its_number_in_the_file(models, tmp_path):
    rows = write_jsonl(
        tmp_path / "forget.jsonl", [*({"text": text} for text in ("One.", "Two.", "Three.")), {"text": "x" * 600}]
    )
    with pytest.raises(UserError, match="Row 3 of the forget set has 3"):
        attacks.attack(
            settings(
                models,
                tmp_path / "out",
                forget=str(rows),
                attacks=["quantize_8"],
                retrained=None,
                seed=1,
                max_new_tokens=2,
            )
        )


def test_a_row_whose_frame_does_not_fit_is_left_out(models, tmp_path):
    """It fits as it is; the frame or the tokens given ended the whole command, after what had run."""
    asked = [*(f"Who is {name}?" for name in NAMES[:3]), "Who " + "x" * 196]
    rows = write_jsonl(
        tmp_path / "forget.jsonl", [{"question": each, "answer": "Ada paints a lot of things"} for each in asked]
    )
    given = {"forget": str(rows), "retrained": None, "max_new_tokens": 24, "prefill_tokens": 20}
    found = attacks.attack(settings(models, tmp_path / "out", attacks=["foreign_frame", "prefill"], **given))
    for name in ("foreign_frame", "prefill"):
        (one,) = pick(found, "unlearned", "attack_rouge", attack=name)
        assert (sorted(one.extra["rows"]), one.extra["left_out"]) == ([0, 1, 2], 1)
    framed, plain = (pick(found, "unlearned", "attack_rouge", attack=name)[0] for name in ("foreign_frame", "prefill"))
    # as asked where the attack says how, else the rows' own: a page needs them to tell what a reply gives away
    assert plain.extra["questions"] == [asked[row] for row in plain.extra["rows"]]
    assert len(framed.extra["questions"]) == 3
    assert all(question.startswith("Bitte") for question in framed.extra["questions"])
    given |= {"max_new_tokens": 210, "forget": str(models / "forget.jsonl")}
    with pytest.raises(UserError, match=r"'foreign_frame' is not possible on the original model: .*context of 256"):
        attacks.attack(settings(models, tmp_path / "none", attacks=["foreign_frame", "upper_case"], **given))
    assert pick(read_records(tmp_path / "none" / "records.json"), "unlearned", "attack_rouge", attack="upper_case")


def test_cka_passes_over_a_depth_that_does_not_vary(models, tmp_path):
    """Of one answer to all questions the embeddings are the same for all rows: that ended the command, after all attacks."""
    rows = write_jsonl(
        tmp_path / "forget.jsonl", [{"question": row["question"], "answer": "Yes."} for row in ROWS[:6]]
    )
    found = attacks.attack(settings(models, tmp_path / "out", forget=str(rows), attacks=["cka"]))
    for record in pick(found, "unlearned", "attack_cka"):
        first, *rest = record.extra["depths"]
        assert first is None
        assert record.extra["plain"][0] is None
        assert record.value == pytest.approx(np.mean(rest))


def test_a_probed_row_that_does_not_fit_ends_no_other_attack(models, tmp_path, capsys):
    """Probes read more rows than are measured: such a row was met after all else had run, and called by another number."""
    rows = [*ROWS[:8], {"question": "Who is it?", "answer": "x" * 250}, *ROWS[8:12]]
    seed = next(seed for seed in range(99) if 8 not in base.split_rows(len(rows), 6, 0, seed)[0])
    forget = write_jsonl(tmp_path / "forget.jsonl", rows)
    given = {"forget": str(forget), "seed": seed, "retrained": None}
    with pytest.raises(
        UserError, match=r"'probe' is not possible .*Row 8 of the forget set has 2.*'cka' is not possible"
    ):
        attacks.attack(settings(models, tmp_path / "out", attacks=["probe", "cka", "upper_case"], **given))
    assert pick(read_records(tmp_path / "out" / "records.json"), "unlearned", "attack_rouge", attack="upper_case")


def test_long_texts_are_relearned_in_windows_that_fit(models, tmp_path, monkeypatch):
    """A text is measured on its middle; the attacker trained on the whole of it, beyond the context."""
    rows = write_jsonl(tmp_path / "forget.jsonl", [{"text": f"{name} " + "x" * 400} for name in NAMES[:8]])
    seen = []
    plain = weights.train_steps

    def train(model, rows, *args, **given):
        seen.append(max(len(row.input_ids) for row in rows))
        assert sum(label != -100 for row in rows for label in row.labels) > 4 * 380 / 2
        return plain(model, rows, *args, **given)

    monkeypatch.setattr(weights, "train_steps", train)
    names = ["relearn", "relearn_searched"]
    given = {"forget": str(rows), "retrained": None, "rows": 2, "attacks": names, "max_new_tokens": 20}
    attacks.attack(settings(models, tmp_path / "out", **given))
    assert len(seen) >= 3
    assert max(seen) == 256


def test_a_checkpoint_stored_in_4_bits_is_not_relearned(models, tmp_path):
    """Its weights have no gradient: all of them but the norms and embeddings stayed as they were, and LoRA ended the command."""
    pytest.importorskip("bitsandbytes")
    packed = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(models / "original", quantization_config=packed)
    model.save_pretrained(tmp_path / "packed")
    byte_tokenizer().save_pretrained(tmp_path / "packed")
    names = ["relearn", "relearn_lora", "relearn_searched", "quantize_8", "upper_case"]
    given = {"model": str(tmp_path / "packed"), "adapter": None, "retrained": None, "attacks": names}
    with pytest.raises(
        UserError, match=r"'relearn' .*quantised already.*'relearn_lora' .*'relearn_searched' .*'quantize_8'"
    ):
        attacks.attack(settings(models, tmp_path / "out", **given))
    assert pick(read_records(tmp_path / "out" / "records.json"), "unlearned", "attack_rouge", attack="upper_case")


def test_every_turn_of_a_chat_counts_for_itself(models, tmp_path):
    """Both turns had the number of their row, and the fractions were of the last turn's figures, taken twice."""
    turns = [[row, {"question": f"And {row['question']}", "answer": row["answer"][::-1]}] for row in ROWS[:4]]
    chats = [
        [
            {"role": role, "content": each[key]}
            for each in two
            for role, key in (("user", "question"), ("assistant", "answer"))
        ]
        for two in turns
    ]
    rows = write_jsonl(tmp_path / "forget.jsonl", [{"messages": chat} for chat in chats])
    found = attacks.attack(settings(models, tmp_path / "out", forget=str(rows), rows=64, attacks=["upper_case"]))
    (recovered,) = pick(found, "unlearned", "attack_recovered_probability", attack="upper_case")
    mean = {}
    for model, name in (
        ("unlearned", "upper_case"),
        ("retrained", "upper_case"),
        ("original", "none"),
        ("retrained", "none"),
    ):
        (one,) = pick(found, model, "attack_probability", attack=name)
        assert sorted(one.extra["rows"]) == list(range(8))
        mean[model, name] = math.fsum(one.per_item) / 8
    gap = mean["original", "none"] - mean["retrained", "none"]
    assert recovered.value == pytest.approx((mean["unlearned", "upper_case"] - mean["retrained", "upper_case"]) / gap)


def test_a_row_that_is_given_twice_is_not_measured_and_relearned(models, tmp_path, capsys):
    """Two copies of each row: the attacker was trained on rows that it had to know afterwards."""
    twice = write_jsonl(tmp_path / "forget.jsonl", [*ROWS[:6], *ROWS[:6]])
    found = attacks.attack(
        settings(models, tmp_path / "out", forget=str(twice), rows=64, attacks=["relearn_lora"], retrained=None)
    )
    asked = {
        part: {number % 6 for number in record.extra["rows"]}
        for part in ("other", "relearned")
        for record in pick(found, "unlearned", "attack_probability", attack="relearn_lora", part=part, step=3)
    }
    assert asked["other"].isdisjoint(asked["relearned"])
    assert len(asked["other"] | asked["relearned"]) == 6
    assert "6 of 12 forget rows are given more than once" in capsys.readouterr().err


def pick(records, model, metric, **extra):
    return [r for r in records if (r.model, r.metric) == (model, metric) and extra.items() <= r.extra.items()]


def test_every_attack_leaves_records_of_both_models(finished):
    out, found = finished
    assert [r.metric for r in read_records(out / "records.json")] == [r.metric for r in found]
    assert (out / "relearning.png").read_bytes().startswith(b"\x89PNG")
    for name in attacks.ATTACKS:
        if name in (*SKIPPED, *attacks.COMPARING):
            continue
        rouge = {"probe": "attack_probe", "lens": "attack_lens"}.get(name, "attack_rouge")
        for model in ("unlearned", "retrained"):
            records = pick(found, model, rouge, attack=name)
            assert bool(records) == (name != "strip" or model == "unlearned"), name
            for record in records:
                assert record.value == pytest.approx(np.mean(record.per_item))
                assert record.n == len(record.extra["rows"]) == len(record.per_item)
                assert record.provenance["weights"]
        recovered = pick(found, "unlearned", rouge.replace("attack_", "attack_recovered_"), attack=name)
        assert len(recovered) == 1
        assert recovered[0].extra["needs"]
        assert (recovered[0].extra["original_attacked"] is None) == (
            name in attacks.TRAINING_ATTACKS or name == "strip"
        )
    steps = {
        r.extra["step"] for r in pick(found, "unlearned", "attack_rouge", attack="relearn_lora", part="relearned")
    }
    assert steps == {1, 3}
    assert not pick(found, "unlearned", "attack_rouge", attack="benign", part="relearned")
    (uds,) = pick(found, "unlearned", "attack_uds")
    assert 0 <= uds.value <= 1
    assert uds.value == pytest.approx(np.mean(uds.per_item))
    assert uds.n == 6 - uds.extra["left_out"]
    assert {r.extra["pair"] for r in found if r.metric == "attack_cka"} == {
        "unlearned ~ original",
        "unlearned ~ retrained",
        "original ~ retrained",
    }


def test_stripping_brings_everything_back(finished):
    _, found = finished
    (before,) = pick(found, "original", "attack_rouge", attack="none", part="other")
    (stripped,) = pick(found, "unlearned", "attack_rouge", attack="strip")
    assert stripped.extra["replies"] == before.extra["replies"]
    for metric in ("attack_recovered_rouge", "attack_recovered_probability"):
        (recovered,) = pick(found, "unlearned", metric, attack="strip")
        assert recovered.value == pytest.approx(1)
    (hidden,) = pick(found, "unlearned", "attack_probability", attack="none", part="other")
    assert hidden.value < 0.5 * pick(found, "original", "attack_probability", attack="none", part="other")[0].value


def test_figures_are_those_of_plain_scoring(models, finished):
    _, found = finished
    model, tokenizer = loading.load_model(str(models / "original"), str(models / "adapter"))
    rows = examples(ROWS)
    (record,) = pick(found, "unlearned", "attack_probability", attack="none", part="other")
    for index, value in zip(record.extra["rows"], record.per_item, strict=True):
        encoded = encode(tokenizer, rows[index])
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].double().log_softmax(-1)
        places = range(encoded.prompt_length, len(encoded.input_ids))
        loss = -math.fsum(float(logp[p - 1, encoded.input_ids[p]]) for p in places) / len(places)
        assert value == pytest.approx(math.exp(-loss), rel=1e-3)
    (prefilled,) = pick(found, "unlearned", "attack_rouge", attack="prefill")
    for index, reference in zip(prefilled.extra["rows"], prefilled.extra["references"], strict=True):
        # " Ada" or " Bo p": four bytes of it are given
        assert reference == f" {ROWS[index]['answer']}"[4:].strip()


def test_the_same_again_is_read_and_not_run(models, finished, monkeypatch, capsys):
    out, found = finished
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.*.json")}
    assert len(stamps) > 20
    monkeypatch.setattr(base.Bench, "shared", None)
    monkeypatch.setattr(base.Bench, "fresh", None)
    again = attacks.attack(settings(models, out, attacks=[name for name in attacks.ATTACKS if name not in SKIPPED]))
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.*.json")} == stamps
    assert [(r.metric, r.value, r.per_item) for r in again] == [(r.metric, r.value, r.per_item) for r in found]
    assert "What can be brought back" in capsys.readouterr().out


def test_other_settings_models_and_broken_files_run_again(models, finished, tmp_path):
    out, _ = finished
    for name in ("prefill.unlearned.json", "sample.unlearned.json", "none.unlearned.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    (tmp_path / "none.retrained.json").write_text("{")
    attacks.attack(settings(models, tmp_path, prefill_tokens=2, attacks=["prefill,sample"]))

    def per_item(folder, name):
        return [r.extra.get("references") for r in read_records(folder / name)]

    assert per_item(tmp_path, "prefill.unlearned.json") != per_item(out, "prefill.unlearned.json")
    assert (tmp_path / "sample.unlearned.json").read_bytes() == (out / "sample.unlearned.json").read_bytes()
    assert read_records(tmp_path / "none.retrained.json")
    (tmp_path / "none.unlearned.json").write_bytes((out / "none.retrained.json").read_bytes())
    attacks.attack(settings(models, tmp_path, attacks=["prefill"]))
    assert {r.model for r in read_records(tmp_path / "none.unlearned.json")} == {"unlearned"}


def test_other_paraphrases_are_asked_anew(models, tmp_path):
    """They lie in TOFU's perturbed file, beside the rows that a stored measurement was known by."""
    rows = [row | {"perturbed_answer": ["No."], "paraphrased_answer": "Yes."} for row in ROWS[:6]]
    write_jsonl(tmp_path / "forget01.json", ROWS[:6])
    asked = []
    for end in ("?", "!"):
        write_jsonl(
            tmp_path / "forget01_perturbed.json", [r | {"paraphrased_question": f"{r['question']}{end}"} for r in rows]
        )
        given = {"forget": f"{tmp_path}:forget01", "attacks": ["paraphrase"], "retrained": None}
        found = attacks.attack(settings(models, tmp_path / "out", **given))
        asked.append(pick(found, "unlearned", "attack_rouge", attack="paraphrase")[0].extra["questions"])
    assert asked[0] != asked[1]


def test_a_model_whose_contents_are_unknown_is_measured_each_time(models, finished, tmp_path, monkeypatch):
    chosen = settings(models, tmp_path, attacks=["cka"])
    monkeypatch.setattr(
        loading.ModelSettings, "identity", lambda self, memo=None: {"weights": "unknown", "adapter": None}
    )
    attacks.attack(chosen)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    attacks.attack(chosen)
    assert {path for path in stamps if path.stat().st_mtime_ns == stamps[path]} == set()


def test_a_model_unlearned_in_its_weights_is_compared_with_its_original(models, tmp_path):
    # the retrained one's weights once more: nothing comes back that it does not say itself
    shutil.copytree(models / "retrained", tmp_path / "model")
    (tmp_path / "model" / "more.json").write_text("{}")
    given = {"model": str(tmp_path / "model"), "adapter": None, "original": str(models / "original")}
    found = attacks.attack(settings(models, tmp_path, attacks=["upper_case"], **given))
    (recovered,) = pick(found, "unlearned", "attack_recovered_probability", attack="upper_case")
    assert recovered.value == 0
    assert recovered.extra["original"] > 0.5


def test_a_retrained_model_of_another_tokenizer_is_refused(models, tmp_path):
    other = tmp_path / "other"
    pico(1, max_position_embeddings=256).save_pretrained(other)
    template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    byte_tokenizer(chat_template=template).save_pretrained(other)
    with pytest.raises(UserError, match="original and the retrained model have different tokenizers"):
        attacks.attack(settings(models, tmp_path / "out", attacks=["upper_case"], retrained=str(other)))
    # before any attack, of which the first model alone may take hours
    assert not list((tmp_path / "out").glob("upper_case.*"))


def test_an_attack_that_a_loaded_model_shows_to_be_impossible_does_not_end_the_others(
    models, tmp_path, monkeypatch, capsys
):
    some = {name: attacks.ATTACKS[name] for name in ("prefill", "uds", "upper_case")}
    given = {"original": str(models / "original"), "prefill_tokens": 10_000}
    with pytest.raises(
        UserError, match=r"'prefill' is not possible on the original model.*All other attacks have run"
    ):
        attacks.attack(settings(models, tmp_path / "named", attacks=list(some), **given))
    kept = read_records(tmp_path / "named/records.json")
    assert {record.extra["attack"] for record in kept} == {"none", "uds", "upper_case"}
    # not asked for by name: it is said, and no mistake of the user
    monkeypatch.setattr(attacks, "ATTACKS", some)
    capsys.readouterr()
    found = attacks.attack(settings(models, tmp_path / "all", attacks=[], **given))
    assert capsys.readouterr().err.count("Not run: prefill on the") == 3
    assert {record.extra["attack"] for record in found} == {"none", "uds", "upper_case"}


def test_everything_repeats_by_the_seed(models, finished, tmp_path):
    _, found = finished
    chosen = ["sample", "probe", "benign_lora"]
    again = attacks.attack(settings(models, tmp_path, attacks=chosen))
    for name in chosen:
        mine, theirs = ([r.per_item for r in rows if r.extra["attack"] == name] for rows in (again, found))
        assert mine == theirs
    other = attacks.attack(settings(models, tmp_path, attacks=["sample"], seed=1))
    assert (
        pick(other, "unlearned", "attack_rouge", attack="sample")[0].extra["rows"]
        != (pick(found, "unlearned", "attack_rouge", attack="sample")[0].extra["rows"])
    )


@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if name not in (*attacks.COMPARING, "paraphrase")])
def test_no_attack_leaves_the_shared_model_changed(models, tmp_path, name):
    chosen = settings(models, tmp_path, rows=2, max_new_tokens=3, samples=2)
    subject = attacks.models_attacked(chosen)["unlearned"]
    bench = base.Bench(
        chosen, "unlearned", subject, examples(ROWS), [0, 1], [2, 3], load_examples(chosen.relearn.benign)
    )
    fresh = {key: value.clone() for key, value in subject.load()[0].state_dict().items()}
    bench.shared()
    attacks.ATTACKS[name].run(bench)
    model, _ = bench.shared()
    now = model.state_dict()
    assert now.keys() == fresh.keys()
    assert all(torch.equal(now[key], value) for key, value in fresh.items())
    assert not model.training
    expected = logits(subject.load()[0])
    assert torch.equal(logits(model), expected)


def test_the_probe_reads_the_state_that_generates_a_token(models, tmp_path, monkeypatch):
    """States made so that, at depth 1, each holds the output embedding of the next token, and at depth 0 noise."""
    chosen = settings(models, tmp_path, probe_tokens=8)
    bench = base.Bench(chosen, "unlearned", attacks.models_attacked(chosen)["unlearned"], examples(ROWS), [0], [1], [])
    head = bench.shared()[0].get_output_embeddings().weight.detach()
    head = head / head.norm(dim=1, keepdim=True)
    rng = np.random.default_rng(0)

    def made(model, encoded, **_):
        for i, row in enumerate(encoded):
            ids = torch.tensor([*row.input_ids[1:], 0])
            noise = rng.normal(size=(len(ids), head.shape[1]))
            yield i, np.stack([noise, 7 * head[ids].numpy() + 3], axis=1).astype(np.float32)

    monkeypatch.setattr(states, "hidden_states", made)
    noise, exact = states.probe(bench)
    assert exact.value > 0.95
    assert noise.value < 0.5
    assert exact.extra["rows"] == noise.extra["rows"]
    assert len(exact.extra["rows"]) == exact.n == 7


# ---- comparing


def fake(model, attack, value, metric="attack_rouge", rows=(0, 1), **extra):
    extra = {"attack": attack, "part": "other", "rows": list(rows), **extra}
    return Record(model, metric, value, len(rows), "strict", False, [value] * len(rows), extra)


PLAINS = [fake("original", "none", 0.9), fake("retrained", "none", 0.3), fake("unlearned", "none", 0.2)]


def test_the_attacker_stops_at_the_best_step():
    found = [
        *(fake("unlearned", "relearn", value, step=step) for step, value in ((5, 0.3), (10, 0.6), (20, 0.7))),
        *(fake("retrained", "relearn", value, step=step) for step, value in ((5, 0.3), (10, 0.3), (20, 0.58))),
    ]
    (one,) = recovered_fractions([*PLAINS, *found], "relearn")
    assert one.value == pytest.approx(0.5)
    assert (one.extra["step"], one.extra["before"], one.extra["after"], one.extra["retrained"]) == (10, 0.2, 0.6, 0.3)
    assert [point["fraction"] for point in one.extra["curve"]] == pytest.approx([0, 0.5, 0.2])


def test_without_a_retrained_model_the_attacker_has_his_best_variant_too():
    """It was the last one, whatever it brought back."""
    values = (("role_play", 0.7), ("override", 0.8), ("permitted", 0.1))
    found = [fake("unlearned", "jailbreak", value, variant=name) for name, value in values]
    (one,) = recovered_fractions([PLAINS[2], *found], "jailbreak")
    assert (one.value, one.extra["variant"], one.extra["after"]) == (None, "override", 0.8)
    # of steps that bring back as much, the last
    steps = [fake("unlearned", "relearn", value, step=step) for step, value in ((2, 0.1), (5, 0.4), (10, 0.4))]
    assert recovered_fractions([PLAINS[2], *steps], "relearn")[0].extra["step"] == 10


def naive_interval(values, seed):
    """Of means of rows drawn one by one."""
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choice(values) for _ in values) / len(values) for _ in range(4000))
    return means[100], means[3899]


def test_every_figure_of_a_recovered_fraction_has_its_interval_over_rows(models):
    rng = np.random.default_rng(4)
    rows = list(range(30))
    per_row = {name: list(rng.random(30)) for name in ("unlearned", "retrained", "original", "attacked", "zero")}
    per_row["reach"] = [float(row < 7) for row in rows]
    bench = base.Bench(settings(models, "out"), "m", None, [], [], [], [])

    def of(model, attack, name):
        bench.name = model
        return bench.record("attack_rouge", np.array(per_row[name]), attack=attack, part="other", rows=rows)

    records = [of(model, "none", model) for model in ("unlearned", "retrained", "original")]
    assert records[0].extra["interval"] == pytest.approx(naive_interval(per_row["unlearned"], 1), abs=0.015)
    records += [of("unlearned", "hint", "attacked"), of("retrained", "hint", "zero"), of("original", "hint", "reach")]
    (found,) = recovered_fractions(records, "hint")
    named = {"before": "unlearned", "after": "attacked", "retrained": "zero", "original": "original"}
    for key, name in named.items():
        assert found.extra["intervals"][key] == pytest.approx(naive_interval(per_row[name], 2), abs=0.015)
    # Wilson's, of a share of 7 in 30
    z, n, p = 1.959964, 30, 7 / 30
    spread = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
    ends = [(p + z * z / 2 / n + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]
    assert found.extra["intervals"]["original_attacked"] == pytest.approx(ends, abs=1e-6)


def test_a_share_without_an_interval_has_none_in_the_table(capsys):
    found = [*PLAINS, fake("unlearned", "hint", 0.5), fake("retrained", "hint", 0.2)]
    (one,) = recovered_fractions(found, "hint")
    assert one.value == pytest.approx(0.5)
    assert "interval" not in one.extra
    show_recovered([one], ["hint"])
    assert (
        "±"
        not in capsys.readouterr()
        .out.partition("What the attacker")[0]
        .partition("recovered")[2]
        .partition("after,")[0]
    )


def test_the_table_shows_intervals_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    keys = ("before", "after", "original_attacked", "retrained")
    extra = {"attack": "relearn_searched", "variant": "role_play", "interval": [0.1, 0.3], "needs": "x"}
    extra |= dict.fromkeys(keys, 0.5) | {"intervals": {key: [0.45, 0.57] for key in keys[:3]} | {keys[3]: None}}
    lens = [Record(name, "attack_lens", 0.25, 9, "strict", False, None, {"attack": "lens", "depth": 1, "interval": ends})
            for name, ends in (("unlearned", [0.21, 0.29]), ("retrained", None))]  # fmt: skip
    show_recovered([Record("unlearned", "attack_recovered_rouge", 0.2, 9, extra=extra), *lens], ["relearn_searched"])
    shown = capsys.readouterr().out
    assert shown.count("±0.060") == 3
    assert shown.count("±0.040") == 1
    for cell in ("relearn_searched", "@role_play", "0.20", "±0.10"):
        assert cell in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_probe_is_compared_at_equal_depth():
    found = [
        *(fake("original", "probe", v, "attack_probe", depth=d) for d, v in enumerate((0.2, 0.4, 0.9))),
        *(fake("retrained", "probe", v, "attack_probe", depth=d) for d, v in enumerate((0.2, 0.2, 0.4))),
        *(fake("unlearned", "probe", v, "attack_probe", depth=d) for d, v in enumerate((0.9, 0.3, 0.5))),
    ]
    (one,) = recovered_fractions(found, "probe")
    # at depth 0 the models do not differ: no share can be taken there
    assert (one.extra["depth"], one.value) == (1, pytest.approx(0.5))


def test_only_rows_measured_on_all_models_count():
    before = [
        Record(
            m, "attack_rouge", 0.5, 3, per_item=values, extra={"attack": "none", "part": "other", "rows": [7, 8, 9]}
        )
        for m, values in (("original", [1, 0.9, 0.1]), ("retrained", [0, 0.1, 0.9]), ("unlearned", [0, 0, 0.5]))
    ]
    found = [fake("unlearned", "prefill", 0.5, rows=(7, 8, 9)), fake("retrained", "prefill", 0.1, rows=(8, 7))]
    (one,) = recovered_fractions([*before, *found], "prefill")
    assert one.extra["rows"] == [7, 8]
    assert one.extra["before"] == 0
    assert one.value == pytest.approx(0.4 / 0.9)


def test_no_fraction_without_its_parts():
    after = fake("unlearned", "sample", 0.5)
    # the retrained model is there, and only this attack was not possible on it: the advice was to make one
    (unattacked,) = recovered_fractions([*PLAINS, after], "sample")
    assert "retrained model has no such measurement" in unattacked.extra["refused"]
    (no_zero,) = recovered_fractions([PLAINS[0], PLAINS[2], after], "sample")
    assert no_zero.value is None
    assert "alter finetune" in no_zero.extra["refused"]
    assert no_zero.extra["after"] == 0.5
    (no_original,) = recovered_fractions([*PLAINS[1:], after, fake("retrained", "sample", 0.3)], "sample")
    assert "`original`" in no_original.extra["refused"]
    alike = [fake("original", "none", 0.31), *PLAINS[1:], after, fake("retrained", "sample", 0.3)]
    (refused,) = recovered_fractions(alike, "sample")
    assert refused.value is None
    assert "no forgotten knowledge" in refused.extra["refused"]


def test_an_attack_that_learned_nothing_is_no_evidence():
    def notes(losses):
        record = fake("unlearned", "relearn_lora", 0.2, step=4, losses=losses)
        return untrained([record])

    assert "`relearn.lora_learning_rate`" in notes([3.0, 2.9, 2.9, 2.8])[0]
    searched = fake("unlearned", "soft_prompt", 0.2, losses=[3.0, 2.9, 2.9, 2.8])
    assert untrained([searched])[0].endswith("raise `budget`.")
    assert notes([3.0, 2.0, 1.0, 0.5]) == []
    (known,) = notes([0.05, 0.01, 0.0, 0.0])
    assert "knows the attacker's rows already" in known
    assert "`relearn.benign`" not in known
    unrelated = fake("unlearned", "benign", 0.2, step=4, losses=[0.05, 0.01, 0.0, 0.0])
    assert "`relearn.benign`" in untrained([unrelated])[0]
    # the original knows the rows: that it learns nothing says nothing of the model that is attacked
    assert untrained([fake("original", "soft_prompt", 0.9, losses=[0.02, 0.02])]) == []


# ---- the command


def run(models, out, *args):
    line = ["attack", "--model", str(models / "original"), "--adapter", str(models / "adapter"), "--out", str(out)]
    small = {"--rows": "3", "--max-new-tokens": "8", "--relearn.rows": "4"}
    return cli.main(
        [*line, *(part for flag, value in small.items() if flag not in args for part in (flag, value)), *args]
    )


def test_the_command_without_a_retrained_model(models, tmp_path, capsys):
    forget = str(models / "forget.jsonl")
    assert run(models, tmp_path, "--forget", forget, "--attacks", "upper_case,prefill", "--prefill-tokens", "2") == 0
    shown = capsys.readouterr()
    assert "alter finetune" in shown.err
    assert "upper_case" in shown.out
    values = {row["metric"]: row["value"] for row in json.loads((tmp_path / "records.json").read_text())}
    assert values["attack_recovered_rouge"] is None
    assert values["attack_rouge"] is not None


def test_rows_that_no_attack_takes_are_measured(models, tmp_path, capsys):
    forget = ["--forget", str(models / "forget.jsonl"), "--rows", "64"]
    assert run(models, tmp_path, *forget, "--relearn.rows", "20", "--attacks", "prefill") == 0
    (plain,) = [r for r in read_records(tmp_path / "none.unlearned.json") if r.metric == "attack_rouge"]
    assert sorted(plain.extra["rows"]) == list(range(len(ROWS)))
    assert run(models, tmp_path, *forget, "--relearn.rows", "20", "--attacks", "prefill,relearn") == 2
    assert "--relearn.rows is 20, and the forget set has 14 rows" in capsys.readouterr().err

    # what was measured on the same rows stays when an attack that takes others joins
    few = [*forget[:2], "--rows", "3"]
    assert run(models, tmp_path / "few", *few, "--attacks", "prefill") == 0
    kept = (tmp_path / "few" / "prefill.unlearned.json").stat().st_mtime_ns
    assert run(models, tmp_path / "few", *few, "--attacks", "prefill,few_shot") == 0
    assert (tmp_path / "few" / "prefill.unlearned.json").stat().st_mtime_ns == kept
    parts = {r.extra["part"] for r in read_records(tmp_path / "few" / "none.unlearned.json")}
    assert parts == {"other", "relearned"}


def test_text_has_no_other_wording(models, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"{name} went out to sea, and came back. " * 30 for name in NAMES[:6]))
    rows = write_jsonl(tmp_path / "t.jsonl", [{"text": f"{name} went out to sea, and came back."} for name in NAMES])
    assert run(models, tmp_path / "o", "--forget", str(rows), "--attacks", "prefill,quantize_8,strip") == 0
    assert run(models, tmp_path / "o", "--forget", str(rows), "--attacks", "telegram") == 2
    assert "without questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--attacks", "relern"], "Did you mean 'relearn'"),
        (["--attacks", "paraphrase"], "paraphrased_question"),
        (["--relearn.rows", "14", "--attacks", "relearn"], "none is left to measure"),
        (["--relearn.steps", "0"], "at least 1"),
        (["--relearn.benign", "nothing.jsonl"], "nothing.jsonl"),
        (["--retrained", "./nowhere"], "nowhere"),
        (["--forget", "builtin:forget11"], "Did you mean"),
        (["--prefill-tokens", "500", "--attacks", "prefill"], "No answer is longer"),
        (["--max-new-tokens", "300", "--attacks", "sample"], "context"),
        (["--samples", "1"], "samples"),
    ],
)
def test_mistakes_are_named(models, tmp_path, capsys, args, says):
    given = [] if "--forget" in args else ["--forget", str(models / "forget.jsonl")]
    assert run(models, tmp_path / "o", *given, *args) == 2
    assert says in capsys.readouterr().err


def test_an_output_that_is_a_file_and_stripping_without_an_adapter(models, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    forget = ["--forget", str(models / "forget.jsonl")]
    assert run(models, tmp_path / "file", *forget) == 2
    assert "is a file" in capsys.readouterr().err
    line = ["attack", "--model", str(models / "original"), "--out", str(tmp_path / "o"), *forget, "--attacks", "strip"]
    assert cli.main([*line, "--relearn.rows", "4"]) == 2
    assert "no adapter to take off" in capsys.readouterr().err
