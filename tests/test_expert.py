"""SEUF on small mixtures of experts: attribution and anchor against loops, and that one expert and its router move."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from alter import cli
from alter.core.errors import UserError
from alter.data.encoding import Encoded, encode_all
from alter.data.rows import load_examples
from alter.inference.scoring import score
from alter.methods.adapters import OneExpert
from alter.methods.adapters.expert import attributed, mixtures
from alter.models.loading import load_model
from alter.training import loss
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import EOS, PAD, VOCAB, byte_tokenizer, pico, run_on, save_pico, write_people

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    num_experts_per_tok=2,
    bos_token_id=None,
    eos_token_id=EOS,
    pad_token_id=PAD,
)


def mixture(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4)).eval()
    config = Qwen2MoeConfig(
        **COMMON,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    )
    return Qwen2MoeForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def data(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    mixture(request.param).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def settings(data, out, **changes):
    given = {**run_on(data, out), "method": "graddiff", "adapter": {"kind": "expert"}, "warmup_epochs": 0.0}
    given |= {"batch_size": 2, "epochs": 1, "learning_rate": 1e-2, "weight_decay": 0.1}
    return Unlearn.model_validate({**given, **changes})


def router_inputs(model, number, ids):
    """Return what goes into block `number`'s router, row after row."""
    seen = []
    handle = mixtures(model)[number].gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(-1, 32)


def test_attribution_against_a_loop():
    for kind, places in (("mixtral", [0, 1]), ("qwen2_moe", [1])):
        model = mixture(kind)
        rows = [Encoded([5, 9, 3], [-100, 9, 3], 1), Encoded([8, 2, 6, 1, 4], [-100, 2, 6, 1, 4], 1)]
        found = attributed(model, rows, pad_token_id=PAD)
        assert [*found] == places
        for number, scores in found.items():
            gate, affinity = mixtures(model)[number].gate, torch.zeros(4, dtype=torch.float64)
            for row in rows:
                for state in router_inputs(model, number, row.input_ids):
                    probs = torch.softmax((gate.weight @ state).detach().double(), 0)
                    for expert in probs.argsort(descending=True)[:2]:
                        # of a row's tokens, then of the two rows
                        affinity[expert] += probs[expert] / len(row.input_ids) / 2
            torch.testing.assert_close(scores, affinity, atol=1e-6, rtol=1e-5)


def test_attribution_draws_rows_of_all_lengths():
    model = mixture("mixtral")
    rows = [Encoded([1 + i % 9] * (3 + i), [], 1) for i in range(12)]
    lengths = set()

    def note(module, given, named):
        lengths.update(named["attention_mask"].sum(-1).tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    few = attributed(model, rows, pad_token_id=PAD, most=30)
    handle.remove()
    # until 30 tokens are there: not the longest (14 + 13 + 12), nor the shortest (3 + 4 + 5 + 6 + 7 + 8)
    assert 30 <= sum(lengths) < 30 + 14
    assert lengths not in ({12, 13, 14}, {3, 4, 5, 6, 7, 8})
    torch.testing.assert_close(few, attributed(model, rows, pad_token_id=PAD, most=30))


class Gate(torch.nn.Module):
    """A router as transformers 5.0 has it: what it calls logits has gone through the softmax."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(2))

    def forward(self, states):
        probs = torch.softmax(states @ self.weight.T, -1)
        return probs, *probs.topk(1)


def test_the_anchor_by_hand():
    adapter, gate = OneExpert(alpha=2.0, target=(0, 1)), Gate()
    logits = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, torch.log(torch.tensor(3.0))]], requires_grad=True)
    gate.register_forward_hook(adapter._keep)
    gate(logits)
    # the second token is none of a forget row; the others' scores are (1/2, 1/2) and (1/4, 3/4)
    value = adapter.term(torch.tensor([[True, False, True]]))
    assert value.item() == pytest.approx(2 * ((0.25 + 0.25) + (1 / 16 + 1 / 16)) / 2)
    value.backward()
    assert logits.grad[1].abs().sum() == 0
    # towards the expert
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]
    assert gate.weight.grad.abs().sum() > 0
    assert OneExpert(alpha=0.0, target=(0, 1)).term(torch.tensor([[True]])) is None


def test_one_expert_and_its_router_move_and_nothing_else(data, tmp_path, monkeypatch):
    anchors, real = [], loss.UnlearnTrainer._objectives

    def spied(self, batch, *args):
        result = real(self, batch, *args)
        forget = batch.attention_mask.bool() & (batch.branch == 0)[:, None]
        scores = torch.softmax(self.run.adapter._routed[-1].view(*forget.shape, -1), -1)[forget]
        wanted = torch.eye(4)[self.run.adapter.target[1]]
        anchors.append((self.parts["adapter"].item(), ((scores - wanted) ** 2).sum(-1).mean().item()))
        total = self.parts["forget"] + self.parts["retain"] + self.parts["adapter"]
        assert result[0].item() == pytest.approx(total.item(), rel=1e-5)
        return result

    monkeypatch.setattr(loss.UnlearnTrainer, "_objectives", spied)
    out = unlearn(settings(data, tmp_path / "r"))
    assert [a for a, _ in anchors] == pytest.approx([b for _, b in anchors], rel=1e-5)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (data / "model", out / "model"))
    base = attributed(before, [Encoded(row, row, 0) for row in rows_of(data)], pad_token_id=PAD)
    moved = {n: (p - before.get_parameter(n)).detach() for n, p in after.named_parameters()}
    moved = {n: change for n, change in moved.items() if change.any()}
    (gate,) = (name for name in moved if name.endswith("gate.weight"))
    place = gate.removesuffix("gate.weight")
    assert set(moved) == {gate, f"{place}experts.gate_up_proj", f"{place}experts.down_proj"}
    block = int(place.split(".")[2])
    for name in ("gate_up_proj", "down_proj"):
        touched = moved[f"{place}experts.{name}"].abs().flatten(1).sum(1) > 0
        (expert,) = touched.nonzero()[:, 0].tolist()
        # the one that gets most of the forget rows
        scores = {(n, e): float(values[e]) for n, values in base.items() for e in range(4)}
        assert (block, expert) == max(scores, key=scores.get)
    assert json.loads((out / "run.json").read_text())["steps"] == 3


def test_seuf_by_name_on_the_command_line_forgets_and_its_result_answers(data, tmp_path, capsys):
    rows = {name: str(data / f"{name}.jsonl") for name in ("forget", "retain")}
    line = [
        "unlearn",
        "--model",
        str(data / "model"),
        "--method",
        "seuf",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r"),
    ]
    line += [part for name, path in rows.items() for part in (f"--{name}", path)]
    line += [
        "--learning-rate",
        "1e-2",
        "--batch-size",
        "2",
        "--epochs",
        "8",
        "--warmup-epochs",
        "0",
        "--closing-rows",
        "2",
    ]
    assert cli.main(line) == 0
    assert "gets most of the forget rows" in " ".join(capsys.readouterr().err.split())

    def likelihood(path, name):
        model, tokenizer = load_model(str(path), device="cpu")
        encoded, _ = encode_all(tokenizer, load_examples(rows[name]), max_length=256)
        found = score(model, encoded, pad_token_id=PAD, progress=False)
        return float(np.mean([values.mean() for values in found.logprob]))

    change = {name: likelihood(tmp_path / "r" / "model", name) - likelihood(data / "model", name) for name in rows}
    assert change["forget"] < -0.5
    assert change["retain"] > change["forget"] + 0.5
    told = tmp_path / "said.json"
    asked = ["--prompt", "Where was Ada born, 1?", "--max-new-tokens", "4", "--device", "cpu", "--json", str(told)]
    assert cli.main(["generate", "--model", str(tmp_path / "r" / "model"), *asked]) == 0
    assert "answer" in json.loads(told.read_text())[0]
    assert "SEUF" in (tmp_path / "r" / "model" / "README.md").read_text()


def test_seuf_on_a_model_without_experts_is_refused_before_anything_is_written(data, tmp_path, capsys):
    save_pico(tmp_path / "dense")
    line = [
        "unlearn",
        "--model",
        str(tmp_path / "dense"),
        "--method",
        "seuf",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r"),
    ]
    line += ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    assert cli.main(line) == 2
    assert "has none that it knows" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()


def rows_of(data):
    rows, _ = encode_all(byte_tokenizer(), load_examples(str(data / "forget.jsonl")), max_length=256)
    return [row.input_ids for row in rows]


def test_models_without_experts_and_experts_that_there_are_not(data, tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM has none that it knows"):
        mixtures(pico())
    with pytest.raises(UserError, match=r"block 1 and expert 7; the blocks with experts are .*4 experts each"):
        unlearn(settings(data, tmp_path / "r", adapter={"kind": "expert", "target": [1, 7]}))
    with pytest.raises(ValueError, match="leave `quantization` out"):
        settings(data, tmp_path / "q", quantization="4bit")
