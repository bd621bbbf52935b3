"""Whether two revisions compute the same, to the bit: for a change that is to change no number.

    python benchmarks/equality.py main .                   # a revision of git, or a folder that holds src/alter, on each side
    python benchmarks/equality.py main . --jobs npo router    # only these
    python benchmarks/equality.py main . --work kept          # later: equality.py kept/old/results OTHER

Each side runs the same commands, one thread, without a cache, in a folder of its own, on a model of a few thousand weights
and rows that are made from a seed:

* every preset for `--steps` steps (those for models with experts on a mixture of them), with the router of `logistic`;
* router: the router's fit as the default has it, by discriminant and by logistic regression;
* rows: `alter evaluate --benchmark rows` on the model and the adapter of the default preset;
* demo: the demo's recipe, five steps on the shipped model, and TOFU's metrics on four rows of each set.

Then every file that both sides wrote is compared: tensors by their bytes, JSON and YAML value by value, other files by their
bytes. Times (`TIMES`), and what says which revision and library made a result (`MADE_BY`), may differ; cards (README.md) are
text for readers and are left out. A job that one side cannot run, a file or a value that one side lacks, and a job that fails
are differences. The exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second", "measured"}
MADE_BY = {"alter", "commit"}
SMALL: dict[str, dict[str, Any]] = {
    "altpo": {"objective": {"new_tokens": 3}},
    "elm": {"adapter": {"r": 4}, "objective": {"new_tokens": 3}},
    "reglu": {"adapter": {"r": 4, "alpha": 8}, "initializer": {"rows": 4, "retain_rank": 3}},
    "sae_guided": {"objective": {"sae_steps": 20}},
    "e2urec": {"retain_after": 1 / 3},
}
"""What is too large for a model that is 32 wide, or for three steps."""
FIT = {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 20}
DEFAULT = "alter_bounded"
DATA = {"forget": "data/forget.jsonl", "retain": "data/retain.jsonl"}


def make_data(folder: Path) -> None:
    """Make the models and rows that all jobs read."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from pico import EOS, PAD, VOCAB, byte_tokenizer, save_pico, write_people

    folder.mkdir(parents=True)
    save_pico(folder / "model", max_position_embeddings=256)
    torch.manual_seed(0)
    mixture = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, num_experts_per_tok=2,
        num_local_experts=4, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    MixtralForCausalLM(mixture).save_pretrained(folder / "experts")
    byte_tokenizer().save_pretrained(folder / "experts")
    write_people(folder, ("Ada", "Bo"), 3, 9)


def jobs(package: Path, steps: int) -> dict[str, list[list[str]]]:
    """Return the command lines of every job of the revision that is imported; recipes are written beside them."""
    from alter.methods.presets import METHODS

    made: dict[str, list[list[str]]] = {}
    Path("recipes").mkdir()

    def run(name: str, method: str, **changes: Any) -> list[str]:
        recipe = {
            "method": method,
            "model": "data/experts" if method == "seuf" else "data/model",
            **DATA,
            "domain_column": "who",
            "out": name,
            "device": "cpu",
            "epochs": 1,
            "max_steps": steps,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "closing_rows": 0,
            "reinforcement": {"epochs": 2, "learning_rate": 1e-2},
            "router_fit": FIT,
            **SMALL.get(method, {}),
            **changes,
        }
        place = Path("recipes") / f"{name.replace('/', '-')}.yaml"
        place.write_text(json.dumps(recipe))
        return ["unlearn", str(place)]

    for method in METHODS:
        one = {"domain_column": None} if method == "alter_one_expert" else {}
        made[method] = [run(method, method, **one)]
    for method in ("discriminant", "logistic"):
        fit = {"router_fit": {"method": method}, "max_steps": 1, "closing_rows": 0}
        made.setdefault("router", []).append(run(f"router/{method}", DEFAULT, **fit))
    on_rows = ["evaluate", "--benchmark", "rows", "--model", "data/model", "--device", "cpu", "--max-new-tokens", "20"]
    on_rows += [part for name, path in DATA.items() for part in (f"--{name}", path)]
    made["rows"] = [
        [*on_rows, "--json", "rows/before.json"],
        [*on_rows, "--adapter", f"{DEFAULT}/adapter", "--json", "rows/after.json"],
    ]
    recipe = str(package / "recipes" / "tofu-mini.yaml")
    on_tofu = [
        "--model",
        "builtin:tofu-mini/original",
        "--adapter",
        "demo/run/adapter",
        "--limit",
        "4",
        "--device",
        "cpu",
    ]
    made["demo"] = [
        ["unlearn", recipe, "--max-steps", "5", "--closing-rows", "4", "--device", "cpu", "--out", "demo/run"],
        ["evaluate", "--benchmark", "tofu", "--split", "forget10", *on_tofu, "--json", "demo/tofu.json"],
    ]
    return made


def run_jobs(steps: int, chosen: list[str]) -> None:
    """Run the jobs here and write each one's exit statuses to `status.json`; what they print goes to `log`."""
    import torch

    import alter
    from alter.cli import main as alter_main

    torch.set_num_threads(1)
    status: dict[str, list[int]] = {}
    with open("log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        for name, commands in jobs(Path(str(alter.__file__)).parent, steps).items():
            if chosen and name not in chosen:
                continue
            status[name] = []
            for command in commands:
                print("\n$ alter", *command, flush=True)
                try:
                    status[name].append(alter_main(command))
                except SystemExit as error:
                    status[name].append(int(error.code or 0))
            print(name, status[name], file=sys.__stderr__, flush=True)
    Path("status.json").write_text(json.dumps(status))


@dataclass
class Found:
    """What the comparison of one job found."""

    files: int = 0
    tensors: int = 0
    values: int = 0
    differences: list[str] = field(default_factory=list)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of everything in a JSON value, but for times and what made it."""
    if isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in TIMES | MADE_BY:
                yield from leaves(part, f"{where}.{name}" if where else str(name))
        if not value:
            yield where, value
    else:
        yield where, value


def same(a: Any, b: Any) -> bool:
    """Tell whether two JSON values are the same: floats by their bits, so that 0 is not -0, and nan is nan."""
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and bool(a == b)


def compare_values(found: Found, name: str, a: Any, b: Any) -> None:
    """Compare two JSON values, leaf by leaf."""
    first, second = dict(leaves(a)), dict(leaves(b))
    found.values += len(first.keys() | second.keys())
    for place in sorted(first.keys() | second.keys()):
        if place not in second or place not in first:
            found.differences.append(f"{name}: {place} only {'before' if place in first else 'after'}")
        elif not same(first[place], second[place]):
            found.differences.append(f"{name}: {place} {str(first[place])[:60]!r} -> {str(second[place])[:60]!r}")


def compare_tensors(found: Found, name: str, a: Path, b: Path) -> None:
    """Compare two safetensors files, tensor by tensor: dtype, shape and every byte."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(str(a)), load_file(str(b))
    found.tensors += len(first.keys() | second.keys())
    for key in sorted(first.keys() | second.keys()):
        if key not in second or key not in first:
            found.differences.append(f"{name}: tensor {key} only {'before' if key in first else 'after'}")
            continue
        x, y = first[key], second[key]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            found.differences.append(f"{name}: tensor {key} {x.dtype}{list(x.shape)} -> {y.dtype}{list(y.shape)}")
        elif not torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8)):
            most = float((x.double() - y.double()).abs().max())
            found.differences.append(f"{name}: tensor {key} differs, by {most:.3g} at most")


def compare_file(found: Found, name: str, a: Path, b: Path) -> None:
    """Compare one file of both sides by what it holds."""
    import yaml

    found.files += 1
    if a.suffix == ".safetensors":
        compare_tensors(found, name, a, b)
    elif a.suffix == ".json":
        compare_values(found, name, json.loads(a.read_text()), json.loads(b.read_text()))
    elif a.suffix == ".yaml":
        compare_values(found, name, yaml.safe_load(a.read_text()), yaml.safe_load(b.read_text()))
    elif a.read_bytes() != b.read_bytes():
        found.differences.append(f"{name}: the bytes differ")


def compare(name: str, old: Path, new: Path, status: list[dict[str, list[int]]]) -> Found:
    """Compare all files that one job wrote into its folder."""
    found = Found()
    before, after = (side.get(name) for side in status)
    if before != after or any(before or [1]):
        found.differences.append(f"exit statuses {before} -> {after}")
    names: set[str] = set()
    for side in (old, new):
        files = [path for path in (side / name).rglob("*") if path.is_file() and path.name != "README.md"]
        names |= {str(path.relative_to(side)) for path in files}
    for each in sorted(names):
        there = [(side / each).exists() for side in (old, new)]
        if all(there):
            compare_file(found, each, old / each, new / each)
        else:
            found.differences.append(f"{each}: only {'before' if there[0] else 'after'}")
    return found


def tree_of(wanted: str, work: Path) -> Path:
    """Return the folder of a revision's source: the one given, or an export of a git revision."""
    if (Path(wanted) / "src" / "alter").is_dir():
        return Path(wanted).resolve()
    place = work / "tree"
    place.mkdir(parents=True)
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", wanted, "src"], capture_output=True)
    if packed.returncode:
        sys.exit(f"{wanted} is no folder with src/alter, and no revision: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(place)], input=packed.stdout, check=True)
    return place


def run_side(wanted: str, work: Path, data: Path, arguments: argparse.Namespace) -> Path:
    """Run all jobs with one revision; return the folder of what they wrote. One that is such a folder is taken as it is."""
    if (Path(wanted) / "status.json").is_file():
        return Path(wanted).resolve()
    tree = tree_of(wanted, work)
    side = work / "results"
    side.mkdir(parents=True)
    shutil.copytree(data, side / "data")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALTER_")}
    environment |= {
        "PYTHONPATH": str(tree / "src"),
        "ALTER_CACHE": "off",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--side", "--steps", str(arguments.steps), "--jobs", *arguments.jobs]
    subprocess.run(command, cwd=side, env=environment, check=True)
    return side


def main() -> int:
    """Run both sides, print the table and the first differences; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "old", nargs="?", help="a folder that holds src/alter, a revision, or results that --work kept"
    )
    parser.add_argument("new", nargs="?", default=".", help="the same of the other side (default: this folder)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each preset")
    parser.add_argument(
        "--jobs", nargs="*", default=[], help="presets, router, rows (needs alter_bounded), demo; default: all"
    )
    parser.add_argument(
        "--work", type=Path, help="an empty folder to keep all results in; default: one that is deleted"
    )
    parser.add_argument("--most", type=int, default=5, help="differences to show of each job")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_jobs(arguments.steps, arguments.jobs)
        return 0
    if arguments.old is None:
        parser.error("give two revisions or folders")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        make_data(work / "data")
        sides = [
            run_side(wanted, work / name, work / "data", arguments)
            for name, wanted in (("old", arguments.old), ("new", arguments.new))
        ]
        status = [json.loads((side / "status.json").read_text()) for side in sides]
        total = Found()
        print(f"{'job':<28} {'files':>6} {'tensors':>8} {'values':>8} {'differences':>12}")
        for name in dict.fromkeys([*status[0], *status[1]]):
            found = compare(name, *sides, status)
            print(f"{name:<28} {found.files:>6} {found.tensors:>8} {found.values:>8} {len(found.differences):>12}")
            for difference in found.differences[: arguments.most]:
                print(f"    {difference}")
            total.files += found.files
            total.tensors += found.tensors
            total.values += found.values
            total.differences += found.differences
        print(f"{'all':<28} {total.files:>6} {total.tensors:>8} {total.values:>8} {len(total.differences):>12}")
        return 1 if total.differences or not total.files else 0


if __name__ == "__main__":
    sys.exit(main())
