"""The package as a library: settings or keywords in, results out, nothing printed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainerCallback

import alter
from alter.api.given import settings_of
from alter.cli import main
from alter.data import encode_prompt, examples
from alter.exporting.run import Export, export
from alter.training.settings import Unlearn
from pico import VOCAB, byte_tokenizer, pico, save_pico

FORGET = [{"question": f"Who is {n}?", "answer": f"{n} writes of the sea."} for n in ("Ada", "Bo", "Cy", "Di")]
RETAIN = [{"question": f"What is {n}?", "answer": f"{n} is a kind of tree."} for n in ("oak", "elm", "ash", "fir")]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return str(save_pico(tmp_path_factory.mktemp("api") / "model"))


def test_import_is_light_and_names_are_there():
    code = (
        "import time; t = time.perf_counter(); import alter, sys; took = time.perf_counter() - t;"
        "print('torch' in sys.modules, took < 0.3, set(alter.__all__) <= set(dir(alter)), alter.__version__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True", "True", alter.__version__]
    with pytest.raises(AttributeError, match="no attribute 'forgett'"):
        _ = alter.forgett


def test_rows_in_memory_give_what_their_files_give(named, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, logger="alter")
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    common = {"max_steps": 2, "batch_size": 2, "num_forget_experts": 1, "device": "cpu", "method": "alter"}
    run = alter.unlearn(named, forget=FORGET, retain=RETAIN, out=tmp_path / "r1", callbacks=[Counts()], **common)
    assert steps == [1, 2]
    assert capfd.readouterr() == ("", "")
    assert {"label", "done", "total"} <= set(vars(caplog.records[0]))
    assert run.base == named
    assert run.adapter == tmp_path / "r1" / "adapter"
    files = {}
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        import json

        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("\n".join(json.dumps(row) for row in rows))
    settings = Unlearn(model=named, forget=str(files["forget"]), retain="x", out=str(tmp_path / "r2"), **common)
    twin = alter.unlearn(settings=settings, retain=files["retain"])
    ids = torch.arange(4, 20)[None]
    logits = [alter.load(each)[0](ids).logits for each in (run, twin)]
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], alter.load(named)[0](ids).logits)


def test_a_model_in_memory_is_left_as_it_is(named, tmp_path):
    model, tokenizer = pico(), byte_tokenizer()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    given = {"forget": FORGET, "retain": RETAIN, "max_steps": 1, "method": "ga", "device": "cpu"}
    run = alter.unlearn(model, tokenizer=tokenizer, out=tmp_path / "r", **given)
    assert run.adapter is None
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    changed, _ = alter.load(run.model)
    assert any(not torch.equal(weight, before[name]) for name, weight in changed.state_dict().items())


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"epoch": 3}, "Unlearn has no setting 'epoch'. Did you mean 'epochs'"),
        ({"epochs": -1}, "`epochs`: Input should be greater than 0"),
        ({"forget": []}, "The rows are empty"),
        ({"method": "ntpo"}, "npo"),
        ({"settings": {"epochs": 1}}, "`settings` is of dict; expected Unlearn"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(named, tmp_path, keywords, says):
    with pytest.raises(alter.UserError, match=says):
        alter.unlearn(named, **{"forget": FORGET, "retain": RETAIN, "out": tmp_path / "r", **keywords})
    assert not (tmp_path / "r").exists()


def refused(kind, how, keywords, tmp_path, capsys):
    """What Python says of a mistake, and what the command line says of the same one."""
    given = {"model": "m", "forget": "builtin:forget10", "retain": "builtin:retain90", **keywords}
    out = tmp_path / "r"
    with pytest.raises(alter.UserError) as error:
        how(**given, out=out)
    args = [arg for name, value in given.items() for arg in flags(name, value)]
    assert main([kind, *args, "--out", str(out)]) == 2
    return str(error.value), capsys.readouterr().err.strip().removeprefix("alter: ")


def flags(name, value):
    if isinstance(value, dict):
        return [arg for inner, each in value.items() for arg in flags(f"{name}.{inner}", each)]
    name = name.replace("_", "-")
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


@pytest.mark.parametrize(
    ("keywords", "python", "typed"),
    [
        ({"max_steps": 0}, "`max_steps`: Input", "--max-steps: Input"),
        ({"adapter": {"kind": "lora", "r": 0}}, "`adapter.r`: Input", "--adapter.r: Input"),
        (
            {"retain_after": 5.0, "epochs": 3},
            "give a larger `epochs` or a smaller `retain_after`",
            "give a larger --epochs or a smaller --retain-after",
        ),
        (
            {"adapter": {"kind": "lora"}, "objective": {"kind": "stopped_hinge", "only_low": True}},
            "`adapter.kind` alter, not lora: give `objective.only_low=False`",
            "--adapter.kind alter, not lora: give --objective.no-only-low",
        ),
        ({"resume": True}, "Leave `resume` out", "Leave --resume out"),
        (
            {"watch": {"calibrate": "affine", "every_steps": 1}},
            "give `watch.holdout` as well",
            "give --watch.holdout as well",
        ),
    ],
)
def test_python_is_told_the_setting_and_the_command_line_its_flag(keywords, python, typed, tmp_path, capsys):
    said = refused("unlearn", alter.unlearn, keywords, tmp_path, capsys)
    assert python in said[0]
    assert "--" not in said[0]
    assert typed in said[1]
    assert "`" not in said[1]


def test_a_model_in_memory_needs_its_tokenizer_and_a_benchmark_its_name(named, tmp_path):
    with pytest.raises(alter.UserError, match="needs its tokenizer"):
        alter.unlearn(pico(), forget=FORGET, retain=RETAIN, out=tmp_path / "r")
    with pytest.raises(alter.UserError, match=r"No benchmark 'tofuu'.*Did you mean 'tofu'"):
        alter.evaluate(named, benchmark="tofuu")
    with pytest.raises(alter.UserError, match=r"run\.json is missing"):
        alter.Run.at(tmp_path)


def headless():
    return pico().model


def on_meta():
    return pico().to("meta")


def adapted():
    return get_peft_model(pico(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def encoder_and_decoder():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (headless, "The model is a LlamaModel, which gives no next tokens"),
        (encoder_and_decoder, "The model is a T5ForConditionalGeneration, which gives no next tokens"),
        (on_meta, r"no numbers in it: model\.embed_tokens\.weight is on the device meta"),
        (adapted, r"a PeftModelForCausalLM, which has an adapter already.*merge_and_unload"),
        (lambda: torch.nn.Linear(2, 2), "The model is a Linear; expected a causal language model of transformers"),
        (lambda: LlamaForCausalLM, "The model is the class LlamaForCausalLM; expected a causal"),
        (lambda: 5, "The model is an int; expected a causal"),
    ],
)
def test_a_model_in_memory_that_cannot_be_used_is_refused_before_a_run(make, says, tmp_path):
    given = {"tokenizer": byte_tokenizer(), "forget": FORGET, "retain": RETAIN, "out": tmp_path / "r", "method": "npo"}
    with pytest.raises(alter.UserError, match=says):
        alter.unlearn(make(), **given)
    assert not (tmp_path / "r").exists()


def test_a_quantised_model_in_memory_is_not_trained_itself(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = alter.load("builtin:tofu-mini/original", quantization="8bit", device="cpu")
    given = {"forget": FORGET, "retain": RETAIN, "out": tmp_path / "r", "method": "npo", "device": "cpu"}
    with pytest.raises(alter.UserError, match=r"is quantised, and cannot be turned into float32.*`adapter\.kind`"):
        alter.unlearn(model, tokenizer=tokenizer, **given)


def test_objects_that_are_no_tokenizer_and_no_callbacks_are_refused(named, tmp_path):
    given = {"forget": FORGET, "retain": RETAIN, "out": tmp_path / "r", "method": "npo"}
    with pytest.raises(alter.UserError, match=r"`tokenizer` is a str; expected a tokenizer of transformers"):
        alter.unlearn(pico(), tokenizer=named, **given)
    for callbacks, what in (([int], "int"), (TrainerCallback(), "TrainerCallback"), ([None], "NoneType")):
        with pytest.raises(alter.UserError, match=rf"`callbacks` holds a?n? ?(the class )?{what}; expected a list"):
            alter.unlearn(named, callbacks=callbacks, **given)
    with pytest.raises(
        alter.UserError, match=r"`model`: Input should be a valid string \(got LlamaForCausalLM\(\)\.$"
    ):
        alter.compare(model=pico(), methods=["npo"], out=str(tmp_path / "r"))


def test_a_model_with_an_adapter_is_measured_and_takes_no_second_one(tmp_path):
    rows = {"benchmark": "rows", "forget": FORGET, "retain": RETAIN, "answers": 0, "device": "cpu"}
    given = {"tokenizer": byte_tokenizer(), **rows}
    assert {record.metric for record in alter.evaluate(adapted(), **given)} >= {"forget_probability"}
    with pytest.raises(alter.UserError, match="has an adapter already"):
        alter.evaluate(adapted(), adapter=tmp_path, **given)


def test_a_run_of_a_model_in_memory_says_that_no_folder_holds_it(tmp_path):
    given = {"max_steps": 1, "batch_size": 2, "device": torch.device("cpu"), "closing_rows": 0}
    part = {"adapter": {"kind": "lora"}, "objective": {"kind": "npo"}}
    names = []
    for seed in (0, 1):
        out, model = tmp_path / str(seed), pico(seed)
        run = alter.unlearn(model, tokenizer=byte_tokenizer(), forget=FORGET, retain=RETAIN, out=out, **part, **given)
        names.append(run.base)
    # the same sizes and other weights are another model
    assert names[0] != names[1]
    rows = {"benchmark": "rows", "forget": FORGET, "retain": RETAIN, "answers": 0, "device": "cpu"}
    for again in (lambda: alter.load(run), lambda: alter.evaluate(run, **rows)):
        with pytest.raises(alter.UserError, match=r"memory:model-\w+ was given in memory, and no folder holds it"):
            again()
    assert alter.evaluate(model, tokenizer=byte_tokenizer(), adapter=run.adapter, **rows)


def test_load_takes_what_torch_calls_them_and_refuses_what_it_does_not_know(named):
    model, _ = alter.load(Path(named), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    # it was held in 8 bits, and nothing said so
    with pytest.raises(alter.UserError, match="`quantization` is '3bit'; expected 4bit, 8bit"):
        alter.load(named, quantization="3bit")
    with pytest.raises(alter.UserError, match="`model` is of LlamaForCausalLM; expected the name"):
        alter.load(pico())


def test_what_are_no_rows_is_said_and_rows_that_are_gone_too(named, tmp_path):
    import pandas

    table = pandas.DataFrame(FORGET)
    for rows, what in (
        (table, "a DataFrame of str"),
        (FORGET[0], "a dict"),
        ([None], "a list of NoneType"),
        (5, "a int"),
    ):
        with pytest.raises(alter.UserError, match=rf"The rows are {what}; expected a list of dicts"):
            alter.unlearn(named, forget=rows, retain=RETAIN, out=tmp_path / "r")
    with pytest.raises(alter.UserError, match="given in memory, and no file holds them"):
        alter.evaluate(named, benchmark="rows", forget="memory:0123456789abcdef", retain=RETAIN, device="cpu")


def test_parts_of_settings_may_be_objects(named, tmp_path):
    from alter.methods import presets

    given = {"model": "m", "forget": "f", "retain": "r", "out": "o"}
    bounded = type(Unlearn(**given, objective={"kind": "without_truth"}).objective)
    lora = type(Unlearn(**given, adapter={"kind": "lora"}, objective={"kind": "npo"}).adapter)
    own = Unlearn(**given, objective=bounded(hinge=3.0, only_low=False), adapter=lora(r=2))
    found = settings_of(Unlearn, own, {"seed": 5})
    assert (found.objective, found.adapter, found.seed) == (own.objective, own.adapter, 5)
    # an adapter that is no ALTER's chooses, as its name does
    assert "method" not in presets.with_default({**given, "adapter": lora(r=2)})


def test_evaluate_returns_records_and_prints_nothing(tmp_path, capfd, monkeypatch):
    named = save_pico(tmp_path / "model", max_position_embeddings=512)
    monkeypatch.setenv("ALTER_CACHE", "off")
    capfd.readouterr()
    records = alter.evaluate(named, benchmark="tofu", split="forget01", limit=2, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert {"forget_rouge"} <= {record.metric for record in records} or len(records) > 5


def test_a_run_brings_its_chat_templates_variables(tmp_path):
    """It was measured with prompts that it had not been trained on."""
    template = "{% if thinking %}Think. {% endif %}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    model = str(save_pico(tmp_path / "model", max_position_embeddings=256))
    byte_tokenizer(chat_template=template).save_pretrained(model)
    given = {"max_steps": 1, "batch_size": 2, "method": "ga", "device": "cpu", "closing_rows": 0}
    run = alter.unlearn(
        model, forget=FORGET, retain=RETAIN, out=tmp_path / "r", chat_template_kwargs=["thinking=true"], **given
    )
    tokenizer = alter.load(run)[1]
    assert tokenizer.decode(encode_prompt(tokenizer, examples(FORGET)[0])).startswith("Think. ")
    told = {"benchmark": "rows", "forget": FORGET, "answers": 0, "before": model, "cache": "off"}
    own, same, other = (
        {(r.model, r.metric): r.value for r in alter.evaluate(run, **told, **more)}["unlearned", "forget_probability"]
        for more in ({}, {"chat_template_kwargs": ["thinking=true"]}, {"chat_template_kwargs": ["thinking=false"]})
    )
    assert own == same
    assert own != other


QUIET = """
import sys
import alter
from alter.cli import main
model, out = sys.argv[1:]
rows = [{"question": f"Who is {n}?", "answer": f"{n} writes of the sea."} for n in ("Ada", "Bo", "Cy", "Di")]
kept = [{"question": f"What is {n}?", "answer": f"{n} is a tree."} for n in ("oak", "elm", "ash", "fir")]
settings = {"method": "alter", "max_steps": 2, "save_steps": 1, "batch_size": 2, "num_forget_experts": 1, "device": "cpu"}
run = alter.unlearn(model, forget=rows, retain=kept, out=out, gradient_checkpointing=True, **settings)
alter.load(run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_nothing_is_printed_in_a_process_of_its_own(named, tmp_path, kind):
    # pytest catches warnings itself: what a script of a user sees shows only in a process without it
    if kind == "gguf":
        pytest.importorskip("gguf")
        export(Export(model="builtin:tofu-mini/original", out=str(tmp_path / "mini.gguf"), type="f16"))
        named = str(tmp_path / "mini.gguf")
    done = subprocess.run(
        [sys.executable, "-c", QUIET, named, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
    # what the package itself has to say goes to its logger, which prints what nobody takes
    said = [line for line in done.stderr.splitlines() if "dequantised" not in line and not line.startswith("Router: ")]
    assert said == []
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
