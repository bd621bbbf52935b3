"""CATNIP, PDU, DUET, bidirectional distillation and AltPO: oracles by hand, loops in float64, gradients, dual ascent."""

import json
import math
from typing import ClassVar

import pytest
import torch

from alter.core.errors import UserError
from alter.data import Encoded
from alter.groundwork import frozen
from alter.groundwork.alternatives import alternatives
from alter.methods.objectives import Emitted, Labelled, Reference
from alter.methods.objectives.answers import RandomLabels
from alter.methods.objectives.likelihood import Catnip, FlattenLogits
from alter.methods.objectives.retain import Constrained
from alter.methods.objectives.targets import Duet, PushPull
from alter.training import loss, preparation
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import run_on, save_pico, write_jsonl, write_people

LOGITS = torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [-1, 3, 0.5, 2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 3])


def random(n=7, vocabulary=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(vocabulary, (n,), generator=generator), teacher


def test_catnip_oracle_loop_and_gradient():
    # p = 1/2 of two equally likely tokens: the odds are 1, the loss 2 ln 2, and ascent has weight 1
    even = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    value = Catnip().per_token(Emitted(even, torch.tensor([0])))
    assert value.item() == pytest.approx(2 * math.log(2))
    value.backward()
    # of log p: (1 - p) at the label
    assert even.grad[0].tolist() == pytest.approx([0.5, -0.5])
    logits, labels, _ = random()
    for beta in (0.5, 1.0, 3.0):
        logits.grad = None
        values = Catnip(beta=beta).per_token(Emitted(logits, labels))
        values.sum().backward()
        for i, y in enumerate(labels.tolist()):
            p = torch.softmax(logits.detach()[i], -1)
            odds = math.log(p[y]) - math.log(sum(p[v] for v in range(12) if v != y))
            assert values[i].item() == pytest.approx(2 / beta * math.log1p(math.exp(beta * odds)), rel=1e-9)
            weight = 2 * p[y] ** beta / (p[y] ** beta + (1 - p[y]) ** beta)
            expected = weight * ((torch.arange(12) == y).double() - p)
            torch.testing.assert_close(logits.grad[i], expected)


def test_flat_logits_oracle_and_gradient():
    logits = LOGITS.clone().requires_grad_()
    values = FlattenLogits().per_token(Emitted(logits, LABELS))
    # 2 - 1/2, 0 - 0, 3 - 4.5/4
    assert values.tolist() == pytest.approx([2.25, 0.0, 1.875**2])
    values.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([3 * 0.75, -0.75, -0.75, -0.75])
    assert logits.grad[1].tolist() == pytest.approx([0.0] * 4)


def naive_duet(own, teacher, top, push, kept):
    order = sorted(range(len(teacher)), key=lambda v: -teacher[v])
    total = 0.0
    for v in order[:top]:
        away = abs(own[v] - teacher[v])
        total += away**2 / 2 if away < 1 else away - 0.5
    for v in sorted(range(len(own)), key=lambda v: -own[v])[:top]:
        if v not in order[:top]:
            # beyond the kept ones the least kept logit stands in
            theirs = teacher[v] if v in order[:kept] else teacher[order[kept - 1]]
            total += push * max(0.0, own[v] - theirs)
    return total


def test_duet_and_push_pull_by_hand():
    # teacher's two likeliest are tokens 0 and 1; the student's are 1 and 3
    teacher = Reference(torch.tensor([[0, 1, 2]]), torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64))
    own = torch.tensor([[1.5, 4.0, -1.0, 3.0]], dtype=torch.float64)
    emitted = Emitted(own, torch.tensor([0]), teacher)
    # Huber of 0.5 and of 3
    assert Duet(top=2).per_token(emitted).item() == pytest.approx(0.125 + 2.5)
    # token 3 is beyond the kept three, whose least is 0
    assert PushPull(top=2, push=2.0).per_token(emitted).item() == pytest.approx(0.125 + 2.5 + 2 * 3.0)


@pytest.mark.parametrize(("top", "kept"), [(3, 12), (3, 6), (12, 12), (50, 12)])
def test_duet_and_push_pull_equal_loops(top, kept):
    logits, labels, teacher = random()
    reference = frozen.top_k(teacher, kept)
    emitted = Emitted(logits, labels, Reference(reference.ids.long(), reference.logp))
    for push in (0.0, 0.7):
        objective = PushPull(top=top, push=push) if push else Duet(top=top)
        values = objective.per_token(emitted)
        for i in range(len(labels)):
            naive = naive_duet(logits[i].tolist(), teacher[i].tolist(), top, push, kept)
            assert values[i].item() == pytest.approx(naive, rel=1e-9)


def test_duet_compares_the_first_tokens_of_replies_where_rows_are_questions():
    # tokens of three rows: two, one and three
    values = torch.tensor([1.0, 20.0, 2.0, 6.0, 30.0, 40.0], dtype=torch.float64)
    row = torch.tensor([0, 0, 1, 2, 2, 2])
    tokens = Labelled(values, torch.zeros(6, dtype=torch.bool), row, 3)
    assert Duet(first=True)(tokens).item() == pytest.approx((1.0 + 2.0 + 6.0) / 3)
    assert Duet()(tokens).item() == pytest.approx(99.0 / 6)


def test_random_labels_are_tokens_though_the_head_is_padded():
    class Tokenizer:
        vocab_size = 5
        all_special_ids: ClassVar = [0]

    class Config:
        vocab_size = 1000

        def get_text_config(self):
            return self

    class Base:
        config = Config()

    row = Encoded([0, 1, *[2] * 98], [-100, 0, *[2] * 98], 1)
    (made,) = alternatives(RandomLabels(), Tokenizer(), Base(), [], [row], seed=0, max_length=None)
    assert made.labels[:2] == [-100, 0]
    assert set(made.labels[2:]) == set(range(5))


def test_dual_ascent_by_hand():
    own, constraint = loss.OwnState(), Constrained(epsilon=0.5, start=2.0, step=10.0, warmup_epochs=1.0)
    # during the warm-up the weight stays; then 2 + 10 (0.6 - 0.5), and 3 + 10 (0.1 - 0.5) is below 0
    weights = [own.weigh(constraint, value, epoch) for value, epoch in ((9.0, 0.0), (9.0, 0.5), (0.6, 1.0))]
    assert weights == [2.0, 2.0, 2.0]
    assert own.weigh(constraint, 0.1, 1.5) == pytest.approx(3.0)
    assert own.weigh(constraint, 0.5, 2.0) == 0.0
    assert loss.OwnState(**own.state()["args"]).kept == own.kept


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("further")
    save_pico(folder / "model", max_position_embeddings=512)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def settings(data, out, **changes):
    given = {**run_on(data, out), "batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 1}
    return Unlearn.model_validate({**given, **changes})


def test_pdus_weight_changes_by_the_loss_of_each_step_and_is_resumed(data, tmp_path):
    constraint = {"kind": "constrained", "epsilon": 0.5, "start": 2.0, "step": 1.0, "warmup_epochs": 1.0}
    given = {"method": "pdu", "retain_objective": constraint, "epochs": 3, "save_steps": 4}
    given |= {"warmup_steps": 0, "learning_rate": 1e-3}
    weights = []
    real = loss.OwnState.weigh

    def spied(self, *args):
        weights.append((real(self, *args), args[1]))
        return weights[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.OwnState, "weigh", spied)
        unlearn(settings(data, tmp_path / "whole", **given))
        whole = weights.copy()
        # 3 steps an epoch
        expected = 2.0
        for step, (weight, value) in enumerate(whole):
            assert weight == pytest.approx(expected)
            expected = max(0.0, expected + value - 0.5) if step >= 3 else expected
        assert len({weight for weight, _ in whole}) > 3
        weights.clear()

        def stopping(self, *args):
            if self.kept and len(weights) == 6:
                raise KeyboardInterrupt
            return spied(self, *args)

        patch.setattr(loss.OwnState, "weigh", stopping)
        with pytest.raises(KeyboardInterrupt):
            unlearn(settings(data, tmp_path / "cut", **given))
        weights.clear()
        patch.setattr(loss.OwnState, "weigh", spied)
        unlearn(settings(data, tmp_path / "cut", **given, resume=True))
    assert [w for w, _ in weights] == pytest.approx([w for w, _ in whole[4:]])


def test_altpo_takes_a_rows_own_substitute_and_samples_the_others(data, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    rows[0]["substitute"] = "In another town."
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    seen = []

    class Enough(Exception):
        pass

    def look(self, model, inputs, **_):
        seen.append(inputs)
        raise Enough

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", look)
    given = {"method": "altpo", "objective": {"new_tokens": 5}, "forget": str(path), "batch_size": 6}
    for out in ("a", "b"):
        with pytest.raises(Enough):
            unlearn(settings(data, tmp_path / out, **given))
    first, again = seen
    # what is sampled is the same every time
    assert torch.equal(first["input_ids"], again["input_ids"])
    from pico import byte_tokenizer

    said = [
        byte_tokenizer().decode([t for t, y in zip(ids.tolist(), labels.tolist(), strict=True) if y != -100])
        for ids, labels, branch in zip(first["input_ids"], first["labels"], first["batch"].branch, strict=True)
        if branch == 1
    ]
    assert len(said) == 6
    assert sum("In another town." in text for text in said) == 1


def test_mistakes(data, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Call me Ada."}, {"text": "Some years ago."}])
    with pytest.raises(UserError, match="raw text without a question"):
        unlearn(settings(data, tmp_path / "a", method="altpo", forget=str(text), domain_column=None))
    with pytest.raises(UserError, match=r"new_tokens` is 400; .* give `objective\.new_tokens` 2\d\d or less"):
        unlearn(settings(data, tmp_path / "a", method="altpo", objective={"new_tokens": 400}))
    with pytest.raises(UserError, match=r"raw text has no question .* `objective\.first=False`"):
        unlearn(settings(data, tmp_path / "a", method="duet", forget=str(text), domain_column=None))
    with pytest.raises(UserError, match="one teacher"):
        unlearn(settings(data, tmp_path / "b", method="duet", objective={"instruction": "Forget Ada."}))
    words = {"instruction": "x" * 600}
    with pytest.raises(UserError, match="shorter instruction"):
        unlearn(settings(data, tmp_path / "c", method="duet", objective=words, retain_objective=words))


def test_duets_teacher_is_the_base_after_the_instruction(data, tmp_path, monkeypatch):
    """The kept logits are those of the row behind the instruction, at the answer's positions."""
    words = {"instruction": "Forget Ada.", "top": 4}
    kept = {}

    def stop(*args, **given):
        kept["traced"], *_ = real(*args, **given)
        kept["rows"], kept["model"] = args[3], args[0]
        raise KeyboardInterrupt

    real = preparation.trace_run
    monkeypatch.setattr(preparation, "trace_run", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn(settings(data, tmp_path / "r", method="duet", objective=words, retain_objective=words))
    from pico import byte_tokenizer

    said = byte_tokenizer()("Forget Ada.", add_special_tokens=False)["input_ids"]
    for name in ("forget", "retain"):
        number, row = next(iter(kept["traced"][name].items()))
        encoded = kept["rows"].of(name)[number]
        start = int(encoded.input_ids[0] == byte_tokenizer().bos_token_id)
        ids = encoded.input_ids[:start] + said + encoded.input_ids[start:]
        with torch.no_grad():
            logits = kept["model"].get_base_model()(input_ids=torch.tensor([ids])).logits[0]
        places = [t - 1 + len(said) for t, y in enumerate(encoded.labels) if y != -100 and t > 0]
        for i, t in enumerate(places):
            expected = logits[t][row.reference.ids[i].long()]
            torch.testing.assert_close(row.reference.logp[i], expected, atol=1e-4, rtol=1e-4)
