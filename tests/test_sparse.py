"""SAE-guided unlearning and LUNAR: by hand and against loops, folders of sae-lens, names, and runs on a small model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alter import cli
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import Example, load_examples
from alter.groundwork import recognition
from alter.groundwork.frozen import FrozenRow
from alter.groundwork.sparse import Autoencoder, read_autoencoder, train_autoencoder
from alter.methods.objectives import Codes, Hidden, Labelled, Redirect, UnknownCode
from alter.training import loss, redirection
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, run_on, save_pico, write_jsonl, write_people

WIDTH, FEATURES = 32, 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_code(state, weights, *, centred=True, threshold=None, active=None, by_decoder=False):
    """The code of one state, number by number."""
    W, e, V, b = (weights[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    before = []
    for j in range(len(e)):
        value = float(e[j]) + sum(
            (float(state[d]) - centred * float(b[d])) * float(W[d, j]) for d in range(len(state))
        )
        before.append(value * sum(float(v) ** 2 for v in V[j]) ** 0.5 if by_decoder else value)
    code = [max(0.0, value) for value in before]
    if threshold is not None:
        code = [c if value > float(t) else 0.0 for c, value, t in zip(code, before, threshold, strict=True)]
    if active is not None:
        largest = sorted(range(len(code)), key=lambda j: -code[j])[:active]
        code = [c if j in largest else 0.0 for j, c in enumerate(code)]
    return code


def weights_of(width=WIDTH, features=FEATURES, **more):
    made = {
        "W_enc": drawn(width, features),
        "b_enc": 0.3 * drawn(features, seed=1),
        "W_dec": drawn(features, width, seed=2),
    }
    return {name: value.float() for name, value in {**made, "b_dec": 0.5 * drawn(width, seed=3), **more}.items()}


def folder_of(path, weights, **config):
    path.mkdir()
    save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({"architecture": "standard"}, {}),
        ({"architecture": "standard", "apply_b_dec_to_input": False}, {"centred": False}),
        ({"architecture": "topk", "k": 2}, {"active": 2}),
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}, {"active": 2, "by_decoder": True}),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, {"active": 3}),
        ({"architecture": "jumprelu"}, {"threshold": torch.tensor([0.0, 1.0, 9.0, 0.5, 2.0, 0.1])}),
    ],
    ids=str,
)
def test_a_folder_of_sae_lens_encodes_as_a_loop_does(tmp_path, config, how):
    weights = weights_of(**({"threshold": how["threshold"]} if "threshold" in how else {}))
    given, block = read_autoencoder(folder_of(tmp_path / "sae", weights, **config))
    assert block is None
    states = drawn(5, WIDTH, seed=4)
    found = given.encode(states)
    expected = [naive_code(state, weights, **how) for state in states]
    assert found.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    assert (found == 0).any()


def test_states_are_standardised_where_the_autoencoder_was_trained_so(tmp_path):
    weights = weights_of()
    given, _ = read_autoencoder(folder_of(tmp_path / "sae", weights, normalize_activations="layer_norm"))
    state = drawn(WIDTH)
    flat = (state - state.mean()) / (state.std() + 1e-5)
    assert given.encode(state).tolist() == pytest.approx(naive_code(flat, weights), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.1.hook_resid_post", 1),
        ("blocks.2.hook_resid_pre", 1),
        ("model.layers.3", 3),
        ("transformer.h.0", 0),
    ],
)
def test_the_block_is_the_one_whose_output_is_read(tmp_path, name, block):
    assert read_autoencoder(folder_of(tmp_path / "new", weights_of(), metadata={"hook_name": name}))[1] == block
    assert read_autoencoder(folder_of(tmp_path / "old", weights_of(), hook_name=name))[1] == block


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "gated"}, "expected standard, jumprelu, topk"),
        ({"architecture": "topk"}, "has k None"),
        ({"activation_fn": "tanh-relu"}, "expected relu or topk"),
        ({"architecture": "jumprelu"}, "no threshold"),
        ({"normalize_activations": "constant_norm_rescale"}, "expected none, layer_norm"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "expected a block's output"),
        ({"hook_name": "blocks.0.attn.hook_z"}, "expected a block's output"),
    ],
    ids=str,
)
def test_autoencoders_that_are_not_read(tmp_path, config, says):
    with pytest.raises(UserError, match=says):
        read_autoencoder(folder_of(tmp_path / "sae", weights_of(), **config))


def test_folders_that_hold_no_autoencoder(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with cfg\.json"):
        read_autoencoder(str(tmp_path))
    folder_of(tmp_path / "sae", weights_of())
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        read_autoencoder(str(tmp_path / "sae"))
    wrong = weights_of() | {"W_dec": weights_of()["W_enc"]}
    with pytest.raises(UserError, match="the other way round"):
        read_autoencoder(folder_of(tmp_path / "wrong", wrong))


def test_a_trained_autoencoder_gives_sparse_states_back():
    # every state is the sum of two of ten directions
    directions = torch.nn.functional.normalize(drawn(10, 16), dim=-1)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.stack([torch.randperm(10, generator=generator)[:2] for _ in range(600)])
    states = 7 * directions[chosen].sum(1).float()
    given, told = train_autoencoder(states, 40, 4, steps=300, seed=0)
    assert (given.encode(states) > 0).sum(1).max() <= 4
    back = given.encode(states) @ given.decoder + given.centre
    naive = 1 - float(((back - states) ** 2).sum() / ((states - states.mean(0)) ** 2).sum())
    assert told == pytest.approx(naive, abs=1e-5)
    assert told > 0.8
    short = [train_autoencoder(unit * states, 40, 4, steps=5, seed=0) for unit in (1, 1, 100)]
    assert torch.equal(short[0][0].encoder, short[1][0].encoder)
    # the unit of the states changes nothing but that of their codes
    assert short[2][1] == pytest.approx(short[0][1], abs=1e-4)
    expected = 100 * short[0][0].encode(states)
    torch.testing.assert_close(short[2][0].encode(100 * states), expected, atol=1e-2, rtol=1e-3)


def codes_by_hand():
    """Two features that read a state as it is, relu, an unknown name at (0, 1), a known one at (2, 0), and a scale of 4."""
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    unknown, known = torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0, 0.0]).double()
    return Codes(Autoencoder(eye, zero, eye, zero).encode, unknown, known, 4.0)


def test_the_objective_by_hand_and_its_gradient():
    # the second row has one name token; the third state belongs to no name
    states = torch.tensor([[1.0, -3.0], [2.0, 2.0], [9.0, 9.0], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    row, named = torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, False, True])
    hidden = Hidden(states, row, named=named, codes=codes_by_hand())
    none = torch.zeros(0)
    value = UnknownCode(away=0.5)(Labelled(none, none.bool(), rows=2, hidden=hidden))
    # codes (1, 0), (2, 2), (0, 3): from (0, 1) 2, 5, 4; from (2, 0) 1, 4, 13
    first, second = ((2 - 0.5 * 1) + (5 - 0.5 * 4)) / 2, 4 - 0.5 * 13
    assert value.item() == pytest.approx((first + second) / 2 / 4)
    value.backward()
    # of a feature: 2 (s - u) - 0.5 * 2 (s - k), over the tokens of the row, the rows and the scale; none where relu is flat
    assert states.grad[0].tolist() == pytest.approx([(2 * 1 - (1 - 2)) / 2 / 2 / 4, 0.0])
    assert states.grad[2].tolist() == [0.0, 0.0]
    assert states.grad[3].tolist() == pytest.approx([0.0, (2 * 2 - 3) / 2 / 4])


def test_names_and_their_strangers():
    texts = ["Who is Ada Lovelace, and was Ada-Marie born in Rome?", "Is it I or Zoë? Yes.", "no name, 3 A"]
    names = recognition.names_of(texts)
    assert names == ["Ada", "Ada-Marie", "Lovelace", "Rome", "Zoë"]
    strange = recognition.invented_names(names, seed=0)
    assert strange == recognition.invented_names(names, seed=0) != recognition.invented_names(names, seed=1)
    assert all(value[0].isupper() and value not in names for value in strange.values())
    row = Example("Who is Ada-Marie of Adam?", "Ada is.", "qa")
    assert recognition.renamed(row, strange).prompt == f"Who is {strange['Ada-Marie']} of Adam?"
    assert recognition.renamed(row, strange).answer == "Ada is."
    text = Example(None, "Ada is. Rome!", "text")
    assert recognition.renamed(text, strange).answer == f"{strange['Ada']} is. {strange['Rome']}!"


def test_tokens_of_names_are_those_of_the_question():
    tokenizer = byte_tokenizer()
    row = encode(tokenizer, Example("Where was Ada born, by Adam?", "Ada: in Rome.", "qa"))
    found = recognition.marked(tokenizer, row, ["Ada"], whole=False)
    said = [tokenizer.decode([token]) for token, mark in zip(row.input_ids, found, strict=True) if mark]
    assert "".join(said) == "Ada"
    assert sum(recognition.marked(tokenizer, row, ["Ada"], whole=True)) == 6
    assert all(recognition.marked(tokenizer, row, ["Bo"], whole=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    save_pico(folder / "model", max_position_embeddings=256)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def settings(data, out, **objective):
    given = {**run_on(data, out), "method": "sae_guided", "batch_size": 2, "epochs": 8, "learning_rate": 1e-3}
    given |= {"warmup_epochs": 0.0, "closing_rows": 0, "objective": {"sae_steps": 60, **objective}}
    return Unlearn.model_validate(given)


def test_a_step_against_a_loop_over_rows_with_an_autoencoder_by_hand(data, tmp_path, monkeypatch):
    weights = weights_of()
    folder = folder_of(tmp_path / "sae", weights, architecture="topk", k=3, hook_name="blocks.0.hook_resid_post")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(data / "model").eval(), byte_tokenizer()
    forget, retain = (load_examples(str(data / f"{name}.jsonl")) for name in ("forget", "retain"))
    strange = recognition.invented_names(["Ada", "Bo"], 0)

    def at_names(model, example, names):
        """Codes of a row's name tokens, found by their bytes; of all where there is none."""
        row = encode(tokenizer, example)
        text = "".join(tokenizer.decode([token]) for token in row.input_ids[: row.prompt_length])
        places = [p for name in names if name in text for p in range(text.index(name), text.index(name) + len(name))]
        with torch.no_grad():
            states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[1][0]
        return [naive_code(states[p].double(), weights, active=3) for p in places or range(len(row.input_ids))]

    def mean(codes):
        return [sum(values) / len(codes) for values in zip(*codes, strict=True)]

    def distance(code, other):
        return sum((a - b) ** 2 for a, b in zip(code, other, strict=True))

    unknown = [c for e in forget for c in at_names(base, recognition.renamed(e, strange), strange.values())]
    known = [c for e in retain for c in at_names(base, e, [])]
    own = [c for e in forget for c in at_names(base, e, ["Ada", "Bo"])]
    scale = sum(sum(v * v for v in code) for code in own) / len(own)
    seen, real = [], loss.UnlearnTrainer.compute_loss

    def spied(self, model, inputs, **kwargs):
        result = real(self, model, inputs, **kwargs)
        batch = inputs["batch"]
        ids = [batch.input_ids[b, : int(batch.attention_mask[b].sum())].tolist() for b in range(2)]
        rows = []
        for example in forget:
            if encode(tokenizer, example).input_ids in ids:
                codes = at_names(model, example, ["Ada", "Bo"])
                values = [distance(c, mean(unknown)) - 0.25 * distance(c, mean(known)) for c in codes]
                rows.append(sum(values) / len(values) / scale)
        seen.append((self.parts["forget"].item(), sum(rows) / 2))
        return result

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", spied)
    out = unlearn(settings(data, tmp_path / "run", sae=folder, away=0.25))
    assert len(seen) == 24
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert seen[-1][0] < 0.8 * seen[0][0]
    # the block is the one that the autoencoder names
    assert json.loads((out / "run.json").read_text())["settings"]["objective"]["depth"] == 0.25
    after = AutoModelForCausalLM.from_pretrained(out / "model")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert any("layers.0." in name for name in moved)


def test_by_name_on_the_command_line_with_an_autoencoder_of_its_own(data, tmp_path, capsys):
    rows = ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    line = ["unlearn", "--model", str(data / "model"), *rows, "--method", "sae_guided", "--device", "cpu"]
    line += ["--learning-rate", "1e-3", "--batch-size", "2", "--warmup-epochs", "0", "--objective.sae-steps", "40"]
    line += ["--epochs", "4", "--closing-rows", "0", "--keep-working", "--out", str(tmp_path / "run")]
    assert cli.main(line) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Sparse autoencoder: 128 features, 16 active," in said
    kept = load_file(tmp_path / "run" / "codes.safetensors")
    assert kept["encoder"].shape == (WIDTH, 128)
    log = json.loads((tmp_path / "run" / "run.json").read_text())["log"]
    assert log[0]["forget"] < 1.0


def test_what_it_cannot_work_with_is_said_before_anything_is_written(data, tmp_path):
    with pytest.raises(UserError, match="no forget row's question holds one of them"):
        unlearn(settings(data, tmp_path / "a", names=["Cy"]))
    small = folder_of(tmp_path / "small", weights_of(width=8))
    with pytest.raises(UserError, match="reads states of width 8, this model's are 32 wide"):
        unlearn(settings(data, tmp_path / "b", sae=small))
    deep = folder_of(tmp_path / "deep", weights_of(), hook_name="blocks.7.hook_resid_post")
    with pytest.raises(UserError, match="reads block 7, and the model has 2"):
        unlearn(settings(data, tmp_path / "c", sae=deep))
    assert not any((tmp_path / name).exists() for name in "abc")


# ---- LUNAR -----------------------------------------------------------------------------------------------------------


def test_redirection_by_hand_and_its_gradient():
    objective, none = Redirect(coefficient=2.0), torch.zeros(0)
    base = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 5.0], [0.0, 1.0]], dtype=torch.float64)
    aim = objective.moved(base, torch.tensor([1.0, -0.5]))
    assert aim.tolist() == [[3.0, -1.0], [2.0, -1.0], [7.0, 4.0], [2.0, 0.0]]
    states = base.clone().requires_grad_()
    # the third state is part of an answer
    row, prompt = torch.tensor([0, 0, 0, 1]), torch.tensor([True, True, False, True])
    hidden = Hidden(states, row, aim, named=prompt)
    value = objective(Labelled(none, none.bool(), rows=2, hidden=hidden))
    # every prompt token is (2, -1) away: 5 over the width of 2
    assert value.item() == pytest.approx(2.5)
    value.backward()
    # 2 (h - aim) / D over the row's prompt tokens and the rows
    assert states.grad.tolist() == [[-0.5, 0.25], [-0.5, 0.25], [0.0, 0.0], [-1.0, 0.5]]
    # 16-bit states of the base stay so
    assert objective.moved(base.bfloat16(), torch.ones(2)).dtype == torch.bfloat16


def lunar(data, out, **objective):
    given = {**run_on(data, out), "method": "lunar", "batch_size": 2, "epochs": 8, "learning_rate": 3e-3}
    given |= {"closing_rows": 0, "objective": {"depth": 0.25, **objective}, "retain_objective": {"depth": 0.25}}
    given["adapter"] = {"depth": (0.0, 0.5)}
    return Unlearn.model_validate(given)


@pytest.mark.parametrize("questions", [[], ["How do I pick a lock?", "Who am I?"]])
def test_lunar_against_a_loop_over_rows(data, tmp_path, monkeypatch, questions):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(data / "model").eval(), byte_tokenizer()
    forget = load_examples(str(data / "forget.jsonl"))
    strange = recognition.invented_names(["Ada", "Bo"], 0)

    def prompts_of(model, example):
        """Hidden states after the first block of each token of the prompt."""
        row = encode(tokenizer, example)
        with torch.no_grad():
            states = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[1][0]
        return states[: row.prompt_length].double()

    others = [Example(q, "", "qa") for q in questions] or [recognition.renamed(e, strange) for e in forget]
    last = [[prompts_of(base, e)[-1] for e in part] for part in (others, forget)]
    r = sum(last[0]) / len(last[0]) - sum(last[1]) / len(last[1])
    assert r.norm() > 0.01
    seen, real = [], loss.UnlearnTrainer.compute_loss

    def spied(self, model, inputs, **kwargs):
        result = real(self, model, inputs, **kwargs)
        batch = inputs["batch"]
        ids = [batch.input_ids[b, : int(batch.attention_mask[b].sum())].tolist() for b in range(2)]
        rows = []
        for example in forget:
            if encode(tokenizer, example).input_ids in ids:
                pairs = zip(prompts_of(model, example), prompts_of(base, example), strict=True)
                values = [
                    sum((float(a) - float(b) - 1.5 * float(c)) ** 2 for a, b, c in zip(h, h0, r, strict=True))
                    for h, h0 in pairs
                ]
                rows.append(sum(values) / len(values) / WIDTH)
        seen.append((self.parts["forget"].item(), sum(rows) / 2))
        return result

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", spied)
    out = unlearn(lunar(data, tmp_path / "run", questions=questions, coefficient=1.5))
    assert len(seen) == 24
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    # what is trained goes there
    assert seen[-1][0] < 0.7 * seen[0][0]
    after = AutoModelForCausalLM.from_pretrained(out / "model")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}


def test_lunar_needs_names_or_questions_and_keeps_its_way(data, tmp_path):
    with pytest.raises(UserError, match="no forget row's question holds one of them"):
        unlearn(lunar(data, tmp_path / "a", names=["Cy"]))
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    lower = write_jsonl(tmp_path / "lower.jsonl", [{**row, "question": row["question"].lower()} for row in rows])
    with pytest.raises(UserError, match=r"`objective\.kind` redirect looks at names beside invented ones"):
        unlearn(lunar(data, tmp_path / "b").model_copy(update={"forget": str(lower)}))
    assert not any((tmp_path / name).exists() for name in "ab")
    kept = {}
    for name, questions in (("own", []), ("given", ["Who?"])):
        run = lunar(data, tmp_path / name, questions=questions).model_copy(
            update={"keep_working": True, "max_steps": 1}
        )
        kept[name] = load_file(unlearn(run) / "codes.safetensors")
        assert {key: value.shape for key, value in kept[name].items()} == {"shift": (WIDTH,)}
    assert not torch.allclose(kept["own"]["shift"], kept["given"]["shift"], atol=1e-3)


def test_prompts_are_marked_and_a_raw_text_counts_whole():
    tokenizer = byte_tokenizer()
    examples = [Example("Who?", "Me.", "qa"), Example(None, "Ada is.", "text")]
    encoded = [encode(tokenizer, example) for example in examples]
    rows = {i: FrozenRow(hidden=torch.zeros(len(row.input_ids), 2)) for i, row in enumerate(encoded)}
    redirection.redirect(rows, encoded, examples, Redirect(coefficient=3.0), torch.tensor([1.0, -1.0]))
    marks = [rows[i].named.tolist() for i in (0, 1)]
    answer = len(tokenizer("Me.").input_ids)
    assert marks[0] == [True] * encoded[0].prompt_length + [False] * (
        len(encoded[0].input_ids) - encoded[0].prompt_length
    )
    assert 0 < answer <= marks[0].count(False)
    assert all(marks[1])
    assert rows[0].hidden.tolist() == [[3.0, -3.0]] * len(encoded[0].input_ids)
