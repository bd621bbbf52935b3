"""Load on `alter serve`: N clients for S seconds; every answer equal to the one that a lone client got; memory.

    python benchmarks/serve.py --adapter runs/demo/adapter --clients 16 --seconds 120

The server is a process of its own on the loopback address and ends with the benchmark. Adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import torch

import results
from alter.data.rows import load_examples


def ask(client: openai.OpenAI, question: str, tokens: int) -> str:
    """One greedy answer."""
    reply = client.chat.completions.create(
        model="served", messages=[{"role": "user", "content": question}], max_tokens=tokens, temperature=0
    )
    return reply.choices[0].message.content or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:tofu-mini/original")
    parser.add_argument("--adapter")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    options = parser.parse_args()
    command = [sys.executable, "-m", "alter", "serve", "--model", options.model, "--port", "0", "--name", "served"]
    command += ["--adapter", options.adapter] if options.adapter else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    address = next(line.split(" answers at ")[1].split()[0] for line in server.stderr if " answers at " in line)
    process = psutil.Process(server.pid)
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    questions = [example.prompt or "" for example in load_examples("builtin:forget10")[::10]]
    try:
        alone = time.perf_counter()
        single = {question: ask(client, question, options.tokens) for question in questions}
        alone = time.perf_counter() - alone
        end = time.time() + options.seconds

        def work(seed: int) -> tuple[int, int, list[str]]:
            own, done, other, errors = random.Random(seed), 0, 0, []
            while time.time() < end:
                question = own.choice(questions)
                try:
                    other += ask(client, question, options.tokens) != single[question]
                    done += 1
                except openai.OpenAIError as error:
                    errors.append(repr(error))
            return done, other, errors

        memory = []
        with ThreadPoolExecutor(options.clients) as pool:
            running = [pool.submit(work, seed) for seed in range(options.clients)]
            while time.time() < end:
                memory.append(process.memory_info().rss / 2**20)
                time.sleep(2)
            outcomes = [future.result() for future in running]
    finally:
        server.terminate()
        server.wait(60)
    answers, differ = (sum(outcome[i] for outcome in outcomes) for i in (0, 1))
    errors = [error for outcome in outcomes for error in outcome[2]]
    third = max(1, len(memory) // 3)
    figures = {
        "answers": answers,
        "errors": len(errors),
        "other_than_alone": differ,
        "answers_per_second": answers / options.seconds,
        "alone_per_second": len(questions) / alone,
        "memory_first_third_mib": sum(memory[:third]) / third,
        "memory_last_third_mib": sum(memory[-third:]) / third,
    }
    common = {
        # the server takes the GPU if there is one
        "benchmark": "serve", "hardware": results.hardware("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__, "shape": f"{options.model}, {options.clients} clients",
        "settings": f"{options.seconds:g} s", "variant": "adapter" if options.adapter else "model",
    }  # fmt: skip
    results.add([{**common, "metric": name, "value": value} for name, value in figures.items()], options.csv)
    print(*common.values(), sep=", ")
    for name, value in figures.items():
        print(f"{name:24} {value:.5g}")
    print(*errors[:3], sep="\n")
    # a benchmark that finds wrong answers must not look like one that found none
    raise SystemExit(1 if errors or differ else 0)


if __name__ == "__main__":
    main()
