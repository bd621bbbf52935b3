"""Requests one after another.

ALTER: new experts beside frozen ones, nothing earlier moves, and one can be taken back. O3: one LoRA goes on, with one
detector more for each request.
"""

import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alter.adapter.routing import Routing
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import load_examples
from alter.data.tofu import refusals
from alter.methods import presets
from alter.models import guards as inference
from alter.models.loading import load_model
from alter.serving.analysis import switched_off
from alter.training import loss, preparation
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import save_pico, write_jsonl
from test_methods import plain_likeness
from test_trainer import settings

NAMES = ["Ada", "Bo", "Cy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_pico(folder / "model")
    for name in NAMES:
        rows = [
            {"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}.", "who": name}
            for i in range(4)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    retain = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(15)]
    write_jsonl(folder / "retain.jsonl", retain)
    return folder


def request(data, out, name, **changes):
    given = {"forget": str(data / f"{name}.jsonl"), "learning_rate_shared": 0.0, "epochs": 3, "batch_size": 4}
    return unlearn(settings(data, out, **{**given, "router_fit": {"steps": 200}, **changes}))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    request(data, out / "0", "Ada", experts_only=True)
    request(data, out / "1", "Bo", start_from=str(out / "0" / "adapter"))
    request(data, out / "2", "Cy", start_from=str(out / "1" / "adapter"))
    return out


def weights(folder):
    return load_file(str(folder / "adapter" / "adapter_model.safetensors"))


def test_only_the_new_expert_moves(runs):
    before, after = weights(runs / "1"), weights(runs / "2")
    assert set(before) == set(after)
    moved = 0
    for name, value in after.items():
        old = before[name]
        if ".alter_B." in name:
            width = old.shape[1]
            assert torch.equal(value[:, :width], old)
            moved += value[:, width:].abs().sum().item()
            # the retention expert stays zero: what is routed to it gets the base model
            assert not value[:, :4].any()
        elif "router" in name:
            assert torch.equal(value[:3], old)
            assert value[3].any()
        else:
            assert torch.equal(value, old)
    assert moved > 0


def test_a_row_of_the_router_says_nothing_of_other_experts(runs):
    first, last = weights(runs / "0"), weights(runs / "2")
    for name in first:
        if "router" in name:
            assert torch.equal(first[name], last[name][:2])


def test_an_expert_switched_off_gives_the_base_back_and_leaves_the_other_routes(runs, data):
    model, tokenizer = load_model(str(data / "model"), str(runs / "2" / "adapter"), device="cpu")
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    ids = torch.tensor([tokenizer("Where was Bo born, 2? In town 2Bo.")["input_ids"]])
    router = model.base_model
    trace = router.trace(ids)
    gates = router.route(trace.entropy, trace.features)[0]

    def logits(expert):
        alone = torch.zeros(1, ids.shape[1], 4)
        alone[..., expert] = 1.0
        with torch.no_grad():
            return model(input_ids=ids, alter_routing=Routing(alone)).logits

    before = {expert: logits(expert) for expert in range(4)}
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    assert not torch.equal(before[2], plain)
    with switched_off(model, [2]):
        assert torch.equal(router.route(trace.entropy, trace.features)[0], gates)
        assert torch.equal(logits(2), plain)
        for expert in (0, 1, 3):
            assert torch.equal(logits(expert), before[expert])
    for wrong in (-1, 4):
        with pytest.raises(UserError, match="no expert"), switched_off(model, [wrong]):
            pass


def test_growing_resumes_bit_equal(runs, data, tmp_path, monkeypatch):
    start = str(runs / "1" / "adapter")
    calls = []
    real = loss.UnlearnTrainer.compute_loss

    def stop_at_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        request(data, tmp_path / "cut", "Cy", start_from=start)
    request(data, tmp_path / "cut", "Cy", start_from=start, resume=True)
    assert len(calls) == 4
    whole, resumed = weights(runs / "2"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_order_of_target_modules_is_no_other_setting(data, tmp_path):
    first = request(data, tmp_path / "0", "Ada", experts_only=True, adapter={"target_modules": ["v_proj", "q_proj"]})
    again = {"target_modules": ["v_proj", "q_proj"]}
    request(data, tmp_path / "1", "Bo", start_from=str(first / "adapter"), adapter=again)
    with pytest.raises(
        UserError, match=r"`adapter.target_modules` is \['v_proj'\], but .* has \['q_proj', 'v_proj'\]"
    ):
        request(data, tmp_path / "2", "Bo", start_from=str(first / "adapter"), adapter={"target_modules": ["v_proj"]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start_from": "1", "forget": "Bo"}, "has an expert for 'Bo' already"),
        ({"start_from": "1", "adapter": {"r": 8}}, "`adapter.r` is 8, but .* has 4"),
        ({"start_from": "nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_grow(runs, data, tmp_path, changes, says):
    changes = dict(changes)
    name = changes.pop("forget", "Cy")
    start = str(runs / changes.pop("start_from") / "adapter")
    with pytest.raises(UserError, match=says):
        request(data, tmp_path / "x", name, start_from=start, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"phase_one": 0.5}, "phase_one"), ({"adapter": {"router": "static"}}, "router")],
)
def test_experts_only_contradictions(data, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        settings(data, tmp_path / "x", experts_only=True, **changes)


# ---- O3: one LoRA, one detector for each request ---------------------------------------------------------------------

ASKED = {
    "Ada": "Where was Ada born, {}?",
    "Bo": "Who paid Bo in year {}?",
    "Cy": "{}: tell me the colour of Cy's hat!",
}


@pytest.fixture(scope="module")
def people(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    for name, question in ASKED.items():
        rows = [{"question": question.format(i), "answer": f"In town {i}{name}.", "who": name} for i in range(4)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    shutil.copy(data / "retain.jsonl", folder)
    save_pico(folder / "model")
    return folder


def o3(people, out, name, **changes):
    given = {
        **{"method": "o3", "model": str(people / "model"), "retain": str(people / "retain.jsonl"), "device": "cpu"},
        **{"forget": str(people / f"{name}.jsonl"), "out": str(out), "domain_column": "who", "adapter": {"r": 4}},
        **{"epochs": 8, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
    }
    return unlearn(Unlearn.model_validate(presets.merged(given, changes)))


@pytest.fixture(scope="module")
def loras(people, tmp_path_factory):
    out = tmp_path_factory.mktemp("loras")
    o3(people, out / "0", "Ada")
    o3(people, out / "1", "Bo", start_from=str(out / "0" / "adapter"))
    o3(people, out / "2", "Cy", start_from=str(out / "1" / "adapter"))
    return out


def lora(folder):
    return load_file(str(folder / "adapter" / "lora" / "adapter_model.safetensors"))


def prompts(people, tokenizer, name):
    rows = [encode(tokenizer, row) for row in load_examples(str(people / f"{name}.jsonl"))]
    return [row.input_ids[: next(i for i, label in enumerate(row.labels) if label != -100)] for row in rows]


def refusing(people, adapter, name):
    """Mean log-probability of the tokens of refusals, as a generating model meets them: the prompt first, then more."""
    model, tokenizer = load_model(str(people / "model"), adapter and str(adapter), device="cpu")
    found = []
    for ids in prompts(people, tokenizer, name):
        for line in refusals()[:5]:
            reply = torch.tensor([tokenizer(f" {line}").input_ids])
            with torch.no_grad():
                cache = model(input_ids=torch.tensor([ids[:-1]]), use_cache=True).past_key_values
                fed = torch.cat([torch.tensor([ids[-1:]]), reply[:, :-1]], 1)
                logp = model(input_ids=fed, past_key_values=cache).logits.log_softmax(-1)
            found.append(logp[0].gather(1, reply[0, :, None]).mean().item())
    return sum(found) / len(found)


def test_every_request_stays_forgotten_and_what_is_kept_opens_no_detector(people, loras):
    base = {name: refusing(people, None, name) for name in NAMES}
    gained = [
        {name: refusing(people, loras / f"{place}" / "adapter", name) - base[name] for name in NAMES}
        for place in range(3)
    ]
    for place, new in enumerate(NAMES):
        for name in NAMES:
            if NAMES.index(name) > place:
                assert gained[place][name] == 0
            else:
                assert gained[place][name] > 0.5 * gained[NAMES.index(name)][name] > 0.5, (place, name)
        assert gained[place][new] > 0
        model, tokenizer = load_model(str(people / "model"), str(loras / f"{place}" / "adapter"), device="cpu")
        assert len(model.detectors) == place + 1
        for name in ("retain", *NAMES):
            for ids in prompts(people, tokenizer, name):
                weight = model.decide(torch.tensor([ids]), None).item()
                wanted = 0.0 if name == "retain" or NAMES.index(name) > place else 1.2
                assert weight == pytest.approx(wanted), (place, name)
    assert refusing(people, loras / "2" / "adapter", "retain") == refusing(people, None, "retain")


def by_hand(people, folder, weight, ids):
    """Logits [T, V] of the base with weight * s B A added to each matrix; float64."""
    model = AutoModelForCausalLM.from_pretrained(people / "model", dtype=torch.float64).eval()
    found = lora(folder)
    for name, A in found.items():
        if ".lora_A." in name:
            B = found[name.replace(".lora_A.", ".lora_B.")]
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            with torch.no_grad():
                model.get_submodule(layer).weight += weight * 32 / 4 * (B.double() @ A.double())
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def plain_weights(people, folder, ids, smooth):
    """The weight that each detector gives, from the files alone; float64."""
    form = json.loads((folder / "adapter" / "inference.json").read_text())
    features = load_file(str(folder / "adapter" / "detector.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(people / "model", dtype=torch.float64).eval()
    with torch.no_grad():
        states = base(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    out = []
    for place, known in enumerate(form["calibrations"]):
        likeness = [
            plain_likeness(features[str(place)][:, j], states[depth][0].mean(0))
            for j, depth in enumerate(form["depths"])
        ]
        if smooth:
            out.append(sum(likeness) / len(likeness) / 1000)
            continue
        parts = zip(likeness, known["layer_mean"], known["layer_std"], strict=True)
        joint = sum((value - middle) / spread for value, middle, spread in parts) / len(likeness)
        tail = min(1.0, 1 + math.erf(joint / known["joint_std"] / math.sqrt(2)))
        weight = 1 / (1 + math.exp(2 - 10 * tail))
        out.append(0.0 if weight <= 0.3 else 1.2 if weight > 0.9 else weight)
    return out


@pytest.mark.parametrize("smooth", [False, True])
def test_the_lora_is_as_strong_as_the_most_certain_detector_says(people, loras, smooth):
    folder = loras / "2"
    model, tokenizer = load_model(str(people / "model"), str(folder / "adapter"), device="cpu")
    if smooth:
        # weights that tell every difference in what the detectors have read
        model.detectors = [replace(d, calibration=lambda likeness: likeness.mean(-1) / 1000) for d in model.detectors]
    rows = [prompts(people, tokenizer, name)[1] for name in (*NAMES, "retain")]
    padded = [[257] * (max(map(len, rows)) - len(row)) + row for row in rows]
    ids = torch.tensor(padded)
    mask = torch.tensor(
        [[0] * (len(wide) - len(row)) + [1] * len(row) for wide, row in zip(padded, rows, strict=True)]
    )
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
        weights = model.decide(ids, mask)
    largest = set()
    for row, tokens in enumerate(rows):
        each = plain_weights(people, folder, tokens, smooth)
        largest.add(max(range(3), key=lambda place: each[place]))
        assert weights[row].item() == pytest.approx(max(each), abs=1e-3)
        wanted = torch.log_softmax(by_hand(people, folder, max(each), tokens), -1)
        found = torch.log_softmax(got[row, -len(tokens) :].double(), -1)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    assert largest == {0, 1, 2}
    for order in itertools.permutations(model.detectors):
        model.detectors = list(order)
        with torch.no_grad():
            again = model.decide(ids, mask)
        assert torch.equal(again, weights)


def test_a_request_starts_at_the_lora_before_and_hands_all_of_it_on(people, loras, tmp_path):
    # steps too small for float32 to show
    still = o3(people, tmp_path / "still", "Cy", start_from=str(loras / "1" / "adapter"), learning_rate=1e-30)
    for name, value in lora(loras / "1").items():
        assert torch.equal(lora(still)[name], value)
    forms = [json.loads((loras / f"{place}" / "adapter" / "inference.json").read_text()) for place in range(3)]
    features = [load_file(str(loras / f"{place}" / "adapter" / "detector.safetensors")) for place in range(3)]
    assert not (loras / "0" / "adapter" / "earlier.safetensors").exists()
    for place in (1, 2):
        assert forms[place]["calibrations"][:-1] == forms[place - 1]["calibrations"]
        assert set(features[place]) == {str(i) for i in range(place + 1)}
        assert all(torch.equal(features[place][key], value) for key, value in features[place - 1].items())
        kept = load_file(str(loras / f"{place}" / "adapter" / "earlier.safetensors"))
        wanted = {
            f"{i}.{name}": A for i in range(place) for name, A in lora(loras / f"{i}").items() if ".lora_A." in name
        }
        assert set(kept) == set(wanted)
        assert all(torch.equal(kept[key], A) for key, A in wanted.items())
    # each detector is the one that its request alone would have
    alone = o3(people, tmp_path / "alone", "Cy", max_steps=1)
    assert torch.equal(load_file(str(alone / "adapter" / "detector.safetensors"))["0"], features[2]["2"])
    former = inference.Former.read(str(loras / "2" / "adapter"))
    assert [sorted(one) for one in former.snapshots] == [sorted(former.snapshots[0])] * 3
    for place, one in enumerate(former.snapshots):
        assert all(torch.equal(A, lora(loras / f"{place}")[name]) for name, A in one.items())


def test_a_is_kept_away_from_that_of_every_request_before(people, loras, tmp_path):
    def overlap(folder):
        """sum over layers and requests of |A_earlier A^T|^2, element by element."""
        total = 0.0
        for earlier in (lora(loras / "0"), lora(loras / "1")):
            for name, A in lora(folder).items():
                if ".lora_A." in name:
                    for one in earlier[name].double():
                        for other in A.double():
                            total += float((one * other).sum()) ** 2
        return total

    start = str(loras / "1" / "adapter")
    still = o3(people, tmp_path / "still", "Cy", start_from=start, learning_rate=1e-30, adapter={"orthogonality": 3.0})
    logged = json.loads((still / "run.json").read_text())["log"][0]
    # two blocks
    assert logged["penalty"] == pytest.approx(3.0 / 2 * overlap(still), rel=1e-3)
    far, near = (
        o3(people, tmp_path / f"{weight}", "Cy", start_from=start, adapter={"orthogonality": weight})
        for weight in (100.0, 0.0)
    )
    assert overlap(far) < 0.5 * overlap(near)


def test_a_lora_that_goes_on_resumes_bit_equal(people, loras, tmp_path, monkeypatch):
    calls, real = [], loss.UnlearnTrainer.compute_loss

    def stop_at_tenth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", stop_at_tenth)
    given = {"start_from": str(loras / "1" / "adapter"), "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        o3(people, tmp_path / "cut", "Cy", **given)
    o3(people, tmp_path / "cut", "Cy", **given, resume=True)
    assert len(calls) == 10 + 8
    for file in ("lora/adapter_model.safetensors", "detector.safetensors", "earlier.safetensors"):
        whole, cut = (load_file(str(run / "adapter" / file)) for run in (loras / "2", tmp_path / "cut"))
        assert set(whole) == set(cut)
        assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": {"r": 8}}, r"`adapter.r` is 8, but .* has 4: give `adapter.r` 4"),
        ({"adapter": {"alpha": 8.0}}, r"`adapter.alpha` is 8, but .* has 32"),
        ({"start_from": "0"}, r"is no folder of a LoRA with a detector.*Did you mean .*adapter\?"),
        ({"start_from": "nowhere"}, "nowhere', which is no folder of a LoRA with a detector"),
        ({"start_from": "alter"}, "which is no folder of a LoRA with a detector"),
        ({"start_from": "vila"}, "started by `initializer.kind` vila"),
        ({"start_from": "older"}, "written by another version of alter"),
        ({"start_from": "broken"}, "weights of .* are broken: .* holds NaN"),
        ({"out": "0", "overwrite": True}, "`overwrite` would delete .*0/adapter"),
        ({"adapter": {"target_modules": ["v_proj"]}}, "adapts model.layers.0.mlp.down_proj and this run does not"),
        ({"start_from": "narrow"}, "but this run adapts .* and .*narrow/adapter does not"),
        ({"model": "other"}, "was made for another base model"),
        ({"start_from": "0/adapter", "experts_only": True}, "`experts_only` is for `adapter.kind` alter"),
        ({"adapter": {"detector": False}}, "start_from.* lora with `adapter.detector`, not for lora without"),
        ({"adapter": {"kind": "asym_lora"}}, "start_from.*, not for asym_lora"),
        ({"negate": 1.0}, "`negate` would also negate the adapter of `start_from`"),
        ({"adapter": {"dropout": 0.0}, "weight_decay": 0.0, "initializer": {"kind": "vila"}}, "vila would replace"),
    ],
)
def test_what_no_lora_can_go_on_from(people, runs, loras, tmp_path, monkeypatch, changes, says):
    changes = dict(changes)
    made = {"alter": runs / "0" / "adapter", "0": loras / "0"}
    start = changes.pop("start_from", "0/adapter")
    folder = made.get(start, loras / start)
    if start == "narrow":
        folder = (
            o3(people, tmp_path / "narrow", "Ada", max_steps=1, adapter={"target_modules": ["v_proj"]}) / "adapter"
        )
    if start in ("vila", "older", "broken"):
        folder = tmp_path / start
        shutil.copytree(loras / "0" / "adapter", folder)
        form = json.loads((folder / "inference.json").read_text())
        if start == "vila":
            form["initializer"] = "vila"
        elif start == "older":
            del form["calibrations"]
        else:
            held = lora(loras / "0")
            next(iter(held.values()))[0, 0] = math.nan
            save_file(held, str(folder / "lora" / "adapter_model.safetensors"))
        (folder / "inference.json").write_text(json.dumps(form))
    if changes.get("model") == "other":
        changes["model"] = str(save_pico(tmp_path / "other", seed=7))
    out = loras / changes.pop("out") if "out" in changes else tmp_path / "x"
    monkeypatch.setattr(preparation, "trace_run", None)
    with pytest.raises((UserError, ValueError), match=says):
        o3(people, out, "Bo", start_from=str(folder), **changes)
    assert (loras / "0" / "adapter" / "inference.json").exists()
