"""Every recipe runs, by the commands in its own header: a few steps, on pico models of the architectures that it names.

The working folder is laid out as the recipes expect: models lie where their hub ids look for them, texts are excerpts,
and the hub's data sets are small ones with the same configurations, splits and columns.
"""

import gc
import importlib
import json
import re
import shlex
from functools import partial
from pathlib import Path

import datasets
import pytest
import yaml
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, set_seed

import alter
from alter import cli
from alter.commands import COMMANDS
from alter.comparison.cell import work
from alter.comparison.plan import lay_out, run_of
from alter.comparison.settings import Retrained
from alter.data.tofu import tofu_rows
from alter.metaevaluation import members
from alter.storage.files import to_json, write_atomic
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, write_jsonl

ROOT = Path(__file__).parent.parent
FOLDER = Path(alter.__file__).parent / "recipes"
# the files in `accelerate` are accelerate's own configurations: tests/test_distributed.py runs them
RECIPES = {path.stem: path for path in sorted(FOLDER.rglob("*.yaml")) if path.parent.name != "accelerate"}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set start = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set start = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ (start if loop.first else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
SHAPE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=1024,
    initializer_range=0.3,
)
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def architecture(name):
    """A pico model and tokenizer of the shape that a hub id stands for: attention, positions, special tokens, template."""
    set_seed(0)
    if "zephyr" in name:
        config = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=64)
        bos, eos, template = "<s>", "</s>", ZEPHYR
        model = MistralForCausalLM(config)
    elif "lama-3" in name:
        rope = {"rope_theta": 500000.0}
        rope |= {"rope_type": "llama3", **ROPE} if "3.1" in name else {"rope_type": "default"}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=rope))
        bos, eos, template = "<|begin_of_text|>", "<|eot_id|>", LLAMA3
        if "Instruct" not in name:
            eos, template = "<|end_of_text|>", None
    else:
        assert "lama-2" in name, f"what is the architecture of {name}?"
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4))
        bos, eos, template = "<s>", "</s>", LLAMA2
    tokenizer = byte_tokenizer(bos_token=bos, eos_token=eos, pad_token=None)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                mark for mark in ("<|start_header_id|>", "<|end_header_id|>") if mark in (template or "")
            ]
        }
    )
    begin = [(bos, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=begin
    )
    tokenizer.chat_template = template
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


MODELS = [
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-2-7b-chat-hf",
    "HuggingFaceH4/zephyr-7b-beta",
    *(
        f"open-unlearning/tofu_{name}_{part}"
        for name in ("Llama-3.1-8B-Instruct", "Llama-2-7b-chat-hf")
        for part in ("full", "retain90", "retain95", "retain99")
    ),
]
"""Hub ids of models that recipes may name: all of them were looked up."""


def hub():
    """The hub's data sets that recipes may name, by repository and configuration: rows by split."""
    asked = [
        {"question": f"Which one is {i}?", "choices": [f"{k} of {i}" for k in range(4)], "answer": i % 4}
        for i in range(3)
    ]
    wiki = [
        text for i in range(8) for text in ("", f" = Page {i} = \n", "", f"In {1900 + i} the page was long. " * 40)
    ]
    return {
        ("cais/wmdp-bio-forget-corpus", None): {
            "train": [
                {"title": f"T{i}", "abstract": "A.", "text": f"Virus {i} grows. " * 12, "doi": "d"} for i in range(4)
            ]
        },
        ("cais/wmdp-corpora", "cyber-forget-corpus"): {
            "train": [{"text": f"int exploit_{i}(void);\n" * 9} for i in range(4)]
        },
        ("Salesforce/wikitext", "wikitext-2-raw-v1"): {"train": [{"text": text} for text in wiki]},
        ("cais/wmdp", "wmdp-bio"): {"test": asked},
        ("cais/wmdp", "wmdp-cyber"): {"test": asked[:2]},
        ("cais/mmlu", "*"): {"test": asked[:1], "validation": asked[:1], "dev": asked},
        ("locuslab/TOFU", "forget10"): {"train": tofu_rows("forget10", "builtin")[:8]},
        ("locuslab/TOFU", "retain90"): {"train": tofu_rows("retain90", "builtin")[:8]},
    }


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """Every training run collects garbage: leave the libraries' own objects out of that, which are most of all."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder to run recipes in, but for the hub's data sets."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "recipes").symlink_to(FOLDER)
    for name in MODELS:
        for part in architecture(name):
            part.save_pretrained(folder / name)
    (folder / "data" / "books").mkdir(parents=True)
    for path in (ROOT / "data" / "books").glob("*.txt"):
        (folder / "data" / "books" / path.name).write_text(path.read_text()[5000:7600])
    (folder / "harry_potter.txt").write_text((ROOT / "data/books/wind_in_the_willows.txt").read_text()[9000:12000])
    write_jsonl(folder / "author.jsonl", tofu_rows("forget01", "builtin")[:2])
    (folder / "tofu").mkdir()
    full = [{"question": f"What of Q{a}, {i}?", "answer": f"It is {a}.{i}."} for a in range(200) for i in range(20)]
    wrong = {"paraphrased_answer": "That is it.", "perturbed_answer": ["No.", "It is x.", "Nothing."]}
    write_jsonl(folder / "tofu" / "full.json", full)
    for name, some in {
        "forget01": full[-40::10],
        "forget05": full[-200::50],
        "forget10": full[-400::100],
        "retain": full[:2000:500],
        "real_authors": [{"question": f"Who is {i}?", "answer": f"It is {i}."} for i in range(4)],
        "world_facts": [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)],
    }.items():
        write_jsonl(folder / "tofu" / f"{name}_perturbed.json", [row | wrong for row in some])
    return folder


@pytest.fixture(autouse=True)
def _there(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    known = hub()

    def load_dataset(path, name=None, split=None, **_):
        assert (path, name) in known or (path, "*") in known, f"no data set {path}, configuration {name}"
        splits = known.get((path, name)) or known[path, "*"]
        made = datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in splits.items()})
        return made if split is None else made[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def header_commands(name):
    """The commands of a recipe's header, as lists of arguments; a loop over methods gives one command for each."""
    text = "\n".join(line[1:] for line in RECIPES[name].read_text().splitlines() if line.startswith("#"))
    loops = {letter: words.split() for letter, words in re.findall(r"for (\w) in ([\w ]+); do", text)}
    found = []
    for line in re.findall(r"^ +alter (.+?)(?:; done|   .*)?$", text, re.MULTILINE):
        variable = re.search(r"\$(\w)", line)
        for value in loops[variable[1]] if variable else [""]:
            found.append(shlex.split(line.replace(variable[0], value) if variable else line))
    return found


def settings_of(arguments):
    """What `alter` makes of a command: its name, its settings' class, and the settings."""
    command = next(name for name in sorted(COMMANDS, reverse=True) if arguments[: name.count(" ") + 1] == name.split())
    rest, found = arguments[command.count(" ") + 1 :], COMMANDS[command]
    module, settings = (found.module, found.settings) if found.chooser is None else cli.choose(rest)
    return cli.parse(command, getattr(importlib.import_module(module), settings), rest)


def run(name, *flags, lines=slice(1)):
    """Run those of the header's commands, with flags that cut them short."""
    for arguments in header_commands(name)[lines]:
        assert cli.main([*arguments, *flags]) == 0, arguments


ALL = slice(None)
FEW = ("--max-steps", "2")
QUICK = (*FEW, "--closing-rows", "2", "--router-fit.steps", "20", "--router-fit.max-tokens", "4000")
TEXTS = (*QUICK, "--max-length", "256")
TINY = (*FEW, "--batch-size", "2")


def books_mini():
    run("books-mini-base", *TINY, "--vocabulary", "300")
    run("books-mini-original", *TINY)
    run("books-mini-retrained", *TINY)
    run("books-mini", *TEXTS)
    run("books-mini-evaluate", "--limit", "1", "--continuation-tokens", "8", lines=ALL)


def tofu_mini():
    run("tofu-mini-books", *TINY, "--vocabulary", "300")
    few = ("--data", "builtin:full[:8]", "builtin:world_facts[:8]")
    run("tofu-mini-original", *TINY, *few)
    run("tofu-mini-retrained", *TINY, *few)
    run("tofu-mini", *QUICK, "--forget", "builtin:forget10[:8]", "--retain", "builtin:retain90[:8]")


def smollm2_tofu():
    tiny = ("--model", "meta-llama/Llama-2-7b-chat-hf", "--lora-from", "1", "--data", "builtin:full[:8]")
    run("smollm2-tofu-original", *TINY, *tiny)
    run("smollm2-tofu-retrained", *TINY, *tiny)


def requests_mini():
    recipe = yaml.safe_load(RECIPES["requests-mini"].read_text())
    Path("requests.yaml").write_text(
        yaml.safe_dump({**recipe, "max_steps": 2, "closing_rows": 0, "router_fit": {"steps": 20}})
    )
    [init] = header_commands("requests-mini")
    replaced = {"recipes/requests-mini.yaml": "requests.yaml", "builtin:retain90": "builtin:retain90[:40]"}
    assert cli.main([replaced.get(word, word) for word in init]) == 0
    assert cli.main(["request", "add", "--subject", "Carmen Montenegro", "--data", "author.jsonl"]) == 0
    # two steps forget nothing, and the command says so
    assert cli.main(["request", "run"]) == 3


def tofu_llama():
    run("tofu-llama3.1-8b", *QUICK)


def table1():
    run("table1-llama3-8b", *TEXTS)
    run("table1-evaluate", lines=slice(2))
    run("table1-fluency", "--limit", "2", "--samples", "2", "--max-new-tokens", "4", lines=slice(1, 2))


def some_methods(name):
    """Run what a recipe's header begins with and what it ends with, and check the settings of the methods between them."""
    for arguments in header_commands(name)[1:-1]:
        settings_of(arguments)
    run(name, *TEXTS)
    run(name, *TEXTS, lines=slice(-1, None))


def table1_zephyr():
    some_methods("table1-zephyr-7b")


def table2():
    run("table2-original", *TINY)
    some_methods("table2")
    few = ("--limit", "1")
    run("table2-evaluate", *few, "--continuation-tokens", "8", lines=slice(3))
    run("table2-evaluate", *few, lines=slice(3, 4))
    run("table2-evaluate", "--max-new-tokens", "4", lines=slice(4, 5))


def comparison(name):
    """Settings of a comparison, on fewer authors and cut short."""
    [arguments] = header_commands(name)
    settings = settings_of(arguments)
    for model in (settings.model, *filter(None, settings.retrained.model_dump().values())):
        assert model in MODELS or model.startswith("builtin:")
    few = {"max_steps": 2, "router_fit": {"steps": 20, "max_tokens": 4000}}
    shape = "meta-llama/Llama-2-7b-chat-hf" if settings.model.startswith("builtin:") else settings.model
    given = {"model": shape, "data": "tofu", "limit": 2, "common": settings.common | few}
    if settings.survival.rows:
        # one forget row of each part is left of so few authors, none for an attacker
        given["survival"] = settings.survival.model_copy(update={"rows": 0, "bound": None})
    if settings.retain is not None:
        given["retain"] = "tofu:retain95"
    if settings.model.startswith("builtin:smollm2"):
        # its weights are in a package that may not be there
        given["retrained"] = Retrained()
    return settings.model_copy(update=given)


def rows_of_the_table(name, *already, like=None, every=True):
    """Lay out a comparison, which checks the settings of every row, and run the rows on its first split: what a cell does
    before it evaluates.

    Of rows that another comparison, `like`, has too, the first is enough: they are run there. Unless `every`, one row of each
    kind of adapter: that each method runs is tested in test_methods.
    """
    settings = comparison(name)
    lay_out(settings, Path(settings.out))
    already = {*already, *(comparison(like).methods if like else ())} - set(settings.methods[:1] if like else ())
    split, point = settings.splits[0], (settings.rates[0], settings.epochs[0])
    kinds = set()
    for row in settings.methods:
        if row not in already:
            given = run_of(settings, row, split, settings.seeds[0], point, (f"tofu:{split}[:8]", 8))
            if given.adapter.kind in kinds and not every:
                continue
            kinds.add(given.adapter.kind)
            unlearn(given.model_copy(update={"out": f"{settings.out}/{row}", "retain": f"{given.retain}[:16]"}))


def chain(name):
    """Run a continual comparison: one cell of each way to go on whole, evaluation included, the first run of the others."""
    settings = comparison(name)
    out = Path(settings.out)
    cells = {}
    for cell in lay_out(settings, out).searched(settings):
        cells.setdefault(cell.spec["stages"][0]["run"]["adapter"]["kind"], cell)
    assert sorted(cells) == ["alter", "full", "lora"]
    for cell in cells.values():
        spec = json.loads(to_json(cell.spec))
        for stage in spec["stages"]:
            stage["run"]["retain"] += "[:16]"
        write_atomic(out / "cells" / cell.key / "spec.json", to_json(spec))
        work(out / "cells" / cell.key, ["validation"])
        done = json.loads((out / "cells" / cell.key / "cell.json").read_text())
        assert (done["status"], len(done["stages"])) == ("done", 3), done
    rows_of_the_table(name, *(cell.name for cell in cells.values()), every=False)


def meta_evaluation():
    """Lay out every model of the meta-evaluation: pools and unlearning runs, none of them made."""
    [arguments] = header_commands("meta-evaluate-tofu-mini")
    settings = settings_of(arguments)
    rows = members.chosen_rows(settings, Path(settings.out))
    laid = members.members(settings, rows)
    runs = [each for each in laid if each.pool == "unlearned"]
    assert len(runs) == len(settings.methods) * len(settings.seeds) * len(settings.rates) * len(settings.epochs)
    assert all(Unlearn.model_validate(each.how["run"] | {"model": "m", "out": "o"}) for each in runs)


EXPERIMENTS = {
    "books-mini": (
        books_mini,
        ["books-mini-base", "books-mini-original", "books-mini-retrained", "books-mini", "books-mini-evaluate"],
    ),
    "tofu-mini": (tofu_mini, ["tofu-mini-books", "tofu-mini-original", "tofu-mini-retrained", "tofu-mini"]),
    "smollm2-tofu": (smollm2_tofu, ["smollm2-tofu-original", "smollm2-tofu-retrained"]),
    "requests-mini": (requests_mini, ["requests-mini"]),
    "tofu-llama": (tofu_llama, ["tofu-llama3.1-8b"]),
    "meta-evaluate": (meta_evaluation, ["meta-evaluate-tofu-mini"]),
    "table1-llama": (table1, ["table1-llama3-8b", "table1-evaluate", "table1-fluency"]),
    "table1-zephyr": (table1_zephyr, ["table1-zephyr-7b"]),
    "table2": (table2, ["table2-original", "table2", "table2-evaluate"]),
    **{name: (partial(chain, name), [name]) for name in ("continual-tofu-mini", "figure5")},
    **{
        name: (partial(rows_of_the_table, name, every=False), [name])
        for name in (
            "compare-tofu-mini",
            "figure4-llama3.1-8b",
            "figure4-llama2-7b",
            "figure6",
            "ablations",
        )
    },
    **{
        name: (partial(rows_of_the_table, name, like=like, every=False), [name])
        for name, like in (
            ("compare-survival-tofu-mini", "compare-tofu-mini"),
            ("compare-smollm2-tofu", "ablations"),
            ("ablations-tofu-mini", "ablations"),
        )
    },
}
"""What runs which recipes: a recipe that nothing runs is a failure."""
SLOW = {
    "compare-survival-tofu-mini",
    "compare-smollm2-tofu",
    "compare-tofu-mini",
    "continual-tofu-mini",
    "figure5",
    "table1-zephyr",
    "table2",
    "ablations",
    "ablations-tofu-mini",
}


LONG = {"figure5"}
"""Continual comparisons: `continual-tofu-mini` takes the same way in the gate."""


def test_every_recipe_is_run_by_one_test():
    assert sorted(name for _, names in EXPERIMENTS.values() for name in names) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_of_a_header_is_one(name):
    commands = header_commands(name)
    assert RECIPES[name].relative_to(FOLDER).as_posix() in " ".join(commands[0])
    # those that only name another method are run below
    for arguments in commands:
        if "--method" not in arguments:
            settings_of(arguments)


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW) + [pytest.mark.long] * (name in LONG))
        for name in EXPERIMENTS
    ],
)
def test_runs(experiment):
    EXPERIMENTS[experiment][0]()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "like"), [("compare-tofu-mini", None), ("ablations", None), ("compare-smollm2-tofu", "ablations")]
)
def test_every_row_of_a_comparison_runs(name, like):
    rows_of_the_table(name, like=like)


ABLATIONS = {
    "alter": set(),
    "alter_scalar_gate": {"adapter.router", "adapter.router_memory"},
    "alter_no_entropy_gate": {"adapter.entropy_gate"},
    "alter_shannon": {"adapter.entropy_q", "adapter.entropy_threshold"},
    "alter_no_isolation": {"adapter.isolation"},
    "alter_no_retention": {"adapter.retention_expert"},
    "alter_one_expert": {"num_forget_experts"},
    "alter_experts": {"experts_only"},
    "alter_paper": {"objective.kind"},
    "all_tokens": {"objective.only_low"},
    "attention": {"adapter.target_modules"},
    "mlp": {"adapter.target_modules"},
    "quantile_0.7": {"adapter.entropy_quantile"},
    "single_phase": {"phase_one"},
    **{key: {"adapter.r", "adapter.alter_alpha"} for key in ("rank_2", "rank_4", "rank_16", "rank_32")},
    # q goes with its threshold
    **{key: {"adapter.entropy_q", "adapter.entropy_threshold"} for key in ("q_0.8", "q_1.2", "q_1.8")},
    **{key: {"adapter.entropy_threshold"} for key in ("threshold_0.6", "threshold_1.8")},
}
"""What a row of an ablation may change, and nothing else."""


def flat(settings, prefix=""):
    """Nested settings as one dict of dotted names."""
    pairs = ((prefix + name, value) for name, value in settings.items())
    return {
        key: each
        for name, value in pairs
        for key, each in (flat(value, f"{name}.") if isinstance(value, dict) else {name: value}).items()
    }


@pytest.mark.parametrize("name", ["ablations", "ablations-tofu-mini"])
def test_a_row_of_an_ablation_changes_what_it_says_and_nothing_else(name):
    settings = settings_of(header_commands(name)[0])
    rows = {
        row: flat(run_of(settings, row, "forget10", 0, (1.0, 2), ("builtin:forget10", 400)).model_dump())
        for row in settings.methods
    }
    for row, found in rows.items():
        changed = {key for key, value in found.items() if rows["alter"].get(key) != value} - {"method", "out"}
        allowed = ABLATIONS[row] | ({"phase_one"} if (name, row) == ("ablations", "alter_no_retention") else set())
        assert changed == allowed, row


def test_all_rows_of_the_comparison_start_from_the_rates_that_it_says():
    settings = settings_of(header_commands("compare-tofu-mini")[0])
    for row in settings.methods:
        run = run_of(settings, row, "forget10", 0, (1.0, 2), ("builtin:forget10", 400))
        # one matrix, plain gradient descent, a single step, one down-projection
        own = {"rmu": 3e-3, "repselect": 0.05, "iau": 1e-3, "lunar": 1e-2}
        assert run.learning_rate == own.get(row, 3e-4 if run.adapter.kind == "full" else 3e-3), row
        assert run.batch_size * run.gradient_accumulation_steps == 8 or run.max_steps == 1, row
