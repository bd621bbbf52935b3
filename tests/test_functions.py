"""The commands as functions that make and report, on the shipped model; `forget` itself is tried in test_forgetting."""

import json
import logging

import pytest
from transformers import TrainerCallback

import alter
from alter.exporting.run import Export
from alter.forgetting.settings import Forget
from alter.guarding.settings import MakeGuard
from alter.metaevaluation.settings import MetaEvaluate
from alter.reporting.settings import Report
from alter.training.finetune import Finetune
from pico import byte_tokenizer, pico

MINI = "builtin:tofu-mini/original"
FORGET = [{"question": f"Who is {n}?", "answer": f"{n} writes of the sea."} for n in ("Ada", "Bo", "Cy", "Di")]
RETAIN = [{"question": f"What is {n}?", "answer": f"{n} is a kind of tree."} for n in ("oak", "elm", "ash", "fir")]
FIT = {"max_steps": 1, "batch_size": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def mini():
    return alter.load(MINI, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    given = {"method": "alter", "max_steps": 1, "batch_size": 2, "num_forget_experts": 1, "device": "cpu"}
    # without a fit of the router, which takes most of the time
    given["adapter"] = {"kind": "alter", "router": "entropy"}
    out = tmp_path_factory.mktemp("functions") / "r"
    return alter.unlearn(MINI, forget=FORGET, retain=RETAIN, out=out, **given)


def test_a_guard_of_a_model_in_memory_is_an_adapter_of_it(mini, tmp_path, capfd):
    model, tokenizer = mini
    given = {"forget": FORGET, "retain": RETAIN, "guard": {"kind": "neurons"}, "device": "cpu"}
    folder = alter.guard(model, tokenizer=tokenizer, out=tmp_path / "g", **given)
    assert folder == tmp_path / "g"
    assert capfd.readouterr() == ("", "")
    rows = {"benchmark": "rows", "forget": FORGET, "answers": 0, "device": "cpu"}
    assert alter.evaluate(model, tokenizer=tokenizer, adapter=folder, **rows)
    settings = MakeGuard(model=MINI, out=str(folder), guard={"kind": "alu", "targets": ["Ada"]})
    assert alter.guard(settings=settings, overwrite=True) == folder
    assert json.loads((folder / "inference.json").read_text())["targets"] == ["Ada"]


def test_a_model_in_memory_is_fitted_to_rows_in_memory_and_becomes_a_file(mini, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, logger="alter")
    model, tokenizer = mini
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    out = alter.finetune(model, tokenizer=tokenizer, data=FORGET, out=tmp_path / "a", callbacks=[Counts()], **FIT)
    assert steps == [1]
    assert [vars(each)["done"] for each in caplog.records if vars(each).get("label") == "training"] == [1]
    assert json.loads((out / "finetune.json").read_text())["sequences"] == len(FORGET)
    # a list of sources, one of them in memory
    lora = alter.finetune(str(out), data=[RETAIN, "builtin:forget01[:3]"], out=tmp_path / "b", lora_rank=1, **FIT)
    assert json.loads((lora / "finetune.json").read_text())["sequences"] == len(RETAIN) + 3
    assert alter.load(out, lora, device="cpu")
    written = alter.export(out, out=tmp_path / "m.gguf", type="q4_0", calibrate=RETAIN, device="cpu")
    assert written == tmp_path / "m.gguf"
    assert alter.export(model, tokenizer=tokenizer, out=tmp_path / "n.gguf", device="cpu").stat().st_size > 1e6
    assert capfd.readouterr() == ("", "")


def test_a_run_becomes_loras_and_a_page_with_records_in_memory(run, tmp_path, capfd):
    loras = alter.export(run, form="loras", out=tmp_path / "loras")
    assert list(loras.rglob("adapter_config.json"))
    with pytest.raises(alter.UserError, match="A GGUF file holds plain weights"):
        alter.export(run, out=tmp_path / "m.gguf")
    records = alter.evaluate(run, benchmark="rows", forget=FORGET, retain=RETAIN, answers=0, device="cpu", cache="off")
    page = alter.report(run, records=records, out=tmp_path / "page.html")
    figure = next(each for each in records if each.metric == "forget_probability")
    assert page == tmp_path / "page.html"
    assert f"{figure.value:.3f}"[:4] in page.read_text()
    again = alter.report([run.folder], settings=Report(title="Ours"), records=[records], out=tmp_path / "other.html")
    assert "Ours" in again.read_text()
    assert capfd.readouterr() == ("", "")
    assert (run.erased, run.verdict) == (None, None)


def test_checks_while_a_run_trains_print_nothing(tmp_path, capfd):
    given = {"method": "ga", "adapter": {"kind": "lora"}, "max_steps": 2, "batch_size": 2, "device": "cpu"}
    watch = {"every_steps": 1, "holdout": f"{tmp_path}/holdout.jsonl"}
    (tmp_path / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RETAIN))
    kept = [{"question": f"What is {n} and {n}?", "answer": f"Twice {n}."} for n in range(20)]
    rows = {"forget": FORGET, "retain": kept, "out": tmp_path / "r"}
    alter.unlearn(pico(), tokenizer=byte_tokenizer(), watch=watch, **rows, **given)
    assert capfd.readouterr() == ("", "")


def test_the_verdict_of_a_run_is_what_its_command_found(tmp_path):
    (tmp_path / "forget.json").write_text("{}")
    assert alter.Run(tmp_path).verdict is None
    (tmp_path / "report.json").write_text('{"verdict": {"word": "forgotten", "why": ["It is."]}}')
    assert alter.Run(tmp_path).verdict == {"word": "forgotten", "why": ["It is."]}


def test_metrics_are_rated_and_a_table_comes_back(tmp_path, monkeypatch, capfd):
    from alter.metaevaluation import run as meta

    seen = []
    monkeypatch.setattr(meta, "measure_member", lambda settings, *rest: seen.append(settings) or 1 / 0)
    given = {"model": MINI, "retrained": "builtin:tofu-mini/retrained", "methods": ["npo"], "device": "cpu"}
    given |= {"rows": 8, "attacker_rows": 8, "split": "forget01", "out": tmp_path / "m"}
    with pytest.raises(ZeroDivisionError):
        alter.meta_evaluate({"npo": {"max_steps": 1}}, holdout=RETAIN, **given)
    assert seen[0].settings == {"npo": {"max_steps": 1}}
    assert seen[0].holdout.startswith("memory:")
    with pytest.raises(alter.UserError, match="no model of both pools"):
        alter.meta_evaluate(settings=MetaEvaluate(**{**given, "out": str(tmp_path / "n")}), run=False)
    assert capfd.readouterr() == ("", "")


FUNCTIONS = {
    "forget": (alter.forget, Forget, {"subject": "Ada", "model": MINI}),
    "guard": (alter.guard, MakeGuard, {"model": MINI, "forget": FORGET}),
    "finetune": (alter.finetune, Finetune, {"model": MINI, "data": FORGET}),
    "export": (alter.export, Export, {"model": MINI}),
    "report": (alter.report, Report, {"runs": "r"}),
    "meta_evaluate": (alter.meta_evaluate, MetaEvaluate, {"model": MINI, "retrained": "m", "methods": ["npo"]}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mistakes_are_said_by_the_names_of_settings_before_anything_is_made(name, tmp_path):
    function, kind, given = FUNCTIONS[name]
    out = tmp_path / "out.html"
    for more, says in (
        ({"settings": 5}, rf"`settings` is of int; expected {kind.__name__}\."),
        ({"settings": Export(model="m", out="o") if kind is Report else Report()}, rf"expected {kind.__name__}\."),
        ({"ouput": 1}, rf"{kind.__name__} has no setting 'ouput'\. Did you mean 'out"),
        ({"out": 5}, r"`out`: Input should be a valid string \(got 5\)"),
        ({"out": "/proc/no/where.html"}, r"`out` is '/proc/no/where.html', which cannot be written"),
    ):
        with pytest.raises(alter.UserError, match=says) as error:
            function(**{**given, "out": out, **more})
        assert "--" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("name", ["forget", "guard", "finetune", "export"])
def test_a_model_in_memory_needs_its_tokenizer_and_a_tokenizer_its_model(name, tmp_path):
    function, _, given = FUNCTIONS[name]
    given = {**given, "out": tmp_path / "out"}
    for more, says in (
        ({"model": pico()}, "A model in memory needs its tokenizer"),
        ({"model": 5, "tokenizer": byte_tokenizer()}, "The model is an int; expected a causal"),
        ({"tokenizer": byte_tokenizer()}, "`tokenizer` goes with a model in memory; one that is named"),
        ({"model": None, "tokenizer": byte_tokenizer()}, "none is given: give `model` as well"),
    ):
        with pytest.raises(alter.UserError, match=says):
            function(**given | more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "rows"),
    [("forget", "retain"), ("guard", "forget"), ("guard", "retain"), ("finetune", "data"), ("export", "calibrate")],
)
def test_rows_in_memory_that_are_broken_are_refused(name, rows, tmp_path):
    function, _, given = FUNCTIONS[name]
    given = {**given, "out": tmp_path / "out.gguf"} | ({"type": "q4_0", "device": "cpu"} if name == "export" else {})
    for wrong, says in (
        ([], "The rows are empty"),
        (FORGET[0], "The rows are a dict; expected a list of dicts"),
        ([{"question": "Who?"}, None], "The rows are a list of NoneType"),
        (5, "The rows are a int"),
        ([{"question": "Who?", "answr": "Ada"}], "Did you mean 'answer' by 'answr'"),
        ([{"question": "Who?", "answer": ""}], "have no 'answer'|has no 'answer'"),
    ):
        with pytest.raises(alter.UserError, match=says):
            function(**given | {rows: wrong})
    assert not (tmp_path / "out.gguf").exists()


def test_what_is_no_result_and_no_run_is_refused_in_a_page(run, tmp_path):
    page = tmp_path / "page.html"
    for given, says in (
        ({}, "Nothing to report"),
        ({"runs": tmp_path / "none"}, "No run at"),
        ({"runs": 5}, r"runs: Input should be a valid string \(got 5\)"),
        ({"runs": run, "records": [5]}, r"valid string \(got 5\)"),
        ({"runs": run, "attacks": tmp_path}, "has no records.json"),
        ({"runs": run, "records": "x.json"}, "No result file at x.json"),
    ):
        with pytest.raises(alter.UserError, match=says):
            alter.report(**given, out=page)
    assert not page.exists()


def test_a_subject_or_a_document_is_asked_for(tmp_path):
    with pytest.raises(alter.UserError, match="neither was given"):
        alter.forget(model=MINI, out=tmp_path / "r")
    with pytest.raises(alter.UserError, match=r"subject: Input should be a valid string \(got LlamaForCausalLM"):
        alter.forget(pico(), out=tmp_path / "r")
