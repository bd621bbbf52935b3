"""Erasure requests one after another, and under kill -9: what a year of them does to a model, and to the database.

    python benchmarks/requests.py ten            # ten of TOFU's authors, one request each; the fourth is taken back
    python benchmarks/requests.py kills          # kill -9 at 50 random moments of `alter request run`

Both use tofu-mini and print a table; `ten` adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

import results
from alter.data.encoding import encode_prompt
from alter.data.rows import load_examples
from alter.inference.generation import generate
from alter.models.loading import load_model
from alter.requests.bases import present
from alter.requests.commands import Revoke, RunRequests, revoke, run
from alter.requests.intake import Add, Init, add, init
from alter.requests.records import IN_FORCE
from alter.requests.store import Store
from alter.requests.verification import Verify, verify
from alter.requests.versions import manifest

HERE = Path(__file__).parent
ORIGINAL, RETRAINED = "builtin:tofu-mini/original", "builtin:tofu-mini/retrained"


def authors(folder: Path, count: int) -> list[Path]:
    """One file of rows per author, from forget10."""
    rows = load_examples("builtin:forget10")
    files = []
    for number in range(count):
        file = folder / f"author-{number}.jsonl"
        lines = [json.dumps(example.row) for example in rows[20 * number : 20 * number + 20]]
        file.write_text("\n".join(lines) + "\n")
        files.append(file)
    return files


def answers(model: Any, tokenizer: Any, file: Path) -> list[str]:
    """Greedy answers to the questions of a file."""
    prompts = [encode_prompt(tokenizer, example) for example in load_examples(str(file))]
    return generate(model, tokenizer, prompts, max_new_tokens=100, progress=False)


def ten(folder: Path, csv: Path) -> None:
    """Ten requests, each its own run; then the fourth is revoked."""
    url = f"sqlite:///{folder}/requests.db"
    files = authors(folder, 10)
    init(
        Init(
            db=url,
            model=ORIGINAL,
            retain="builtin:retain90",
            retrained=RETRAINED,
            folder=str(folder / "work"),
            recipe=str(HERE.parent / "recipes" / "requests-mini.yaml"),
        )
    )
    seconds = []
    before_fourth: list[str] = []
    for number, file in enumerate(files):
        add(Add(db=url, subject=f"author {number + 1}", data=str(file)))
        if number == 3:
            model, tokenizer = load_model(ORIGINAL, str(folder / "work" / "adapter"))
            before_fourth = answers(model, tokenizer, file)
        started = time.perf_counter()
        run(RunRequests(db=url))
        seconds.append(time.perf_counter() - started)
    store = Store.open(url)
    project = present(store)
    found = verify(Verify(db=url))
    common = {
        # `run` takes the GPU if there is one
        "benchmark": "requests", "hardware": results.hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__, "shape": f"{ORIGINAL}, 10 requests",
    }  # fmt: skip
    rows = []
    for request in store.requests(*IN_FORCE):
        assert request.after is not None
        assert request.run is not None
        reference = request.after["reference"]["rouge"]
        figures = {
            "seconds": seconds[request.id - 1],
            "train_seconds": float(request.run["seconds"]["train"]),
            "rouge_when_done": request.after["rouge"],
            "rouge_after_ten": found[request.name]["rouge"],
            "rouge_retrained": reference,
            "forgotten": int(request.state == "forgotten"),
            "utility_share": request.after["utility_share"],
        }
        print(request.name, *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ")
        named = {**common, "variant": str(request.id)}
        rows += [{**named, "metric": name, "value": value} for name, value in figures.items()]
    results.add(rows, csv)
    print(f"utility after ten: {found['utility']['share']:.4f} of the untouched model")
    half = len(seconds) // 2
    print(f"seconds of the last five over the first five: {sum(seconds[half:]) / sum(seconds[:half]):.3f}")
    revoke(Revoke(db=url, id="4"))
    model, tokenizer = load_model(ORIGINAL, str(project.adapter))
    with model.disable_adapter():
        plain = answers(model, tokenizer, files[3])
    after = answers(model, tokenizer, files[3])
    same = sum(a == b for a, b in zip(after, plain, strict=True))
    again = sum(a == b for a, b in zip(after, before_fourth, strict=True))
    print(f"revoked: {same} of {len(plain)} answers are the base model's, {again} those from before request 4")
    left = verify(Verify(db=url))
    still = [name for name, values in left.items() if name != "utility"]
    print(f"the other {len(still)}: ROUGE-L", [round(left[name]["rouge"], 3) for name in still])


def kills(folder: Path, count: int, seed: int) -> None:
    """Kill `alter request run` at random moments and look at everything after each."""
    moments = random.Random(seed)
    files = authors(folder, 12)
    retain = folder / "retain.jsonl"
    retain.write_text("\n".join(json.dumps(row.row) for row in load_examples("builtin:retain90")[:60]) + "\n")
    recipe = {"epochs": 2, "batch_size": 10, "save_steps": 1, "router_fit": {"steps": 50}, "reference_top_k": 16}
    recipe |= {"adapter": {"r": 2}, "objective": {"kind": "without_truth"}, "device": "cpu"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    url = f"sqlite:///{folder}/requests.db"
    store = init(
        Init(
            db=url, model=ORIGINAL, retain=str(retain), folder=str(folder / "work"), recipe=str(folder / "recipe.yaml")
        )
    )
    project = present(store)
    base, _ = load_model(ORIGINAL)
    command = [sys.executable, "-m", "alter", "request", "run", "--db", url]
    waiting = list(enumerate(files))
    add(Add(db=url, subject="author 0", data=str(waiting.pop(0)[1])))
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    usual = time.perf_counter() - started
    states: dict[str, int] = {}
    killed = done = 0
    while killed < count:
        if not store.requests("received", "running", "failed"):
            if not waiting:
                waiting = []
                break
            number, file = waiting.pop(0)
            add(Add(db=url, subject=f"author {number}", data=str(file)))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.2, 1.1) * usual)
            done += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        wrong = store.check_chain()
        assert not wrong, wrong
        inside = manifest(project)
        model = PeftModel.from_pretrained(base, str(project.adapter))
        assert model.peft_config["default"].num_forget_experts == len(inside["experts"])
        base = model.unload()
        assert len(set(inside["experts"].values())) == len(inside["experts"]), "a request has two experts"
        for request in store.requests():
            states[request.state] = states.get(request.state, 0) + 1
    subprocess.run(command, capture_output=True)
    final = store.requests()
    experts = manifest(project)["experts"]
    assert all(request.state in IN_FORCE for request in final), [request.state for request in final]
    assert sorted(experts.values()) == [request.name for request in final]
    assert not store.check_chain()
    interrupted = sum(entry.what == "interrupted" for entry in store.history())
    recovered = sum(entry.what == "recovered" for entry in store.history())
    print(f"{killed} kills, {done} runs ended by themselves (one takes {usual:.1f} s)")
    print(
        f"{len(final)} requests: all done, each with one expert; {interrupted} begun again, {recovered} finished afterwards"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ten", "kills"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--csv", type=Path, default=results.FILE, help="the CSV that the results of `ten` are added to"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "ten":
            ten(Path(folder), options.csv)
        else:
            kills(Path(folder), options.kills, options.seed)


if __name__ == "__main__":
    main()
