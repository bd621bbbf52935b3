"""Run PEFT's own tests against ALTER: `python tests/peft_suite.py FOLDER [pytest options]`.

FOLDER is the `tests` folder of PEFT's source distribution, of the version that is installed:
`pip download --no-binary :all: --no-deps peft==<version>`. Nothing of it is part of this project, and none of its files
is edited: the parametrisations of its test functions, which list PEFT's methods, are replaced by ALTER's. Tests that
merge weights run with router="static" only, since a routed adapter cannot be merged (`NotImplementedError`); all others
run with the learned router too. Models for the decoder tests are random and made on the spot.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

FOLDER = "PEFT_TESTS"
FILES = ("test_config.py", "test_custom_models.py", "test_decoder_models.py", "test_quantization.py")
ON_THE_HUB = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")


def cases() -> dict[str, list[Any]]:
    """ALTER's entries for PEFT's parametrisation lists, by the name of the list."""
    from alter import AlterConfig

    lists: dict[str, list[Any]] = {
        "ALL_CONFIG_CLASSES": [(AlterConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(AlterConfig, {})],
        "ALL_PEFT_CONFIG_CLASSES": [AlterConfig],
        "TEST_CASES": [],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [],
        "ALL_CONFIGS": [],
        "QUANTIZED": [],
    }
    for router in ("learned", "static"):
        common = {"router": router, "num_forget_experts": 2}
        mlp = {**common, "r": 2}
        for title, model, extra in (
            ("MLP 1", "MLP", {"target_modules": "lin0"}),
            ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
            ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
            ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
            ("MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("MLP 6", "MLP", {"target_modules": ["lin0"], "alter_alpha": 4, "alter_dropout": 0.1}),
            ("Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1}),
        ):
            lists["TEST_CASES"].append((f"{title} ALTER {router}", model, AlterConfig, {**mlp, **extra}))
        for title, second in (("Same", "lin0"), ("Different", "lin1")):
            pair = [{**mlp, "target_modules": [name], "init_weights": False} for name in ("lin0", second)]
            lists["MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"].append(
                (f"ALTER {router} {title}", "alter", AlterConfig, *pair)
            )
        lists["ALL_CONFIGS"].append((AlterConfig, {**common, "task_type": "CAUSAL_LM", "r": 4}))
        lists["QUANTIZED"].append((AlterConfig, {**common, "r": 2}))
    return lists


def make_models(folder: Path) -> list[str]:
    """Random tiny decoders, saved under `folder`; their paths. The names tell PEFT's tests what to skip."""
    import transformers

    sizes = {"vocab_size": 1024, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    gpt2 = {"vocab_size": 1024, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 512, "rotary_dim": 4}
    opt = {**sizes, "word_embed_proj_dim": 16, "ffn_dim": 32}
    kinds = {
        "OPTForCausalLM": ("OPTConfig", opt),
        "GPT2LMHeadModel": ("GPT2Config", gpt2),
        "GPTJForCausalLM": ("GPTJConfig", gpt2),
        "LlamaForCausalLM": ("LlamaConfig", sizes),
        "Qwen2ForCausalLM": ("Qwen2Config", sizes),
        "Gemma3ForCausalLM": ("Gemma3TextConfig", sizes),
    }
    paths = []
    for name, (config, values) in kinds.items():
        path = folder / f"tiny-random-{name}"
        paths.append(str(path))
        if not path.exists():
            kind = getattr(transformers, config)(**values, **special)
            getattr(transformers, name)(kind).save_pretrained(path)
    return paths


class Retarget:
    """pytest plugin that swaps the parametrisations, and leaves out what does not apply."""

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> None:
        for function in vars(obj).values() if isinstance(obj, type) else [obj]:
            marks = getattr(function, "pytestmark", None)
            if isinstance(marks, list) and not hasattr(function, "_alter"):
                function.pytestmark = [self.swap(collector.obj, function, mark) for mark in marks]

    def swap(self, module: Any, function: Any, mark: Any) -> Any:
        if mark.name != "parametrize":
            return mark
        for name, values in self.lists.items():
            listed = getattr(module, "TEST_CASES" if name == "QUANTIZED" else name, None)
            quantised = module.__name__.endswith("test_quantization")
            if listed is None or (name in ("QUANTIZED", "TEST_CASES") and (name == "QUANTIZED") != quantised):
                continue
            if mark.args[1] is listed or (name != "TEST_CASES" and mark.args[1] == listed):
                function._alter = True
                options = {key: value for key, value in mark.kwargs.items() if key != "ids"}
                return pytest.mark.parametrize(mark.args[0], values, **options).mark
        if mark.args[0] == "model_id" and mark.args[1] is getattr(module, "PEFT_DECODER_MODELS_TO_TEST", None):
            return pytest.mark.parametrize("model_id", self.models).mark
        return mark

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        keep, drop = [], []
        for item in items:
            learned = "'router': 'learned'" in str(item.callspec.params if hasattr(item, "callspec") else "")
            merges = learned and "merge" in inspect.getsource(item.function)
            applies = hasattr(item.function, "_alter") and item.originalname not in ON_THE_HUB and not merges
            (keep if applies else drop).append(item)
        config.hook.pytest_deselected(items=drop)
        items[:] = keep

    def __init__(self) -> None:
        self.lists = cases()
        self.models = make_models(Path(os.environ[FOLDER]).parent)


def pytest_configure(config: Any) -> None:
    """Called in every process of pytest-xdist, which loads this file as a plugin."""
    for name, member in (("diffusers", "StableDiffusionPipeline"), ("parameterized", "parameterized")):
        if importlib.util.find_spec(name) is None:
            # imported by PEFT's test helpers, and used by none of the tests that run here
            stub = types.ModuleType(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            setattr(stub, member, type(member, (), {}))
            sys.modules[name] = stub
    config.pluginmanager.register(Retarget())


def main() -> int:
    """Copy the tests to a temporary package, and run them."""
    if len(sys.argv) < 2 or not Path(sys.argv[1], FILES[0]).is_file():
        print(f"Usage: python {sys.argv[0]} FOLDER [pytest options]; FOLDER holds PEFT's {FILES[0]}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "peft_tests")
        shutil.copytree(sys.argv[1], folder)
        (folder / "__init__.py").touch()
        make_models(folder.parent)
        os.environ |= {FOLDER: str(folder), "HF_HUB_OFFLINE": "1"}
        paths = [str(folder / name) for name in FILES]
        sys.path.insert(0, str(Path(__file__).parent))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        options = ["-q", "-p", "peft_suite", "-c", os.devnull, "--rootdir", scratch, *sys.argv[2:]]
        return int(pytest.main([*paths, *options]))


if __name__ == "__main__":
    sys.exit(main())
