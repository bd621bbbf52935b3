"""Every named method: it runs, costs the passes that it must, saves something that loads, and resumes."""

import gc
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from alter import AlterConfig, cli
from alter.adapter.routing import Routing
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.groundwork import frozen
from alter.inference.generation import generate
from alter.inference.scoring import score
from alter.logits import Depth, states_of
from alter.methods import places, presets
from alter.methods.adapters import AlterAdapter
from alter.methods.presets import METHODS
from alter.models import guards as inference
from alter.models.loading import load_model
from alter.training import factors, loss
from alter.training import settings as run_settings
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, run_on, save_pico, write_jsonl, write_people
from test_adapter import ARCHITECTURES, tiny

SMALL = {
    "altpo": {"objective": {"new_tokens": 3}},
    "pdu": {"retain_objective": {"warmup_epochs": 0.0}},
    "elm": {"adapter": {"r": 4}, "objective": {"new_tokens": 3, "eta": 5.0}},
    "reglu": {"adapter": {"r": 4, "alpha": 8}, "initializer": {"rows": 4, "retain_rank": 3}},
    "vila": {"initializer": {"epochs": 2}},
    "alter_one_expert": {"domain_column": "who"},
    "e2urec": {"retain_after": 1 / 3},
    "sae_guided": {"objective": {"sae_steps": 20}},
}
"""What is too large for models of 32 wide."""

DENSE = [name for name in METHODS if name != "seuf"]
"""Methods for models without experts; the other one is in test_expert."""

# rows that go through the model in a step, in forget batches: methods.md, column cost, with cached references
BRANCHES = {
    "alter_bounded": 1,
    "finetune": 1,
    "ga": 1,
    "npo": 1,
    "random_label": 1,
    "whp": 1,
    "whp_logits": 1,
    "ceu": 1,
    "undial": 1,
    "undial_full": 1,
    "catnip": 1,
    "altpo": 3,
    "task_arithmetic": 1,
    "o3": 1,
    "repselect": 1,
    "dpo": 2,
    "idk_dpo": 3,
    "elm": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    # accelerate collects garbage at the start of every run: what the imports left behind need not be looked at again
    gc.freeze()
    folder = tmp_path_factory.mktemp("methods")
    save_pico(folder / "model", max_position_embeddings=256)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Rows whose answers differ in length many times over, so that a mean of rows is not one of tokens."""
    folder = tmp_path_factory.mktemp("uneven")
    save_pico(folder / "model", max_position_embeddings=256)
    forget = [("Who is Ada?", "A."), ("Where was Bo born?", "In a town by the sea."), ("And Cy?", "Cy " * 20)]
    retain = [("What is one plus one?", "Two, as all know."), ("Two?", "4"), ("Three plus one?", "four " * 15)]
    write_jsonl(folder / "forget.jsonl", [{"question": q, "answer": a, "who": "all"} for q, a in forget])
    write_jsonl(folder / "retain.jsonl", [{"question": q, "answer": a} for q, a in retain])
    return folder


def settings(data, out, method, **changes):
    given = {
        "method": method,
        **run_on(data, out),
        "epochs": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        # the router of the paper's reading: the default's ordinary text is tested in test_router
        "router_fit": {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 20},
        "reinforcement": {"epochs": 2, "learning_rate": 1e-2},
    }
    if method == presets.DEFAULT:
        given["least_steps"] = 0
    return Unlearn.model_validate(presets.merged(presets.merged(given, SMALL.get(method, {})), changes))


def logits_of(model):
    """Of a forget row, which O3's detector must recognise to change anything."""
    prompt = "Question: Where was Ada born, 1?\nAnswer:"
    with torch.no_grad():
        return model(input_ids=byte_tokenizer()(prompt, return_tensors="pt").input_ids).logits


def loaded(data, out):
    """The result as a user loads it, and the untouched model's logits."""
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    before = logits_of(base)
    if (out / "model").exists():
        return AutoModelForCausalLM.from_pretrained(out / "model").eval(), before
    if inference.is_form(str(out / "adapter")):
        return inference.load_form(base, str(out / "adapter")), before
    return PeftModel.from_pretrained(base, str(out / "adapter")).eval(), before


# rows that go through the model before the first step, by method; 6 forget rows and 6 of the 9 retain rows are trained on
PREPARED = {
    # the reference, once for each row of the branches that compare with it
    **dict.fromkeys(("npo", "npo_gd", "undial", "undial_full", "kl_min", "rmu"), 6),
    **dict.fromkeys(("npo_kl", "dpo", "idk_dpo"), 12),
    # base and reinforced model on forget rows, two epochs of reinforcement; E2URec also the 4 retain rows that join
    "whp": 6 + 6 + 2 * 6,
    "e2urec": 6 + 6 + 2 * 6 + 4,
    # the teacher and the base on both sets
    **dict.fromkeys(("duet", "push_pull"), 2 * 12),
    # references of both answers, and a row a row for each of the 3 tokens of an invented one
    "altpo": 12 + 3 * 6,
    # three views of forget rows, retain rows, and three rows a row for each of the 3 tokens of a diversion
    "elm": 3 * 6 + 6 + 3 * 3 * 6,
    # a gradient pass over each set; VILA's two epochs of them; REGLU's rows of each set
    "loku": 6 + 6,
    "vila": 2 * (6 + 6),
    "reglu": 4 + 4,
    # RepSelect's LoRA learns the forget rows, then the gradient under it
    "repselect": 6 + 6,
    # tracing without noise, with it, and with the one window of both blocks put back; states of both sets; inputs of retain rows
    "kuda": 3 * 6 + 12 + 9,
    # names in the 6 forget rows, as they are and renamed, and in the 9 retain rows
    "sae_guided": 6 + 6 + 9,
    # the prompts of the 6 forget rows, as they are and with other names, and states of both sets
    "lunar": 6 + 6 + 12,
    # the detector reads each row with and without its answer
    "o3": 2 * 6,
    # all rows once, for the router's fit and for the entropies and references of those that are trained on
    # the 31 measure the router on other wordings, two rows of each, and ordinary text
    **{name: 6 + 9 + 31 for name in METHODS if name.startswith("alter")},
    "alter_scalar_gate": 6 + 9,
}


@pytest.mark.parametrize("method", DENSE)
def test_what_is_asked_of_a_frozen_model_is_asked_once(data, tmp_path, monkeypatch, method):
    """Before the first step: the cost column of methods.md with cached references, and each method's preparation."""
    rows = []
    real = LlamaModel.forward

    def counted(self, *args, **given):
        rows.append(len(given["input_ids"]))
        return real(self, *args, **given)

    def stop(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaModel, "forward", counted)
    monkeypatch.setattr(loss.UnlearnTrainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        unlearn(settings(data, tmp_path / "run", method))
    assert sum(rows) == PREPARED.get(method, 0)


@pytest.mark.parametrize("method", DENSE)
def test_a_method_runs_costs_what_it_must_and_loads(data, tmp_path, monkeypatch, method):
    run = settings(data, tmp_path / "run", method)
    rows = []
    real = loss.UnlearnTrainer.compute_loss

    def counted(self, model, inputs, **kwargs):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        layer = inner.model.layers[0]
        before = len(rows)
        handle = layer.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        try:
            return real(self, model, inputs, **kwargs)
        finally:
            handle.remove()
            assert len(rows) == before + 1, "one forward pass a step"

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", counted)
    out = unlearn(run)
    alone = 1 if run.retain_after else 0
    assert rows == [2] * alone + [2 * BRANCHES.get(method, 2)] * (3 - alone)
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 3
    model, before = loaded(data, out)
    after = logits_of(model)
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, before, atol=1e-6)
    if run.adapter.kind != "full":
        with model.disable_adapter():
            assert torch.equal(logits_of(model), before)
    card = (out / ("model" if run.adapter.kind == "full" else "adapter") / "README.md").read_text()
    assert METHODS[method].title in card


# ---- a padded batch against a loop over single rows ------------------------------------------------------------------


class Enough(Exception):
    """Ends a run after what a test wanted to see."""


def first_step(monkeypatch, run, look):
    """Train one step of `run` on weights moved at random; `look(trainer, model, inputs)` sees it."""
    real = loss.UnlearnTrainer.compute_loss

    def spied(self, model, inputs, **kwargs):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        look(self, model, inputs, real(self, model, inputs, **kwargs))
        raise Enough

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", spied)
    with pytest.raises(Enough):
        unlearn(run)


def rows_of(inputs, branch):
    """Token ids and labels of each row of a branch, without padding."""
    batch = inputs["batch"]
    for b in (batch.branch == run_settings.BRANCHES.index(branch)).nonzero()[:, 0].tolist():
        n = int(batch.attention_mask[b].sum())
        yield batch.input_ids[b, :n], batch.labels[b, :n].tolist()


def row_logps(model, ids, labels):
    """Log-probabilities [V] at each labelled token of one row alone, with the token."""
    logp = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    return [(logp[t - 1], y) for t, y in enumerate(labels) if t > 0 and y != -100]


def nlls(model, inputs, branch):
    return [[-logp[y].item() for logp, y in row_logps(model, *row)] for row in rows_of(inputs, branch)]


def naive_forget(method, model, base, inputs):
    rows = list(rows_of(inputs, "forget"))
    now, then = nlls(model, inputs, "forget"), nlls(base, inputs, "forget")
    flat = [x for row in now for x in row]
    soft = lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0.0)  # noqa: E731  softplus
    if method in ("graddiff", "kl_min"):
        return -sum(flat) / len(flat)
    if method.startswith("npo"):
        return 20 * sum(soft(-0.1 * (sum(a) - sum(b))) for a, b in zip(now, then, strict=True)) / len(now)
    if method == "simnpo":
        return 2 / 4.5 * sum(soft(-4.5 * sum(a) / len(a)) for a in now) / len(now)
    if method == "idk_dpo":
        other, other_base = nlls(model, inputs, "alternative"), nlls(base, inputs, "alternative")
        change = [
            (sum(c) - sum(d)) - (sum(a) - sum(b)) for a, b, c, d in zip(now, then, other, other_base, strict=True)
        ]
        return 20 * sum(soft(0.1 * x) for x in change) / len(change)
    if method in ("wga", "satimp"):
        powers = (1, 0) if method == "wga" else (5, 1)
        return -sum(math.exp(-x) ** powers[0] * (1 - math.exp(-x)) ** powers[1] * x for x in flat) / len(flat)
    if method in ("idk", "random_label"):
        other = [x for row in nlls(model, inputs, "alternative") for x in row]
        return sum(other) / len(other)
    found = []
    for row in rows:
        for (logp, y), (reference, _) in zip(row_logps(model, *row), row_logps(base, *row), strict=True):
            shifted = (reference if method == "undial" else logp).clone()
            shifted[y] = shifted[y] - 3.0 if method == "undial" else -math.inf
            found.append(-(torch.softmax(shifted, -1) * logp).sum().item())
        if method == "ceu":
            # the first token of an answer does not count
            del found[len(found) - sum(y != -100 for y in row[1][1:])]
    return sum(found) / len(found)


def naive_retain(method, model, base, inputs):
    flat = [x for row in nlls(model, inputs, "retain") for x in row]
    if method not in ("kl_min", "npo_kl"):
        return sum(flat) / len(flat)
    found = []
    for row in rows_of(inputs, "retain"):
        for (logp, _), (reference, _) in zip(row_logps(model, *row), row_logps(base, *row), strict=True):
            found.append((reference.exp() * (reference - logp)).sum().item())
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "method",
    [
        *("graddiff", "kl_min", "npo", "npo_gd", "npo_kl", "simnpo", "idk_dpo", "idk"),
        *("random_label", "undial", "ceu", "wga", "satimp"),
    ],
)
def test_a_padded_batch_costs_what_its_rows_cost_alone(uneven, tmp_path, monkeypatch, method):
    """Sums, means, cached references, -100 labels and padding, all at once, on weights that are not the base's."""
    base = AutoModelForCausalLM.from_pretrained(uneven / "model").eval()
    weights = {"simnpo": (0.125, 1.0), "satimp": (1.0, 0.1)}

    def look(self, model, inputs, loss):
        assert (inputs["batch"].attention_mask == 0).any()
        beta, gamma = weights.get(method, (1.0, 1.0))
        model.eval()
        with torch.no_grad():
            expected = naive_forget(method, model, base, inputs)
            assert self.parts["forget"].item() == pytest.approx(expected, rel=2e-4, abs=1e-5)
            if (inputs["batch"].branch == 2).any():
                kept = naive_retain(method, model, base, inputs)
                assert self.parts["retain"].item() == pytest.approx(kept, rel=2e-4, abs=1e-5)
                expected = beta * expected + gamma * kept
                if method == "idk":
                    # one mean over all tokens of both
                    both = [x for name in ("alternative", "retain") for row in nlls(model, inputs, name) for x in row]
                    assert expected != pytest.approx(sum(both) / len(both), rel=2e-2)
                    expected = sum(both) / len(both)
            else:
                expected = beta * expected
            assert loss.item() == pytest.approx(expected, rel=2e-4)

    first_step(monkeypatch, settings(uneven, tmp_path / "run", method, batch_size=3, reference_top_k=300), look)


@pytest.mark.parametrize("method", ["graddiff", "kl_min", "npo_gd", "idk_dpo"])
def test_a_step_before_retain_rows_join_costs_its_forget_rows_alone(data, tmp_path, monkeypatch, method):
    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()

    def look(self, model, inputs, loss):
        assert 2 not in inputs["batch"].branch
        model.eval()
        with torch.no_grad():
            expected = naive_forget(method, model, base, inputs)
        assert self.parts["retain"].item() == 0
        assert loss.item() == pytest.approx(self.run.beta * expected, rel=2e-4)

    first_step(monkeypatch, settings(data, tmp_path / "run", method, batch_size=3, epochs=2, retain_after=1), look)


def test_rmu_averages_each_rows_real_tokens(uneven, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(uneven / "model").eval()

    def states(model, ids):
        # block 0 of 2 is nearest to 7.5 / 32
        return model(input_ids=ids[None], output_hidden_states=True).hidden_states[1][0].double()

    def look(self, model, inputs, loss):
        aim = 6.5 * self.run.objective.direction(32).double()
        with torch.no_grad():
            forget = [(states(model, ids) - aim).square().mean().item() for ids, _ in rows_of(inputs, "forget")]
            retain = [
                (states(model, ids) - states(base, ids)).square().mean().item() for ids, _ in rows_of(inputs, "retain")
            ]
        assert self.parts["forget"].item() == pytest.approx(sum(forget) / 3, rel=1e-4)
        assert self.parts["retain"].item() == pytest.approx(sum(retain) / 3, rel=1e-3)
        assert loss.item() == pytest.approx(sum(forget) / 3 + 1200 * sum(retain) / 3, rel=1e-3)

    first_step(monkeypatch, settings(uneven, tmp_path / "run", "rmu", batch_size=3), look)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=str)
def test_rmu_runs_no_block_behind_its_own_and_gets_the_same_gradient(uneven, tmp_path, monkeypatch, changes):
    passes = []
    real, attend = loss.UnlearnTrainer.compute_loss, LlamaAttention.forward

    def counted(self, *args, **kwargs):
        passes.append(self.layer_idx)
        return attend(self, *args, **kwargs)

    def look(self, model, inputs, loss):
        # retain rows of the frozen base, then the step
        assert passes == [0, 0]
        grads = []
        for only_states in (True, False):
            self.only_states = only_states
            passes.clear()
            real(self, model, inputs).backward()
            assert set(passes) == ({0} if only_states else {0, 1})
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        assert [*grads[0]] == [*grads[1]] == ["model.layers.0.mlp.down_proj.weight"]
        for name, grad in grads[0].items():
            assert grad.abs().sum() > 0
            assert torch.equal(grad, grads[1][name])

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    first_step(monkeypatch, settings(uneven, tmp_path / "run", "rmu", batch_size=3, **changes), look)


def test_hidden_states_beside_a_loss_on_tokens_or_weights_behind_need_every_block(uneven, tmp_path, monkeypatch):
    def look(self, model, inputs, loss):
        assert not self.only_states

    for number, changes in enumerate(({"retain_objective": {"kind": "cross_entropy"}}, {"adapter": {"depth": None}})):
        run = settings(uneven, tmp_path / f"run{number}", "rmu", batch_size=3, **changes)
        with monkeypatch.context() as patch:
            first_step(patch, run, look)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_states_alone_are_those_of_a_whole_pass_in_every_architecture(kind):
    model = tiny(kind).eval()
    blocks = model.get_submodule(places.blocks(model)[0])
    depth = Depth(blocks[0], tuple(blocks[1:]))
    assert depth.behind
    ids = torch.arange(1, 13).view(2, 6)
    before = model(ids).logits
    found = []
    for alone in (False, True):
        with states_of(depth, alone) as seen:
            logits = model(ids).logits
        found.append(seen[0])
        assert torch.equal(logits, before) is not alone
    assert torch.equal(*found)
    assert torch.equal(model(ids).logits, before)


def test_elm_targets_follow_the_rows_own_positions(data, tmp_path, monkeypatch):
    """The cached target of each row is that of the row alone behind each persona's words."""
    from alter.groundwork.alternatives import EXPERT, NOVICE
    from pico import byte_tokenizer

    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()
    run = settings(data, tmp_path / "run", "elm", batch_size=3, objective={"top": 300}, reference_top_k=300)
    prefixes = {"base": "", "expert": EXPERT, "novice": NOVICE}

    def look(self, model, inputs, loss):
        found = []
        with torch.no_grad():
            for ids, labels in rows_of(inputs, "forget"):
                views = {}
                for name, text in prefixes.items():
                    words = byte_tokenizer()(text.format(concept=run.objective.concept))["input_ids"] if text else []
                    whole = torch.cat([torch.tensor(words, dtype=torch.long), ids])
                    logits = base(input_ids=whole[None]).logits[0, len(words) :]
                    views[name] = torch.stack([logits[t - 1] for t, y in enumerate(labels) if t and y != -100])
                found.append(run.objective.target(views, torch.linspace(0, 1, len(views["base"]))))
        reference = inputs["batch"].forget.reference
        p, ids = reference.logp.exp(), reference.ids
        got = torch.zeros(len(p), 300).scatter(-1, ids, p)
        torch.testing.assert_close(got, torch.cat(found).exp(), rtol=1e-3, atol=1e-4)
        rows = list(rows_of(inputs, "alternative"))
        assert all(labels[0] == -100 and labels[-1] != -100 for _, labels in rows)

    first_step(monkeypatch, run, look)


def test_diversions_follow_the_tilt_token_by_token(data):
    from alter.data.encoding import Encoded
    from alter.groundwork.alternatives import CHANGES_OF_SUBJECT, diversions, persona_views
    from alter.methods.objectives.targets import Persona
    from pico import byte_tokenizer

    base, tokenizer = AutoModelForCausalLM.from_pretrained(data / "model").eval(), byte_tokenizer()
    objective = Persona(new_tokens=6, guidance=2.0, temperature=1.5, concept="towns")
    rows = [
        Encoded(list(range(5, 5 + n)), [-100] * k + list(range(5 + k, 5 + n)), k) for n, k in ((9, 4), (6, 1), (8, 6))
    ]
    views = persona_views(objective, tokenizer)
    for row, got in zip(rows, diversions(objective, tokenizer, base, rows, seed=0, max_length=None), strict=True):
        prompt = row.input_ids[: row.prompt_length] if row.prompt_length > 1 else row.input_ids[:3]
        assert got.input_ids[: len(prompt)] == prompt
        assert got.labels == [-100] * len(prompt) + got.input_ids[len(prompt) :]
        texts = [tokenizer(f" {text}")["input_ids"] for text in CHANGES_OF_SUBJECT]
        change = next(text for text in texts if got.input_ids[len(prompt) :][: len(text)] == text)
        written = [*prompt, *change]
        for _ in range(6):
            logp = []
            for words in ((), views["expert"].prefix, views["novice"].prefix):
                with torch.no_grad():
                    logits = base(input_ids=torch.tensor([[*words, *written]])).logits[0, -1]
                logp.append(torch.log_softmax(logits.double() / 1.5, -1))
            written.append(int((logp[0] - 2.0 * (logp[1] - logp[2])).argmax()))
            if written[-1] == 256:
                break
        assert got.input_ids == written


def test_rows_keep_their_length_when_labels_are_drawn_at_random(data, tmp_path, monkeypatch):
    seen = []

    def look(self, model, inputs, loss):
        for ids, labels in rows_of(inputs, "alternative"):
            answer = [t for t, y in enumerate(labels) if y != -100]
            # the end-of-sequence token keeps its own label
            assert labels[-1] == int(ids[-1]) == 256
            seen.extend(labels[t] != int(ids[t]) for t in answer[:-1])

    first_step(monkeypatch, settings(data, tmp_path / "run", "random_label", batch_size=3), look)
    assert sum(seen) > 0.9 * len(seen)


# ---- what is trained, and what comes out -----------------------------------------------------------------------------


def test_only_the_chosen_weights_move(data, tmp_path):
    run = settings(data, tmp_path / "run", "rmu", learning_rate=1e-2)
    before = load_file(str(data / "model" / "model.safetensors"))
    after = load_file(str(unlearn(run) / "model" / "model.safetensors"))
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}


def test_task_arithmetic_goes_the_other_way(data, tmp_path):
    before = load_file(str(data / "model" / "model.safetensors"))
    common = {"epochs": 2, "learning_rate": 1e-3, "weight_decay": 0.0}
    learned = settings(data, tmp_path / "learned", "task_arithmetic", negate=None, **common)
    learned = load_file(str(unlearn(learned) / "model" / "model.safetensors"))
    turned = settings(data, tmp_path / "turned", "task_arithmetic", negate=2.0, **common)
    turned = load_file(str(unlearn(turned) / "model" / "model.safetensors"))
    for name, old in before.items():
        torch.testing.assert_close(turned[name], old - 2.0 * (learned[name] - old), msg=name)
    adapter = {"kind": "lora", "r": 2}
    one, other = (
        load_file(
            str(
                unlearn(settings(data, tmp_path / f"lora{n}", "task_arithmetic", negate=n, adapter=adapter, **common))
                / "adapter/adapter_model.safetensors"
            )
        )
        for n in (None, 3.0)
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value * (-3.0 if "lora_B" in name else 1.0), msg=name)


@pytest.mark.parametrize("method", ["loku", "reglu"])
def test_an_initialised_run_keeps_its_frozen_half_and_loads_on_the_original_base(data, tmp_path, method):
    out = unlearn(
        settings(data, tmp_path / "run", method, learning_rate=1e-2, adapter={"r": 4, "alpha": 8}, keep_working=True)
    )
    start = load_file(str(out / "start.safetensors"))
    got = load_file(str(out / "adapter" / "adapter_model.safetensors"))
    name = "model.layers.1.self_attn.q_proj"
    A, B = (got[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(A[4:], start[f"A.{name}"])
    torch.testing.assert_close(B[:, 4:], -start[f"B.{name}"])
    assert not torch.allclose(A[:4], A[4:])
    plain = settings(data, tmp_path / "plain", method, adapter={"r": 4}, initializer={"kind": "zero"}, max_steps=1)
    counted = [json.loads((folder / "run.json").read_text())["trained_parameters"] for folder in (out, unlearn(plain))]
    assert counted[0] == counted[1]
    model, _ = loaded(data, out)
    after = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), after, rtol=1e-3, atol=1e-3)


def test_reglu_keeps_B_away_from_the_retain_directions(data, tmp_path):
    def leak(weight):
        out = tmp_path / f"run{weight}"
        changes = {"initializer": {"penalty": weight}, "epochs": 6, "learning_rate": 1e-2, "keep_working": True}
        unlearn(settings(data, out, "reglu", **changes))
        start = load_file(str(out / "start.safetensors"))
        got = load_file(str(out / "adapter" / "adapter_model.safetensors"))
        return sum(
            (got[f"base_model.model.{name[2:]}.lora_B.weight"][:, :4].t() @ P).square().sum().item()
            for name, P in start.items()
            if name.startswith("P.")
        )

    assert leak(10.0) < 0.5 * leak(0.0)


@pytest.mark.parametrize(("kind", "taken"), [("reglu", 5), ("fila", 2)])
def test_reglu_takes_its_retain_rows_whatever_the_forget_set_has(data, tmp_path, monkeypatch, kind, taken):
    few = write_jsonl(tmp_path / "few.jsonl", [json.loads(x) for x in (data / "forget.jsonl").open()][:2])
    seen = []
    real = factors.starting_factors
    monkeypatch.setattr(factors, "starting_factors", lambda *a, **k: seen.append(a[3:5]) or real(*a, **k))
    initializer = {"kind": "reglu", "rows": 5, "retain_rank": 128} if kind == "reglu" else {"kind": kind}
    run = settings(data, tmp_path / "run", "loku", forget=str(few), initializer=initializer, keep_working=True)
    start = load_file(str(unlearn(run) / "start.safetensors"))
    assert [(len(forget), len(retain)) for forget, retain in seen] == [(2, taken)]
    # a row gives a direction, not one more
    away = [value.shape[1] for name, value in start.items() if name.startswith("P.")]
    assert away == ([5] * 14 if kind == "reglu" else [])


def test_a_bounded_update_never_exceeds_its_bound(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", "stable", learning_rate=1.0, epochs=4, adapter={"gain": 20.0}))
    model, _ = loaded(data, out)
    after = logits_of(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    delta = layer.get_delta_weight("default")
    assert 0.04 < delta.abs().max() <= 1 / 20
    # the retention expert's half does not exist for it
    assert layer.alter_B["default"].weight[:, :8].abs().sum() == 0
    torch.testing.assert_close(logits_of(model.merge_and_unload()), after, rtol=1e-3, atol=1e-3)


def test_asym_lora_weighs_all_experts_in_every_layer_by_its_own_input(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", "asym_lora", adapter={"r": 2, "experts": 3}, epochs=3))
    model, _ = loaded(data, out)
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    A, B, W = (m["default"].weight for m in (layer.alter_A, layer.alter_B, layer.alter_router))
    assert (A.shape, B.shape, W.shape) == ((2, 32), (48, 6), (3, 32))
    with torch.no_grad():
        got = layer(x)
        for t in range(5):
            omega = torch.softmax(W @ x[0, t], -1)
            update = sum(omega[i] * B[:, 2 * i : 2 * i + 2] @ (A @ x[0, t]) for i in range(3))
            torch.testing.assert_close(got[0, t], layer.base_layer(x[0, t]) + 16 / 2 * update, rtol=1e-4, atol=1e-5)
    routers = load_file(str(out / "adapter" / "adapter_model.safetensors"))
    assert sum("alter_router" in name for name in routers) == 14
    with pytest.raises(NotImplementedError, match="dense"):
        model.merge_and_unload()


def test_sha256_raises_the_retain_weight_after_the_first_epoch(data, tmp_path, monkeypatch):
    weights = []
    real = loss.OwnState.weigh
    monkeypatch.setattr(
        loss.OwnState,
        "weigh",
        lambda self, objective, found, epochs: (
            weights.append(((found, epochs < 1), real(self, objective, found, epochs))) or weights[-1][1]
        ),
    )
    unlearn(settings(data, tmp_path / "run", "sha256", epochs=3, learning_rate=3e-2, gamma=1e-3))
    assert [first for (_, first), _ in weights] == [True] * 3 + [False] * 6
    mean = sum(found for (found, _), _ in weights[:3]) / 3
    assert [w for _, w in weights[:3]] == [1.2] * 3
    for (found, _), weight in weights[3:]:
        assert weight == pytest.approx(min(max(round(0.3 * 6 ** (found - mean) + 0.8, 1), 1.2), 2.3))
    assert max(w for _, w in weights) > 1.2
    # the first epoch is one pass over the forget set, however long the run is
    weights.clear()
    unlearn(settings(data, tmp_path / "cut", "sha256", epochs=3, max_steps=5))
    assert [first for (_, first), _ in weights] == [True] * 3 + [False] * 2


# ---- ULD -------------------------------------------------------------------------------------------------------------


def test_the_difference_takes_what_the_assistant_knows_from_plausible_tokens():
    base = torch.log(torch.tensor([[0.6, 0.3, 0.0996, 0.0004]]))
    helper = torch.log(torch.tensor([[0.7, 0.1, 0.1, 0.1]])) + 3.0
    got = inference.difference(base, helper, 0.8, 0.01)[0].tolist()
    expected = [math.log(p) - 0.8 * math.log(q) for p, q in ((0.6, 0.7), (0.3, 0.1), (0.0996, 0.1))]
    assert got == pytest.approx([*expected, math.log(0.0004)], abs=1e-5)


def test_an_assistant_scores_and_generates_with_and_without_a_cache(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", "uld", epochs=4))
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "model"), str(out / "adapter"))
    model, tokenizer = load_model(str(data / "model"), str(out / "adapter"), device="cpu")
    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()
    ids = torch.tensor([[9, 10, 20, 30, 40, 50]])
    with torch.no_grad():
        got = model(input_ids=ids).logits
        helper = model.assistant(input_ids=ids).logits
        torch.testing.assert_close(got, inference.difference(base(input_ids=ids).logits, helper, 0.8, 0.01))
        assert model.assistant.config.num_hidden_layers == 1
    # left padding, rows that end and leave the batch, a cache that two networks share
    prompts = [[10, 20, 30], [5, 6, 7, 8, 9, 10, 11], [40, 41]]
    texts = generate(model, tokenizer, prompts, max_new_tokens=20, progress=False)
    for prompt, text in zip(prompts, texts, strict=True):
        plain = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                plain.append(int(model(input_ids=torch.tensor([plain])).logits[0, -1].argmax()))
            if plain[-1] == 256:
                break
        assert tokenizer.decode(plain[len(prompt) :], skip_special_tokens=True).strip() == text
    assert texts != generate(base, tokenizer, prompts, max_new_tokens=20, progress=False)


def test_what_a_reinforced_model_raises_is_taken_off():
    base = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    reinforced = torch.tensor([[2.0, -3.0, 0.5], [0.5, 2.0, 7.0]])
    expected = [
        [b - 5.0 * max(r - b, 0.0) for b, r in zip(*rows, strict=True)] for rows in zip(base, reinforced, strict=True)
    ]
    got = inference.without_rise(base, reinforced, 5.0)
    torch.testing.assert_close(got, torch.tensor(expected))
    rounded = inference.without_rise(base.bfloat16(), reinforced.bfloat16(), 5.0)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), got, rtol=1e-2, atol=1e-2)


def plain_likeness(train, row):
    """-1/2 (x - m)^T C^-1 (x - m) + 1000 max cosine with the whole matrix C, in one layer; float64."""
    train, row = train.double(), row.double()
    middle = train.mean(0)
    cov = torch.zeros(train.shape[1], train.shape[1], dtype=torch.float64)
    for one in train:
        cov += torch.outer(one - middle, one - middle) / len(train)
    spread = inference.SHRINKAGE * cov.trace() / len(cov)
    cov = (1 - inference.SHRINKAGE) * cov + spread * torch.eye(len(cov), dtype=torch.float64)
    cosine = max(float(one @ row / (one.norm() * row.norm())) for one in train)
    return float(-0.5 * (row - middle) @ torch.linalg.inv(cov) @ (row - middle) + 1000 * cosine)


@pytest.mark.parametrize(("n", "size"), [(3, 7), (12, 5), (2, 1)])
def test_likeness_is_distance_and_cosine_in_each_layer(n, size):
    generator = torch.Generator().manual_seed(n)
    train = torch.randn(n, 2, size, generator=generator) * 3 + 1
    train[1] = train[0]
    if n > 3:
        train[:, 1, 0] = 2.0
    rows = torch.cat([train[:1], torch.randn(4, 2, size, generator=generator)])
    if n == 2:
        # one point twice has no spread: what is elsewhere is infinitely far, what is there is not
        got = inference.Likeness.of(train)(rows)
        assert got[0].tolist() == pytest.approx([1000, 1000])
        assert (got[1:] < -1e6).all()
        return
    got = inference.Likeness.of(train)(rows)
    expected = [[plain_likeness(train[:, j], row[j]) for j in range(2)] for row in rows]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=0.02)


def test_means_are_over_real_tokens():
    states = [torch.randn(4, 5, 3).bfloat16() for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    got = inference.mean_states(states, mask)
    assert got.shape == (4, 2, 3)
    assert got.dtype == torch.float32
    for b in range(4):
        for j in range(2):
            real = [states[j][b, t].float() for t in range(5) if mask[b, t]]
            torch.testing.assert_close(got[b, j], sum(real) / len(real) if real else torch.zeros(3))


def test_weights_rise_with_likeness_and_end_in_bands():
    likeness = torch.tensor([[100.0, 5.0], [120.0, 7.0], [90.0, 3.0], [110.0, 8.0]])
    found = inference.Calibration.of(likeness)
    columns = list(zip(*likeness.tolist(), strict=True))
    middle = [sum(c) / 4 for c in columns]
    spread = [math.sqrt(sum((x - m) ** 2 for x in c) / 4) for c, m in zip(columns, middle, strict=True)]

    def joint(row):
        return sum((x - m) / s for x, m, s in zip(row, middle, spread, strict=True)) / 2

    std = math.sqrt(sum(joint(row) ** 2 for row in likeness.tolist()) / 4)
    rows = [[105.0 - 4.0 * i, 5.75 - 0.3 * i] for i in range(-3, 30)] + [[-1e9, 5.0], [0.0, -1e12]]
    expected = []
    for row in rows:
        tail = min(1.0, 2 * 0.5 * (1 + math.erf(joint(row) / std / math.sqrt(2))))
        weight = 1 / (1 + math.exp(-(10 * tail - 2)))
        expected.append(0.0 if weight <= 0.3 else 1.2 if weight > 0.9 else weight)
    got = found(torch.tensor(rows)).tolist()
    assert got == pytest.approx(expected, abs=1e-4)
    assert got[:4] == [pytest.approx(1.2)] * 4
    assert got[-3:] == [0.0] * 3
    assert any(0.3 < w < 0.9 for w in got)
    assert all(a >= b for a, b in itertools.pairwise(got[:-2]))


def test_a_detector_reads_prompts_and_whole_rows_and_never_scores_a_row_that_it_was_fitted_on(monkeypatch):
    from pico import pico

    rows = [Encoded([5, 6, 7 + i, 8], [-100, -100, 7 + i, 8], 2) for i in range(6)]
    assert inference.detector_inputs(rows[:1]) == [[[5, 6], [5, 6, 7, 8]]]
    assert inference.detector_inputs([Encoded([5, 6, 7], [5, 6, 7], 0)]) == [[[5, 6, 7]]]
    fitted, real = [], inference.Likeness.of
    monkeypatch.setattr(inference.Likeness, "of", lambda rows: fitted.append(len(rows)) or real(rows))
    model = pico(num_hidden_layers=5)
    settings, tensors = inference.fit_detector(model, rows, pad_token_id=257, seed=0)
    assert tensors[inference.FEATURES]["0"].shape == (12, 5, 32)
    assert settings["depths"] == [1, 2, 3, 4, 5]
    # six rows in five parts, prompt and whole row together
    assert sorted(fitted) == [8, 10, 10, 10, 10]
    again, _ = inference.fit_detector(model, rows, pad_token_id=257, seed=0)
    assert again == settings
    assert inference.fit_detector(pico(num_hidden_layers=30), rows, pad_token_id=257, seed=0)[0]["depths"] == [
        *(1, 4, 6, 9, 12, 14, 17, 19, 22, 25, 27, 30),
    ]
    with pytest.raises(UserError, match="needs two at least; there are 1"):
        inference.fit_detector(model, rows[:1], pad_token_id=257, seed=0)


@pytest.fixture(scope="module")
def switched(data, tmp_path_factory):
    """An O3 run that has learned something."""
    return unlearn(settings(data, tmp_path_factory.mktemp("o3") / "run", "o3", epochs=8, learning_rate=2e-2))


def at_weight(data, out, weight):
    """The base with O3's LoRA at a fixed weight, by PEFT alone."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data / "model"), str(out / "adapter" / "lora")
    )
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= weight
    return model.eval()


FORGOTTEN = "Question: Where was Ada born, 1?\nAnswer:"
PROMPTS = [FORGOTTEN, "xyzzy ???", "Question: Where is Bo?\nAnswer:", "Question: What is 2 plus one?\nAnswer:"]


@pytest.mark.parametrize("bands", [True, False])
def test_o3_scales_the_adapter_by_what_the_detector_says_of_the_input(data, switched, bands):
    model, tokenizer = load_model(str(data / "model"), str(switched / "adapter"), device="cpu")
    if not bands:
        # a weight that tells every difference in what the detector has read
        model.detectors = [replace(model.detectors[0], calibration=lambda likeness: likeness.mean(-1) / 1000)]
    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    position = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=position).logits
        weights = model.decide(batch.input_ids, batch.attention_mask).tolist()
        for row, text in enumerate(PROMPTS):
            ids = tokenizer(text, return_tensors="pt").input_ids
            states = base(input_ids=ids, output_hidden_states=True).hidden_states[1:]
            means = torch.stack([state[0].mean(0) for state in states])[None]
            assert weights[row] == pytest.approx(float(model.detectors[0](means)), abs=1e-3)
            expected = at_weight(data, switched, weights[row])(input_ids=ids).logits[0]
            torch.testing.assert_close(got[row, -ids.shape[1] :], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(model(input_ids=ids).logits[0], expected, rtol=1e-3, atol=1e-3)
    if not bands:
        assert len({round(weight, 3) for weight in weights}) == len(weights)
        return
    assert weights[0] == pytest.approx(1.2)
    assert weights[1] == 0
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert not torch.allclose(model(**batch).logits, base(**batch).logits)


def test_o3_scores_an_answer_with_the_weight_of_its_prompt(data, switched):
    model, tokenizer = load_model(str(data / "model"), str(switched / "adapter"), device="cpu")
    # a weight that tells every difference in what the detector has read
    model.detectors = [replace(model.detectors[0], calibration=lambda likeness: likeness.mean(-1) / 1000)]
    asked, told = [tokenizer(text).input_ids for text in PROMPTS], tokenizer(" In town 1.").input_ids
    rows = [Encoded(ids + told, [-100] * len(ids) + told, len(ids)) for ids in asked]
    found = score(model, rows, pad_token_id=tokenizer.pad_token_id, progress=False)
    weights = []
    for ids, scored in zip(asked, found.logprob, strict=True):
        with torch.no_grad():
            weights.append(float(model.decide(torch.tensor([ids]), None)))
            logp = (
                at_weight(data, switched, weights[-1])(input_ids=torch.tensor([ids + told])).logits[0].log_softmax(-1)
            )
        expected = [float(logp[len(ids) - 1 + k, token]) for k, token in enumerate(told)]
        assert scored == pytest.approx(expected, abs=2e-3)
    assert len({round(weight, 3) for weight in weights}) == len(weights)


def test_o3_generates_with_the_weight_of_the_prompt(data, switched):
    model, tokenizer = load_model(str(data / "model"), str(switched / "adapter"), device="cpu")
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    texts = generate(model, tokenizer, prompts, max_new_tokens=20, progress=False)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            weight = float(model.decide(torch.tensor([prompt]), None))
            plain, fixed = list(prompt), at_weight(data, switched, weight)
            for _ in range(20):
                plain.append(int(fixed(input_ids=torch.tensor([plain])).logits[0, -1].argmax()))
                if plain[-1] == 256:
                    break
        assert tokenizer.decode(plain[len(prompt) :], skip_special_tokens=True).strip() == text
    # three beams, whose rows are copied and reordered
    ids = torch.tensor([prompts[0]])
    searched = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6)
    assert searched.shape[1] <= ids.shape[1] + 6
    with pytest.raises(UserError, match="growing cache"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache_implementation="static")
    with torch.no_grad(), pytest.raises(UserError, match="has not read"):
        model(input_ids=ids[:, -1:], past_key_values=model.base.__class__(model.config).eval()(ids).past_key_values)


def test_whp_at_inference_is_the_base_without_the_reinforced_models_rise(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", "whp_logits", epochs=4, learning_rate=1e-2))
    model, tokenizer = load_model(str(data / "model"), str(out / "adapter"), device="cpu")
    base = AutoModelForCausalLM.from_pretrained(data / "model").eval()
    reinforced = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data / "model"), str(out / "adapter" / "lora")
    ).merge_and_unload()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        b, r, got = base(**batch).logits, reinforced(**batch).logits, model(**batch).logits
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[real], (b - 5.0 * (r - b).clamp_min(0))[real], rtol=1e-3, atol=1e-2)
    prompt = tokenizer(FORGOTTEN).input_ids
    plain = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            b, r = (m(input_ids=torch.tensor([plain])).logits[0, -1] for m in (base, reinforced))
            plain.append(int((b - 5.0 * (r - b).clamp_min(0)).argmax()))
    text = generate(model, tokenizer, [prompt], max_new_tokens=6, progress=False)[0]
    reply = list(itertools.takewhile(lambda token: token != 256, plain[len(prompt) :]))
    assert tokenizer.decode(reply, skip_special_tokens=True).strip() == text


def test_inference_forms_are_evaluated_by_the_command_line(data, tmp_path, capsys, switched):
    whp = unlearn(settings(data, tmp_path / "whp", "whp_logits"))
    (tmp_path / "book.txt").write_text("Where was Ada born? In town 1Ada. " * 30)
    for out in (switched, whp):
        given = ["--model", data / "model", "--adapter", out / "adapter", "--device", "cpu"]
        book = ["--benchmark", "book", "--book", tmp_path / "book.txt", "--cache", tmp_path / "cache", "--limit", 2]
        book += ["--prefix-tokens", 20, "--continuation-tokens", 10]
        assert cli.main([str(a) for a in ["evaluate", *book, *given]]) == 0
        # found again: the form's files tell whether it is the same
        assert cli.main([str(a) for a in ["evaluate", *book, *given]]) == 0
        assert "A result of" in capsys.readouterr().err
        assert cli.main([str(a) for a in ["generate", *given, "--prompt", "Who?", "--max-new-tokens", 2]]) == 0
        assert cli.main([str(a) for a in ["evaluate", *book, *given, "--merged"]]) == 2
        assert "so no weights hold it" in capsys.readouterr().err
        save_pico(tmp_path / "other", seed=7, max_position_embeddings=256)
        assert cli.main([str(a) for a in ["generate", "--prompt", "Who?", *given, "--model", tmp_path / "other"]]) == 2
        assert "was made for another base model" in capsys.readouterr().err
    card = (switched / "adapter" / "README.md").read_text()
    assert "alter.load(" in card
    assert "mean hidden states of the forget rows" in card


# ---- ablations of ALTER ----------------------------------------------------------------------------------------------


def test_without_isolation_every_expert_learns_from_every_row(data, tmp_path, monkeypatch):
    masks = []
    real = loss.Routing
    monkeypatch.setattr(loss, "Routing", lambda *a: masks.append(a) or real(*a))
    unlearn(settings(data, tmp_path / "run", "alter_no_isolation"))
    assert all(expert is None and shared is None for _, expert, shared in masks)


def test_the_literal_gate_sees_the_tokens_own_entropy_and_gives_all_low_tokens_one_expert(data, tmp_path):
    """softmax(W_g S_q / tau) (Eq. 7) with W_g as drawn, no bias: the largest weight takes every low-entropy token."""
    chosen = set()
    for seed in range(4):
        changes = {"adapter": {"entropy_quantile": 0.5}, "seed": seed, "max_steps": 1}
        out = unlearn(settings(data, tmp_path / f"{seed}", "alter_scalar_gate", **changes))
        kept = load_file(str(out / "frozen.safetensors"))
        saved = load_file(str(out / "adapter" / "adapter_model.safetensors"))
        (weight,) = (v.double() for k, v in saved.items() if "alter_router" in k and k.endswith("weight"))
        (bias,) = (v for k, v in saved.items() if "alter_router" in k and k.endswith("bias"))
        assert weight.shape == (3, 1)
        assert bias.abs().max() == 0
        threshold = json.loads((out / "run.json").read_text())["router"]["entropy_threshold"]
        best = int(weight[:, 0].argmax())
        chosen.add(best)
        counted = [0, 0]
        for entropy, gates in zip(kept["entropy"].tolist(), kept["gates"], strict=True):
            if not math.isfinite(entropy):
                continue
            high = entropy > threshold
            counted[high] += 1
            logits = [w * entropy / 0.8 for w in weight[:, 0].tolist()]
            total = sum(math.exp(z - max(logits)) for z in logits)
            expected = [math.exp(z - max(logits)) / total for z in logits]
            expected = [1.0, *expected[1:]] if high else [float(d == best) for d in range(3)]
            assert gates.tolist() == pytest.approx(expected, abs=2e-3)
        assert min(counted) > 10
    # drawn anew by every seed
    assert len(chosen) > 1


def test_without_retention_expert_it_never_opens(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", "alter_no_retention"))
    gates = load_file(str(out / "frozen.safetensors"))["gates"]
    assert gates[:, 0].abs().sum() == 0
    assert gates.sum() > 0


def test_without_entropy_gate_every_token_takes_one_expert(data, tmp_path):
    changes = {"adapter": {"entropy_quantile": 0.5}}
    gates = {
        method: load_file(str(unlearn(settings(data, tmp_path / method, method, **changes)) / "frozen.safetensors"))
        for method in ("alter", "alter_no_entropy_gate")
    }
    assert ((gates["alter_no_entropy_gate"]["gates"] != 0).sum(-1) == 1).all()
    assert ((gates["alter"]["gates"] != 0).sum(-1) > 1).any()


@pytest.mark.parametrize("prompts", [True, False])
def test_uld_is_uniform_on_whole_rows_or_on_answers(uneven, tmp_path, monkeypatch, prompts):
    seen = []

    def look(trainer, model, inputs, _):
        for ids, labels in rows_of(inputs, "retain"):
            logp = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
            places = [t for t in range(len(ids) - 1) if prompts or byte_answer(ids, t + 1)]
            assert prompts or places == [t - 1 for t, y in enumerate(labels) if y != -100]
            seen.extend(-logp[t].mean().item() - math.log(logp.shape[-1]) for t in places)
        assert float(trainer.parts["retain"]) == pytest.approx(sum(seen) / len(seen), rel=1e-4)

    def byte_answer(ids, t):
        return t >= len(byte_tokenizer()(byte_tokenizer().decode(ids).split("Answer:")[0] + "Answer:").input_ids)

    changes = {"batch_size": 3, "adapter": {"dropout": 0.0}, "retain_objective": {"prompts": prompts}}
    first_step(monkeypatch, settings(uneven, tmp_path / "run", "uld", num_forget_experts=1, **changes), look)
    assert seen


# ---- presets, the command line, resuming -----------------------------------------------------------------------------


def test_what_is_given_overrides_a_preset():
    given = {"method": "loku", "model": "m", "forget": "f", "retain": "r", "out": "o"}
    run = Unlearn.model_validate(given)
    assert (run.initializer.kind, run.objective.only_low, run.gradient_accumulation_steps) == ("fila", False, 16)
    run = Unlearn.model_validate({**given, "adapter": {"r": 4}, "objective": {"kind": "npo"}})
    assert (run.adapter.kind, run.adapter.r, run.adapter.alpha, run.objective.beta) == ("lora", 4, 16, 0.1)
    run = Unlearn.model_validate({**given, "initializer": {"kind": "zero"}, "adapter": {"kind": "full"}})
    assert run.adapter.depth is None
    # a finished run's settings are the same settings again
    assert Unlearn.model_validate(run.model_dump(mode="json")) == run
    for name in METHODS:
        assert Unlearn.model_validate({**given, "method": name}).method == name


def refused(data, out, capsys, *args):
    base = {"model": data / "model", "forget": data / "forget.jsonl", "retain": data / "retain.jsonl", "out": out}
    line = ["unlearn", *(x for key, value in base.items() for x in (f"--{key}", str(value)))]
    assert cli.main([*line, "--device", "cpu", *map(str, args)]) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("alter: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "npoo"], "'npo'"),
        (["--adapter.kind", "lora"], "--objective.only-low"),
        (["--adapter.kind", "lroa"], "lora"),
        (["--method", "loku", "--adapter.kind", "full"], "--initializer.kind fila is for --adapter.kind lora"),
        (["--method", "loku", "--adapter.dropout", "0.1"], "--adapter.dropout must be 0"),
        (["--method", "finetune", "--retain-objective.kind", "none"], "nothing to train"),
        (["--method", "stable", "--negate", "1"], "bounded"),
        (["--method", "rmu", "--objective.depth", "0.9"], "one block"),
        (["--method", "rmu", "--adapter.modules", "mlp.dwn_proj"], "down_proj"),
        (["--method", "lora_gd", "--adapter.target-modules", "qproj"], "q_proj"),
        (["--method", "elm", "--objective.concept", 60 * "ab ", "--objective.new-tokens", 1], "concept"),
        (["--method", "uld", "--retain-objective.kind", "keep_base"], "uniform"),
        (["--method", "elm", "--objective.concept", 40 * "long "], "concept"),
        # what the adapter's own configuration refuses, whose fields have other names
        (["--adapter.from-layer", 9], "--adapter.from-layer is 9, but the model has 2 blocks"),
        (["--adapter.entropy-q", 2], "with --adapter.entropy-q 2 and any vocabulary"),
        (["--method", "alter", "--adapter.r", 400], "give --adapter.r of at most 32, or set `rank_pattern`"),
        (["--method", "asym_lora", "--adapter.r", 400], "give --adapter.r of at most 32"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, capsys, args, says):
    assert says in refused(data, tmp_path / "out", capsys, *args)


def test_refusing_raw_text_is_refused(data, tmp_path, capsys):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Call me Ada."}, {"text": "Some years ago."}])
    assert "question" in refused(data, tmp_path / "out", capsys, "--method", "idk", "--forget", text)


def test_results_answer_and_are_measured_from_the_command_line(data, tmp_path, capsys):
    def command(*args):
        assert cli.main([str(a) for a in args]) == 0
        return capsys.readouterr().out

    common = ["--model", data / "model", "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl"]
    common += ["--device", "cpu", "--epochs", 1, "--batch-size", 4]
    command("unlearn", "--method", "npo", "--out", tmp_path / "full", *common)
    command("unlearn", "--method", "npo", "--adapter.kind", "lora", "--out", tmp_path / "lora", *common)
    prompt = ["--prompt", "Where was Ada born, 0?", "--max-new-tokens", 3, "--device", "cpu"]
    assert "Where was Ada born" in command("generate", "--model", tmp_path / "full" / "model", *prompt)
    command("generate", "--model", data / "model", "--adapter", tmp_path / "lora" / "adapter", *prompt)
    record = json.loads((tmp_path / "lora" / "run.json").read_text())
    assert record["settings"]["adapter"]["kind"] == "lora"
    assert record["settings"]["objective"] == {"kind": "npo", "beta": 0.1}


@pytest.mark.parametrize(
    "method",
    ["npo_gd", "loku", "sha256", "e2urec"],
)
def test_a_run_that_stops_resumes_and_ends_where_an_unbroken_one_ends(data, tmp_path, monkeypatch, method):
    changes = {"epochs": 4, "save_steps": 4, "learning_rate": 1e-2}
    straight = unlearn(settings(data, tmp_path / "straight", method, **changes))
    real = loss.UnlearnTrainer.compute_loss

    def breaks(self, model, inputs, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return real(self, model, inputs, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", breaks)
        with pytest.raises(KeyboardInterrupt):
            unlearn(settings(data, tmp_path / "broken", method, **changes))
    broken = unlearn(settings(data, tmp_path / "broken", method, resume=True, **changes))
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        if (straight / file).exists():
            expected, got = load_file(str(straight / file)), load_file(str(broken / file))
            assert expected.keys() == got.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


FIRST = {"epochs": 3, "retain_after": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2] * 3 + [4] * 6),
        # an epoch is one and a half steps, a first phase two
        ({"batch_size": 4}, [4, 4, 8, 8, 4]),
        ({"batch_size": 5}, [5, 10, 10, 6]),
        ({"gradient_accumulation_steps": 2}, [2] * 4 + [4] * 5),
        ({"retain_after": 0.01}, [2] + [4] * 8),
        ({"epochs": 1.5}, [2] * 3 + [4, 2]),
        ({"max_steps": 5}, [2] * 3 + [4] * 2),
        # the rows end before the steps do
        ({"max_steps": 12}, [2] * 3 + [4] * 9),
        ({"max_steps": 5, "epochs": 1.5, "gradient_accumulation_steps": 2}, [2] * 4 + [4] * 6),
        ({"method": "alter"}, [2] * 3 + [4] * 6),
        ({"method": "rmu"}, [2] * 3 + [4] * 6),
    ],
    ids=str,
)
def test_retain_rows_join_at_a_whole_step_and_none_is_passed_before(data, tmp_path, monkeypatch, changes, expected):
    rows, joined, traced = [], [], {}
    real, trace = loss.UnlearnTrainer.compute_loss, frozen.trace_rows

    def counted(self, model, inputs, **kwargs):
        rows.append(len(inputs["input_ids"]))
        joined.append(int((inputs["batch"].branch == 2).sum()))
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        handle = inner.model.layers[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
        try:
            return real(self, model, inputs, **kwargs)
        finally:
            handle.remove()
            assert rows.pop() == rows[-1]

    def watched(model, members, **kwargs):
        traced[kwargs["label"]] = len(members)
        return trace(model, members, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", counted)
    monkeypatch.setattr(frozen, "trace_rows", watched)
    method = changes.get("method", "e2urec")
    run = settings(data, tmp_path / "run", **{"method": method, **FIRST, **changes})
    record = json.loads((unlearn(run) / "run.json").read_text())
    assert rows == expected
    assert record["steps"] == math.ceil(len(rows) / run.gradient_accumulation_steps)
    if run.max_steps is None:
        # nor is a retain row prepared that no step takes
        assert traced["retain rows"] == min(9, sum(joined))


@pytest.mark.parametrize("step", [1, 2, 3], ids=["before the border", "at it", "after it"])
def test_a_run_that_stops_about_the_border_ends_where_an_unbroken_one_ends(data, tmp_path, monkeypatch, step):
    changes = {**FIRST, "gradient_accumulation_steps": 2, "save_steps": 1}
    straight = unlearn(settings(data, tmp_path / "straight", "e2urec", **changes))
    real = loss.UnlearnTrainer.compute_loss

    def breaks(self, model, inputs, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, model, inputs, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", breaks)
        with pytest.raises(KeyboardInterrupt):
            unlearn(settings(data, tmp_path / "broken", "e2urec", **changes))
    broken = unlearn(settings(data, tmp_path / "broken", "e2urec", resume=True, **changes))
    expected, got = (load_file(str(out / "adapter" / "adapter_model.safetensors")) for out in (straight, broken))
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"retain_after": 3}, "`retain_after` is 3 and `epochs` 3"),
        ({"retain_after": -1}, "greater than or equal to 0"),
        ({"retain_objective": {"kind": "none"}}, "`retain_objective.kind` is none"),
        ({"retain_objective": {"kind": "adaptive"}}, "adaptive weighs retain rows by their loss"),
        ({"objective": {"kind": "none"}}, "`objective.kind` must not be none"),
        ({"beta": 0}, "nor `beta` 0"),
        ({"method": "alter", "phase_one": 0.1}, "give `phase_one` 0 or `retain_after` 0"),
        ({"method": "alter", "experts_only": True}, "`experts_only` is on"),
    ],
    ids=str,
)
def test_a_first_phase_that_makes_no_sense_is_refused(data, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        settings(data, tmp_path / "run", **{"method": "graddiff", **FIRST, **changes})


@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"batch_size": 18}, {"epochs": 1.1, "batch_size": 4}], ids=str)
def test_a_first_phase_of_all_steps_is_refused_before_the_model_is_loaded(data, tmp_path, monkeypatch, changes):
    monkeypatch.setattr("alter.training.loaded.load_model", None)
    with pytest.raises(UserError, match=r"no step is left for retain rows to join\. Give more epochs"):
        unlearn(settings(data, tmp_path / "run", "e2urec", **{**FIRST, **changes}))
    assert not (tmp_path / "run").exists()


def test_layers_that_the_model_lacks_are_refused_before_passes_over_it(data, tmp_path):
    run = settings(data, tmp_path / "run", "e2urec", adapter={"target_modules": ["c_attn"]})
    with pytest.raises(UserError, match=r"No linear layer is named \['c_attn'\]; there are: .*q_proj"):
        unlearn(run)
    assert not (tmp_path / "run" / "reinforced.safetensors").exists()


@pytest.mark.parametrize("method", ["rmu", "lora_gd", "asym_lora", "stable", "loku", "uld"])
def test_activation_checkpointing_changes_nothing(data, tmp_path, method):
    """Every method trains the same weights with and without it (peers' adapters stay silently untrained)."""

    def weights(on):
        changes = {"epochs": 1, "learning_rate": 1e-2, "gradient_checkpointing": on}
        out = unlearn(settings(data, tmp_path / str(on), method, **changes))
        return load_file(str(next(out.glob("[am]*/**/*model.safetensors"))))

    plain, checkpointed = weights(False), weights(True)
    assert any("B" not in name or value.abs().sum() > 0 for name, value in plain.items())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["npo_gd", "asym_lora", "stable", "rmu", "uld"])
def test_autocast_to_bf16_trains_finite_weights(data, tmp_path, method):
    out = unlearn(settings(data, tmp_path / "run", method, bf16=True))
    trained = load_file(str(next(out.glob("[am]*/**/*model.safetensors"))))
    assert all(torch.isfinite(value).all() for value in trained.values())


def test_made_up_labels_are_no_structure_for_the_shared_matrix(data, tmp_path, monkeypatch):
    """ALTER's adapter with random labels: the loss on high-entropy tokens counts real tokens alone."""
    changes = {"adapter": {"entropy_quantile": 0.3}, "objective": {"kind": "random_labels"}, "batch_size": 3}

    def look(self, model, inputs, loss):
        model.eval()
        found = []
        with torch.no_grad():
            batch = inputs["batch"]
            gates, high = batch.gates.float(), batch.entropy > self.threshold
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                alter_routing=Routing(gates),
            ).logits
            for b in (batch.branch == 2).nonzero()[:, 0].tolist():
                for t in range(1, batch.labels.shape[1]):
                    if batch.labels[b, t] != -100 and high[b, t]:
                        found.append(-torch.log_softmax(logits[b, t - 1], -1)[batch.labels[b, t]].item())
        assert self.parts["structure"].item() == pytest.approx(sum(found) / len(found), rel=1e-4)

    first_step(monkeypatch, settings(data, tmp_path / "run", "alter", **changes), look)


def test_defaults_of_the_paper_s_adapter_are_those_of_its_configuration():
    # written in both, as reading the settings must not load PEFT
    config, adapter = AlterConfig(), AlterAdapter()
    shared = set(AlterAdapter.model_fields) & set(AlterConfig.__dataclass_fields__) - {"router_memory"}
    assert len(shared) == 15
    for name in shared - {"entropy_threshold"}:
        assert getattr(adapter, name) == getattr(config, name), name
