"""Ask the probes of an `alter forget` run of GGUF files of its erased weights, in a real llama.cpp, and print what comes back.

alter forget "Harry Potter" --model builtin:smollm2 --out runs/potter --erase
alter export --model runs/potter/erased/model --type q4_1 --out potter-q4_1.gguf
npm install --prefix llama node-llama-cpp@3.22.1
python benchmarks/gguf_probes.py runs/potter potter-q4_1.gguf --modules llama/node_modules
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from alter.data.encoding import encode_prompt
from alter.data.rows import Example
from alter.forgetting.measure import Outcome
from alter.forgetting.speaker import read_jsonl

READER = Path(__file__).parents[1] / "tests" / "llama_cpp.mjs"


def said_by(modules: Path, file: Path, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Return llama.cpp's greedy continuations of lists of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "asked.json"
        asked.write_text(json.dumps([{"prompt": prompt, "tokens": tokens} for prompt in prompts]))
        command = ["node", str(READER), str(modules), str(file), str(asked)]
        return [row["said"] for row in json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)]


def compared(
    probes: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]], answers: Sequence[str]
) -> list[tuple[str, int, int]]:
    """Return what was asked, of how many, and how many: probes with a fact, first names still said, answers as the checkpoint's."""
    rows = [*probes, *kept]
    same = sum(row["after"] == answer for row, answer in zip(rows, answers, strict=True))
    told = [{**row, "after": answer} for row, answer in zip(rows, answers, strict=True)]
    outcome = Outcome(told[: len(probes)], told[len(probes) :])
    rate = outcome.rates()["all probes"]
    lines = [("probes answered with a known fact", rate.n, rate.after)]
    lines += [
        (f"first names still said, {form}", each.named, each.said) for form, each in outcome.kept_rates().items()
    ]
    return [*lines, ("answers equal to the checkpoint's", len(rows), same)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask every file, and print a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of alter forget --erase")
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files of its weights")
    parser.add_argument("--modules", type=Path, required=True, help="node_modules with node-llama-cpp")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer, as in the run")
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.run / "erased" / "model")
    probes, kept = (read_jsonl(given.run / name) for name in ("probes.jsonl", "kept.jsonl"))
    prompts = [encode_prompt(tokenizer, Example(row["prompt"], "a", "qa")) for row in (*probes, *kept)]
    print("| file | asked | of | count |\n|---|---|---:|---:|")
    for file in given.files:
        said = said_by(given.modules, file, prompts, given.tokens)
        answers = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        for what, of, count in compared(probes, kept, answers):
            print(f"| {file.name} | {what} | {of} | {count} |", flush=True)


if __name__ == "__main__":
    main()
