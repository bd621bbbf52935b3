"""Quantised bases, number formats, recomputed activations and optimiser states: against plain weights, for real on a CPU."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM

from alter import AlterConfig, cli
from alter.adapter.base import base_fingerprint, same_base
from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.data.rows import load_examples
from alter.inference.generation import generate
from alter.inference.scoring import score
from alter.methods.presets import merged
from alter.models import quantized
from alter.models.loading import ModelSettings, load_model
from alter.training import loss
from alter.training.run import unlearn
from alter.training.settings import OPTIMIZERS, Unlearn
from pico import pico, run_on, save_pico, write_people

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra bnb) is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}


def reason_not_to_run(bits):
    """Why bitsandbytes cannot do it on this CPU, or nothing."""
    layer = bnb.nn.Linear4bit(64, 64) if bits == "4bit" else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    try:
        layer.to("cpu")(torch.randn(2, 64, requires_grad=True)).sum().backward()
    except Exception as error:
        return f"{bits} on this CPU: {type(error).__name__}: {error}"
    return ""


WHY_NOT = {bits: reason_not_to_run(bits) for bits in ("4bit", "8bit")}


def case(*values):
    """Values of a test's parameters, the last of them the bits, skipped where those do not run."""
    why = WHY_NOT.get(values[-1])
    return pytest.param(*values, marks=pytest.mark.skipif(bool(why), reason=why or "runs"))


BITS = [case(bits) for bits in WHY_NOT]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    save_pico(folder / "model", **WIDE)
    return write_people(folder, ("Ada", "Bo"), 3, 9)


def settings(data, out, method="alter", **changes):
    given = {
        "method": method,
        **run_on(data, out),
        "epochs": 1,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "router_fit": {"steps": 20},
    }
    return Unlearn.model_validate(merged(given, changes))


def is_packed(module):
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def dequantised(model):
    """A pico model in float32 whose linear layers have a quantised model's weights as plain numbers."""
    twin = pico(**WIDE)
    for name, module in model.named_modules():
        if is_packed(module):
            twin.get_submodule(name).weight.data.copy_(quantized.plain_weight(module))
    return twin


def adapted(model, kind):
    """An adapter in which nothing is zero, the same for each model it is put on."""
    from peft import LoraConfig

    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}
    config = {
        "lora": LoraConfig(**common),
        "alter": AlterConfig(**common, num_forget_experts=2),
        "asym_lora": AlterConfig(**common, num_forget_experts=2, router="dense"),
    }[kind]
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return tuned


def step(model):
    """Logits and the adapter's gradients, on padded rows of two lengths."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 250, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    real = mask[:, 1:].bool()
    model.zero_grad()
    cross_entropy(logits[:, :-1][real].float(), ids[:, 1:][real]).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach()[mask.bool()], grads


def far(got, wanted):
    """Largest difference, as a share of the largest value."""
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


# ---- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_plain_weights_are_what_the_packed_ones_mean(data, bits):
    model, _ = load_model(str(data / "model"), quantization=bits, device="cpu")
    layer = model.model.layers[1].mlp.down_proj
    got = quantized.plain_weight(layer)
    wanted = torch.zeros(64, 128, dtype=torch.float64)
    if bits == "8bit":
        for i in range(64):
            for j in range(128):
                wanted[i, j] = layer.weight.data[i, j].item() * layer.weight.SCB[i].item() / 127
    else:
        # pairs of codes in a byte; a scale for 64 weights, itself in 8 bits with a scale for 256
        state, packed = layer.weight.quant_state, layer.weight.data.flatten().tolist()
        scales, codes = state.state2, [code for byte in packed for code in (byte >> 4, byte & 15)]
        for place, code in enumerate(codes):
            block = place // 64
            scale = scales.code[int(state.absmax[block])] * scales.absmax[block // 256] + state.offset
            wanted[place // 128, place % 128] = state.code[code].double() * scale.double()
    assert far(got, wanted) < (5e-3 if bits == "4bit" else 1e-3)  # the numbers come out in bfloat16 and float16
    original = AutoModelForCausalLM.from_pretrained(data / "model").model.layers[1].mlp.down_proj.weight
    # the error of NF4 and of 8 bits on normal values
    error = float((got - original).norm() / original.norm())
    assert error == pytest.approx(*((0.092, 0.1) if bits == "4bit" else (0.007, 0.5)))
    assert not is_packed(model.lm_head)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["alter", "lora", "asym_lora"])
@pytest.mark.parametrize("bits", BITS)
def test_logits_and_adapter_gradients_are_those_of_the_plain_twin(data, bits, kind):
    base, _ = load_model(str(data / "model"), dtype="float32", quantization=bits, device="cpu")
    twin = adapted(dequantised(base), kind)
    tuned = adapted(base, kind)
    tuned.train()
    # bitsandbytes rounds activations to 8 bits on a CPU where it does not train, and a frozen pass tells the routes
    rounded = bits == "8bit" and kind == "alter"
    logits, grads = step(tuned)
    wanted, expected = step(twin)
    assert far(logits, wanted) < (1e-2 if rounded else 1e-5)
    assert grads.keys() == expected.keys()
    assert len(grads) >= 12
    for name in grads:
        assert grads[name].dtype == torch.float32
        assert far(grads[name], expected[name]) < (5e-2 if rounded else 1e-5), name
    tuned.eval()
    assert far(step(tuned)[0], wanted) < (1e-5 if bits == "4bit" else 5e-2)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_in_bfloat16_the_twin_is_as_near_as_bfloat16_is(data, bits, dtype):
    base, _ = load_model(str(data / "model"), dtype=dtype, quantization=bits, device="cpu")
    twin = adapted(dequantised(base), "alter")
    tuned = adapted(base, "alter")
    (logits, grads), (wanted, expected) = step(tuned.train()), step(twin)
    assert far(logits, wanted) < 3e-2
    assert all(grads[name].dtype == torch.float32 and far(grads[name], expected[name]) < 0.2 for name in expected)


def test_a_pass_without_gradients_leaves_gradients_as_they_are(data):
    """bitsandbytes repacks 4-bit layers for fast CPUs at such a pass; what it packs has no backward."""
    base, _ = load_model(str(data / "model"), quantization="4bit", device="cpu")
    _, before = step(adapted(base, "lora").train())
    base, _ = load_model(str(data / "model"), quantization="4bit", device="cpu")
    with torch.no_grad():
        base(input_ids=torch.tensor([[1, 2, 3]]))
    _, after = step(adapted(base, "lora").train())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", BITS)
def test_fingerprints_tell_quantised_bases_apart(data, tmp_path, bits):
    save_pico(tmp_path / "other", seed=5, **WIDE)
    loaded = {
        name: load_model(str(name), quantization=bits, device="cpu")[0]
        for name in (data / "model", tmp_path / "other")
    }
    first, other = (base_fingerprint(model) for model in loaded.values())
    again = base_fingerprint(load_model(str(data / "model"), quantization=bits, device="cpu")[0])
    full = base_fingerprint(AutoModelForCausalLM.from_pretrained(data / "model"))
    assert first == again
    assert first.split(":")[1] == f"{bits} bfloat16 cpu"
    assert not same_base(first, other)
    assert same_base(first, full)
    wide = base_fingerprint(load_model(str(data / "model"), dtype="float32", quantization=bits, device="cpu")[0])
    assert wide.split(":")[1] == f"{bits} float32 cpu"
    assert same_base(first, wide)
    model = get_peft_model(loaded[data / "model"], AlterConfig(num_forget_experts=2, r=4, task_type="CAUSAL_LM"))
    assert base_fingerprint(model) == first
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="made for another base model"):
        PeftModel.from_pretrained(loaded[tmp_path / "other"], tmp_path / "adapter")
    with pytest.warns(UserWarning, match=f"trained on a base in {bits} and is put on an unquantised base: it works"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "model"), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh, _ = load_model(str(data / "model"), quantization=bits, device="cpu")
        PeftModel.from_pretrained(fresh, tmp_path / "adapter")


# ---- runs -----------------------------------------------------------------------------------------------------------

KINDS = {
    "alter": {},
    "lora_gd": {},
    "asym_lora": {},
    "stable": {},
    "uld": {},
    "o3": {},
    "vila": {"initializer": {"epochs": 1}},
    "reglu": {"adapter": {"r": 4, "alpha": 8}, "initializer": {"rows": 4, "retain_rank": 3}},
    "e2urec": {"reinforcement": {"epochs": 1, "learning_rate": 1e-2}, "retain_after": 0.4},
}


ROUNDED = ("alter", "vila", "reglu", "e2urec")
"""What learns from frozen passes, in which LLM.int8 rounds activations to 8 bits."""


QUICK = ("alter", "lora_gd", "o3")


@pytest.mark.parametrize("method", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
@pytest.mark.parametrize("bits", BITS)
def test_a_run_on_a_quantised_base_is_one_on_its_plain_twin(data, tmp_path, bits, method):
    """Both train for three steps and end with the same adapter, which scores alike."""
    base, tokenizer = load_model(str(data / "model"), dtype="float32", quantization=bits, device="cpu")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    dequantised(base).save_pretrained(tmp_path / "twin")
    tokenizer.save_pretrained(tmp_path / "twin")
    changes = {**KINDS[method], "dtype": "float32", "learning_rate": 1e-2}
    out = unlearn(settings(data, tmp_path / "run", method, quantization=bits, **changes))
    twin = unlearn(settings(data, tmp_path / "plain", method, model=str(tmp_path / "twin"), **changes))
    got, wanted = (json.loads((run / "run.json").read_text())["log"][-1]["train_loss"] for run in (out, twin))
    assert got == pytest.approx(wanted, rel=1e-3 if bits == "4bit" else 0.1)
    common = {"dtype": "float32", "device": "cpu"}
    model, _ = load_model(str(data / "model"), str(out / "adapter"), quantization=bits, **common)
    plain, _ = load_model(str(tmp_path / "twin"), str(twin / "adapter"), **common)
    rows = [encode(tokenizer, row) for row in load_examples(str(data / "forget.jsonl"))]
    scores = [score(m, rows, pad_token_id=tokenizer.pad_token_id, progress=False).logprob for m in (model, plain)]
    scores = [torch.cat([torch.from_numpy(row) for row in found]) for found in scores]
    assert torch.isfinite(scores[0]).all()
    if bits == "4bit":
        assert far(*scores) < 1e-2
    folder = "adapter/lora" if method in ("uld", "o3") else "adapter"
    weights = [load_file(run / folder / "adapter_model.safetensors") for run in (out, twin)]
    for name, value in weights[0].items():
        if bits == "4bit" or method not in ROUNDED:
            torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-3)
    assert len(generate(model, tokenizer, [rows[0].input_ids[:9]], max_new_tokens=3, progress=False)) == 1
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    found = [name for name in after for known in before if name.endswith(known)]
    assert len(found) >= len(before)
    for known, value in before.items():
        assert any(name.endswith(known) and torch.equal(after[name], value) for name in found), known


@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_of_a_quantised_base_works_on_the_full_one_and_says_so(data, tmp_path, capsys, bits):
    out = unlearn(settings(data, tmp_path / "run", quantization=bits))
    with pytest.warns(UserWarning, match="was trained on a base in"):
        model, tokenizer = load_model(str(data / "model"), str(out / "adapter"), device="cpu")
    near, _ = load_model(str(data / "model"), str(out / "adapter"), quantization=bits, device="cpu")
    ids = tokenizer("Question: Where was Ada born?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert 0 < far(near(ids).logits, model(ids).logits) < 0.5
    assert "quantization: " + bits in (out / "adapter" / "README.md").read_text()


# ---- number formats, activations, optimisers -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["alter", "lora_gd", "asym_lora", "stable", "uld"])
def test_a_bf16_base_has_a_float32_adapter_and_optimiser(data, tmp_path, monkeypatch, method):
    seen = {}
    real = loss.UnlearnTrainer.train

    def watched(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        seen.update(model=self.model, states=list(self.optimizer.state.values()))
        return done

    monkeypatch.setattr(loss.UnlearnTrainer, "train", watched)
    out = unlearn(settings(data, tmp_path / "run", method, dtype="bfloat16"))
    own = {n: p.dtype for n, p in seen["model"].named_parameters() if any(x in n for x in (".alter_", ".lora_"))}
    assert own
    assert set(own.values()) == {torch.float32}
    assert {p.dtype for n, p in seen["model"].named_parameters() if n not in own} == {torch.bfloat16}
    moments = {v.dtype for state in seen["states"] for n, v in state.items() if n in ("exp_avg", "exp_avg_sq")}
    assert moments == {torch.float32}
    folder = out / "adapter" / ("lora" if method == "uld" else "")
    assert {v.dtype for v in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    model, _ = load_model(str(data / "model"), str(out / "adapter"), dtype="bfloat16", device="cpu")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "bits"),
    # unquantised bases: the other kinds are in test_methods.py
    [case("alter", None), case("alter", "8bit"), case("lora_gd", "8bit")]
    + [case(method, "4bit") for method in ("alter", "lora_gd", "asym_lora", "stable", "uld")],
)
def test_recomputed_activations_change_nothing(data, tmp_path, method, bits):
    results = []
    for on in (False, True):
        changes = {"quantization": bits, "gradient_checkpointing": on, "dtype": "float32"}
        out = unlearn(settings(data, tmp_path / str(on), method, learning_rate=1e-2, **changes))
        folder = out / "adapter" / ("lora" if method == "uld" else "")
        results.append(load_file(folder / "adapter_model.safetensors"))
    moved = [name for name in results[0] if "_B" in name and results[0][name].abs().max() > 0]
    assert len(moved) > 2
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [pytest.param("finetune", marks=pytest.mark.slow), "alter"])
def test_optimiser_states_in_8_bits_take_a_quarter_and_train_alike(data, tmp_path, monkeypatch, method):
    sizes, results = {}, {}
    real = loss.UnlearnTrainer.train

    def watched(self, *args, **kwargs):
        done = real(self, *args, **kwargs)
        states = [
            v for s in self.optimizer.state.values() for n, v in s.items() if torch.is_tensor(v) and v.numel() > 1
        ]
        parameters = sum(p.numel() for p in self.optimizer.state)
        # lookup tables of 256 values are shared by all
        sizes[self.run.optimizer] = sum(v.nbytes for v in states if v.numel() != 256) / parameters
        results[self.run.optimizer] = torch.cat([p.detach().flatten() for p in self.optimizer.state])
        return done

    monkeypatch.setattr(loss.UnlearnTrainer, "train", watched)
    # plain gradient descent keeps nothing
    for name in set(OPTIMIZERS) - {"sgd"}:
        # bitsandbytes keeps tensors of fewer than 4096 values in 32 bits
        save_pico(tmp_path / "model", hidden_size=128, intermediate_size=256)
        adapter = {"adapter": {"r": 32, "alter_alpha": 64}} if method == "alter" else {}
        unlearn(settings(data, tmp_path / name, method, model=str(tmp_path / "model"), optimizer=name, **adapter))
    assert sizes["adamw"] == pytest.approx(8)
    assert sizes["paged_adamw"] == pytest.approx(8, abs=0.1)
    assert 2 <= sizes["adamw_8bit"] < 2.4
    assert 2 <= sizes["paged_adamw_8bit"] < 2.4
    for name in results:
        torch.testing.assert_close(results[name], results["adamw"], atol=2e-3, rtol=0)


def test_a_run_with_an_8_bit_optimiser_resumes(data, tmp_path, monkeypatch):
    common = {"optimizer": "adamw_8bit", "epochs": 2, "save_steps": 2}
    whole = unlearn(settings(data, tmp_path / "whole", "lora_gd", **common))
    real = loss.UnlearnTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        unlearn(settings(data, tmp_path / "cut", "lora_gd", **common))
    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", real)
    cut = unlearn(settings(data, tmp_path / "cut", "lora_gd", resume=True, **common))
    one, two = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (whole, cut))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--method", "ga", "--quantization", "4bit"], "freezes the weights, which --adapter.kind full trains"),
        (["--method", "loku", "--quantization", "8bit"], "fila takes gradients of the weights themselves"),
        (["--method", "o3", "--watch.every-steps", "1"], "watch looks at an adapter that is always on"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, capsys, args, says):
    given = ["--model", data / "model", "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl"]
    assert cli.main(["unlearn", *map(str, given), "--out", str(tmp_path / "run"), *args]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert not (tmp_path / "run" / "adapter").exists()


def test_what_cannot_be_quantised_says_why(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="runs on cuda and cpu, not on mps"):
        quantized.loading("4bit", "auto", torch.device("mps"))
    model, tokenizer = load_model(str(data / "model"), quantization="4bit", device="cpu")
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    again, _ = load_model(str(tmp_path / "packed"), device="cpu")
    assert is_packed(again.model.layers[0].mlp.down_proj)
    assert not again.model.layers[0].mlp.down_proj.support_avx512bf16_for_cpu
    with pytest.raises(UserError, match="stored in quantised form already"):
        load_model(str(tmp_path / "packed"), quantization="4bit", device="cpu")
    out = unlearn(settings(data, tmp_path / "run", "lora_gd"))
    with pytest.raises(UserError, match="`merged` is not exact on quantised weights"):
        ModelSettings(model=str(data / "model"), adapter=str(out / "adapter"), merged=True, quantization="8bit").load()
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'alter-unlearning\[bnb\]'"):
        load_model(str(data / "model"), quantization="4bit", device="cpu")


def test_every_command_that_loads_a_model_can_quantise_it(data, tmp_path, capsys):
    out = tmp_path / "answers.json"
    args = ["generate", "--model", data / "model", "--prompt", "Who?", "--max-new-tokens", 3, "--json", out]
    args += ["--quantization", "8bit", "--device", "cpu"]
    assert cli.main([str(arg) for arg in args]) == 0
    assert len(json.loads(out.read_text())) == 1
    for command in ("evaluate", "attack", "serve", "chat", "generate", "inspect", "entropy", "unlearn"):
        extra = ["--benchmark", "tofu"] if command == "evaluate" else []
        with pytest.raises(SystemExit):
            cli.main([command, *extra, "--help"])
        assert "--quantization" in capsys.readouterr().out


def test_linear_without_quantisation_is_its_own_weight():
    layer = torch.nn.Linear(3, 5).double()
    x = torch.randn(2, 3).double()
    assert torch.allclose(linear(x.float(), quantized.plain_weight(layer)), (layer(x) - layer.bias).float(), atol=1e-6)
