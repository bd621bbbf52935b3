"""Parts of others, by name: a package with an entry point brings one of each sort."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

import alter
import children
from alter import plugins
from alter.core.errors import UserError
from alter.methods.gradients import GradientRule
from alter.methods.objectives import FORGET, Labelled, Needs, Objective
from alter.methods.objectives.likelihood import NPO
from alter.training.settings import Unlearn
from pico import byte_tokenizer, pico, run_on, save_pico, write_people

SOURCE = Path(__file__).parent.parent / "src"

PACKAGE = '''
from typing import ClassVar, Literal

from peft import IA3Config, get_peft_model
from pydantic import Field
from torch import Tensor

from alter.attacks.techniques import ATTACKS, Technique
from alter.plugins import benchmark
from alter.storage.records import Record
from alter.evaluation.base import Evaluation
from alter.methods.adapters import ADAPTERS, Adapter
from alter.methods.initializers import INITIALIZERS, Factors, Initializer
from alter.methods.objectives import FORGET, RETAIN, Emitted, Labelled, Objective, mean_or_zero
from alter.models.guards import Guard, guard


@FORGET.part
class Mine(Objective):
    """Mean probability above a floor."""

    kind: Literal["mine"] = "mine"
    floor: float = Field(0.05, ge=0, lt=1, description="Probability that is left alone.")

    def per_token(self, emitted: Emitted) -> Tensor:
        return ((-emitted.nll).exp() - self.floor).relu()

    def __call__(self, tokens: Labelled) -> Tensor:
        return mean_or_zero(tokens.values)


@RETAIN.part
class Twice(Objective):
    """Twice the cross-entropy."""

    kind: Literal["twice"] = "twice"

    def __call__(self, tokens: Labelled) -> Tensor:
        return 2 * tokens.mean()


@ADAPTERS.part
class Scaled(Adapter):
    """IA3: a factor for each output of some layers."""

    kind: Literal["scaled"] = "scaled"
    layers: list[str] = Field(["k_proj"], description="Layers whose outputs are scaled.")

    def check(self, run):
        super().check(run)
        if not self.layers:
            raise ValueError("adapter.layers is empty: name a layer, such as k_proj")

    def attach(self, model, run, beginning):
        config = IA3Config(target_modules=self.layers, feedforward_modules=[], task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def parameter_groups(self, named, run):
        return [{"params": [p for _, p in named], "lr": 3 * run.learning_rate, "weight_decay": 0.0}]


@INITIALIZERS.part
class Sliced(Initializer):
    """The first rows of each weight."""

    kind: Literal["sliced"] = "sliced"
    scale: float = Field(0.1, gt=0, description="Of both factors.")

    def start(self, seen, r, scaling, seed):
        made = {name: Factors(W[:r] * self.scale, W[:, :r] * self.scale) for name, W in seen.weights.items()}
        return made, {}


@benchmark("weights")
class Weights(Evaluation):
    """Count the weights."""

    benchmark: Literal["weights"] = "weights"

    def title(self):
        return "Weights"

    def data_digest(self):
        return "nothing"

    def measure(self, model, tokenizer):
        total = sum(parameter.numel() for parameter in model.parameters())
        return [Record(self.label, "weights", float(total), total)]


def shout(bench):
    model, _ = bench.shared()
    return bench.measure("shout", model, bench.items(bench.measured))


@guard
class Bare(Guard):
    kind = "bare"

    @classmethod
    def read(cls, base, path, settings):
        base.config.use_cache = settings["use_cache"]
        return cls(base)

    def unlearned(self, inputs, cache, decision):
        return self.untouched(inputs, cache)


ATTACKS.add("shout", Technique("a chat with the model", shout))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the package and what pip writes beside it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "alter_mine.py").write_text(PACKAGE)
    info = folder / "alter_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alter-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[alter.plugins]\nmine = alter_mine\n")
    return folder


def python(folder, code, **given):
    path = os.pathsep.join([str(folder), str(SOURCE)])
    return children.run(code=code, paths=[folder], env={"PYTHONPATH": path, "ALTER_CACHE": "off"}, **given)


def test_a_package_brings_parts_that_are_used_by_name(installed, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    save_pico(data / "model", max_position_embeddings=512)
    write_people(data, ("Ada", "Bo"), 4, 8)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "inference.json").write_text(json.dumps({"kind": "bare", "base": None, "use_cache": False}))
    run = run_on(data, tmp_path / "run")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in run.items()]
    model = run["model"]
    code = f"""
import contextlib, io, json
import alter
from alter.cli import main
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    main(["unlearn", "--help"])
assert all(name in said.getvalue() for name in ("mine", "twice", "scaled", "sliced"))
mine = ["--objective.kind", "mine", "--objective.floor", "0.2", "--retain-objective.kind", "twice"]
sliced = ["--adapter.kind", "lora", "--initializer.kind", "sliced", "--initializer.scale", "0.5"]
assert main(["unlearn", *{flags!r}, *mine, *sliced, "--max-steps", "1", "--closing-rows", "0"]) == 0
scaled = ["--out", "scaled", "--adapter.kind", "scaled", "--adapter.layers", "v_proj"]
assert main(["unlearn", *{flags!r}, *mine, *scaled, "--max-steps", "1", "--closing-rows", "2"]) == 0
assert main(["evaluate", "--benchmark", "weights", "--model", {model!r}, "--json", "w.json"]) == 0
assert main(["attack", "--attacks", "shout", "--model", {model!r}, "--forget", {run["forget"]!r}, "--rows", "2",
             "--relearn.rows", "2", "--max-new-tokens", "2", "--out", "attack"]) == 0
assert not alter.load({model!r}, adapter="bare")[0].config.use_cache
"""
    python(installed, code, cwd=tmp_path)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["objective"] == {"kind": "mine", "floor": 0.2}
    assert settings["retain_objective"] == {"kind": "twice"}
    assert settings["initializer"] == {"kind": "sliced", "scale": 0.5}
    assert "It starts by sliced" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert json.loads((tmp_path / "scaled" / "run.json").read_text())["trained_parameters"] == 2 * 16
    assert "adapter.kind scaled" in (tmp_path / "scaled" / "adapter" / "README.md").read_text()
    assert json.loads((tmp_path / "scaled" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    assert json.loads((tmp_path / "w.json").read_text())[0]["metric"] == "weights"
    attacks = {record["extra"]["attack"] for record in json.loads((tmp_path / "attack" / "records.json").read_text())}
    assert "shout" in attacks


def test_caches_know_the_code_of_plugins(installed):
    code = "from alter.storage.provenance import code_digest; print(code_digest())"
    path = installed / "alter_mine.py"
    before = path.read_text()
    first = python(installed, code)
    path.write_text(before + "\n# changed\n")
    try:
        assert python(installed, code) != first
    finally:
        path.write_text(before)
    assert python(installed, code) == first


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[alter.plugins]\nlost = no_such_module\n")
    code = "from alter.cli import main; print(main(['evaluate', '--benchmark', 'weights', '--model', 'm']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "2"
    assert "plugin 'lost' of the package broken cannot be loaded" in done.stderr


FILE = """
from typing import Literal

from alter.methods.objectives import FORGET, Emitted, Labelled, Objective, mean_or_zero


@FORGET.part
class Plain(Objective):
    kind: Literal["plain"] = "plain"
    weight: float = 1.0

    def per_token(self, emitted):
        return self.weight * (-emitted.nll).exp()

    def __call__(self, tokens):
        return mean_or_zero(tokens.values)
"""


def test_a_plain_file_is_a_plugin_of_a_command_and_of_what_it_starts(tmp_path):
    save_pico(tmp_path / "model", max_position_embeddings=256)
    write_people(tmp_path, ("Ada",), 4, 6)
    (tmp_path / "plain.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import alter\nx = 1 / 0\n")
    failing = FILE.replace("plain", "failing").replace(
        "return self.weight * (-emitted.nll).exp()", "return emitted.reference.logp"
    )
    (tmp_path / "failing.py").write_text(failing)
    given = ["--plugin", "plain.py", "--adapter.kind", "lora", "--objective.kind", "plain", "--objective.weight", "2"]
    given += ["--max-steps", "2", "--batch-size", "2", "--closing-rows", "0"]
    for name, value in run_on(tmp_path, tmp_path / "run").items():
        given += [f"--{name.replace('_', '-')}", value] if name != "domain_column" else []
    code = (
        "import os, subprocess, sys\n"
        "from alter.cli import main\n"
        f"unlearn = ['unlearn', *{given!r}]\n"
        "print(main(unlearn))\n"
        "from alter.plugins import plugins_digest\n"
        "child = 'from alter.plugins import plugins_digest; print(plugins_digest())'\n"
        "found = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout.strip()\n"
        "print('same code:', found == plugins_digest())\n"
        f"other = {{'plain': 'failing', 'plain.py': 'failing.py', {str(tmp_path / 'run')!r}: 'failed'}}\n"
        "print(main([other.get(word, word) for word in unlearn]))\n"
        "print(main(['unlearn', '--plugin', 'broken.py', '--help']))\n"
        "print(main(['unlearn', '--plugin', 'none.py', '--help']))\n"
        "print(main(['--plugin', 'plain.py', 'unlearn']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-5:] == ["same code: True", "70", "2", "2", "2"]
    assert "failing.py, line 13: AttributeError: 'NoneType' object has no attribute 'logp'" in done.stderr
    assert "--plugin stands behind the command" in done.stderr
    assert "broken.py cannot be loaded, line 2: ZeroDivisionError" in done.stderr
    assert "--plugin is 'none.py'; expected a Python file" in done.stderr
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["objective"] == {"kind": "plain", "weight": 2.0}


def test_a_script_registers_its_own_part_and_names_stay_unique():
    @FORGET.part
    class Local(Objective):
        kind: Literal["local"] = "local"

        def __call__(self, tokens: Labelled) -> Tensor:
            return tokens.mean()

    required = {"model": "m", "forget": "f", "retain": "r", "out": "o", "lambda_": 0}
    try:
        settings = Unlearn(**required, objective={"kind": "local"})
        assert isinstance(settings.objective, Local)
        assert Unlearn.model_validate(settings.model_dump()) == settings
        with pytest.raises(UserError, match="already a part named 'local'"):
            FORGET.add("local", NPO)
        assert plugins.plugins_digest() is not None
    finally:
        del FORGET._parts["local"]
    with pytest.raises(ValueError, match="expected one of inverted_hinge"):
        Unlearn(**required, objective={"kind": "local"})
    with pytest.raises(UserError, match="has no name"):
        FORGET.part(type("Nameless", (Objective,), {"__call__": lambda self, tokens: tokens.mean()}))


ROWS = {
    "forget": [{"question": f"Who is {n}?", "answer": f"{n} writes of the sea."} for n in ("Ada", "Bo")],
    "retain": [{"question": f"What is {n}?", "answer": f"{n} is a kind of tree."} for n in ("oak", "elm")],
}


def own(functions):
    """An objective of a kind `mistaken` with these functions."""
    types = {"kind": Literal["mistaken"], "needs": ClassVar[Needs]}
    kind = {"__annotations__": types, "needs": Needs(), "kind": "mistaken", "__module__": __name__}
    return type("Mistaken", (Objective,), kind | functions)


def run_of(tmp_path, **parts):
    given = {"max_steps": 1, "batch_size": 2, "device": "cpu", "closing_rows": 0, "adapter": {"kind": "lora"}, **parts}
    return alter.unlearn(pico(), tokenizer=byte_tokenizer(), out=tmp_path / "r", **ROWS, **given)


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        (
            {"__call__": lambda self, t: t.values},
            r"mistaken gives a tensor of shape \[\d+\]; expected its loss, .*one number",
        ),
        ({"__call__": lambda self, t: 1.0}, "mistaken gives 1.0; expected its loss"),
        (
            {"__call__": lambda self, t: t.mean(), "per_token": lambda self, e: e.logits},
            r"`per_token` of the objective mistaken gives a tensor of shape \[\d+, 300\]; expected .* shape \[\d+\]",
        ),
        (
            {"__call__": lambda self, t: t.mean(), "per_token": lambda self, e: None},
            "mistaken gives None; expected one",
        ),
    ],
)
def test_what_an_objective_gives_is_checked(functions, says, tmp_path):
    FORGET.part(own(functions))
    try:
        with pytest.raises(UserError, match=says):
            run_of(tmp_path, objective={"kind": "mistaken"})
    finally:
        del FORGET._parts["mistaken"]


def test_a_loss_without_a_gradient_is_said_and_one_that_is_not_registered_too(tmp_path, caplog):
    detached = own({"__call__": lambda self, t: t.mean().detach()})
    with pytest.raises(UserError, match=r"the class Mistaken is no objective that alter knows: register it"):
        run_of(tmp_path, objective=detached())
    FORGET.part(detached)
    try:
        run_of(tmp_path, objective={"kind": "mistaken"})
    finally:
        del FORGET._parts["mistaken"]
    assert "The loss of the objective mistaken has no gradient" in caplog.text


def test_entropies_for_an_adapter_without_are_refused_by_what_was_given():
    FORGET.part(own({"needs": Needs(entropy=True), "__call__": lambda self, t: t.mean(only_low=True)}))
    given = {"model": "m", "forget": "f", "retain": "r", "out": "o", "lambda_": 0, "adapter": {"kind": "lora"}}
    try:
        with pytest.raises(
            ValueError, match=r"`objective.kind` mistaken needs the token entropies of `adapter.kind` alter"
        ):
            Unlearn(**given, objective={"kind": "mistaken"})
    finally:
        del FORGET._parts["mistaken"]


def test_a_comparison_refuses_a_part_that_its_cells_would_not_find(tmp_path):
    FORGET.part(own({"__call__": lambda self, t: t.mean()}))
    settings = {"mine": {"method": "lora_gd", "objective": {"kind": "mistaken"}}}
    given = {"model": "builtin:tofu-mini/original", "retrained": {"forget01": "builtin:tofu-mini/retrained"}}
    try:
        with pytest.raises(UserError, match=r"`objective.kind` mistaken is registered in this process alone"):
            alter.compare(
                methods=["mine"],
                splits=["forget01"],
                seeds=[0],
                settings=settings,
                out=tmp_path / "c",
                limit=6,
                workers=1,
                **given,
            )
    finally:
        del FORGET._parts["mistaken"]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"views": ("bass",)}, r"no view 'bass'; expected one of base, .*Did you mean 'base'"),
        ({"alternative": "refusals"}, r"no alternative 'refusals'; .*Did you mean 'refusal'"),
        ({"depth": 3}, "depth is 3; expected a share of the model's depth, from 0 to 1"),
        ({"views": ("instructed",)}, "goes with an `instruction`"),
    ],
)
def test_needs_that_no_run_can_meet_are_refused_where_they_are_written(given, says):
    with pytest.raises(UserError, match=says):
        Needs(**given)


@pytest.mark.parametrize(("made", "says"), [("{}", "gives none for"), ("sums", r"gives one of shape \[\] for")])
def test_what_a_rule_for_gradients_gives_is_checked(made, says):
    class Half(GradientRule):
        kind: Literal["half"] = "half"

        def edit(self, forget, rest, known, state):
            return {} if made == "{}" else {name: value.sum() for name, value in forget.items()}

    forget = {"a.weight": torch.ones(2, 3)}
    with pytest.raises(
        UserError, match=rf"rule half {says} a.weight; expected one for every parameter.* shape \[2, 3\]"
    ):
        Half().edited(forget, forget, {}, {})
