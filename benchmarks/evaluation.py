"""Time of TOFU's evaluation (forget10, every metric): alter beside a straightforward one, at equal numbers, in one run.

    python benchmarks/evaluation.py --threads 2

The straightforward one does what the tool that everyone compares with does: batches of 32 in the order of the data,
padded to their longest row, all logits in fp32, and one pass for each metric (answers to forget: probability, exact
memorisation, extraction strength, loss, zlib, min-k, two for min-k++, two for the reference attack; a pass for each
paraphrased and for each wrong answer); replies in batches of 32 that run until their last reply ends. Both read the
retrained model's truth ratios and AUC from its records. TOFU's holdout rows are not at hand without a network: the
forgotten questions with a wrong answer stand in, which no model saw. Prints the times and their ratios, checks that every
number is the same to 1e-6, and adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import roc_auc_score

import results
from alter.data.encoding import Encoded, encode, encode_prompt
from alter.data.rows import Example, examples
from alter.data.tofu import tofu_rows
from alter.evaluation.tofu.measuring import tofu_metrics
from alter.evaluation.tofu.results import TofuReference
from alter.models.loading import load_model

BATCH = 32
TOLERANCE = 1e-6
SETS = {"forget": "forget10_perturbed", "retain": "retain_perturbed"} | {
    name: f"{name}_perturbed" for name in ("real_authors", "world_facts")
}


# The straightforward evaluation --------------------------------------------------------------------------------------


def batches(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the log-probabilities [B, T - 1, V] of every position and the labels [B, T - 1] of the next tokens."""
    pad = tokenizer.pad_token_id
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        width = max(len(row.input_ids) for row in batch)
        ids, labels, mask = (torch.full((len(batch), width), fill) for fill in (pad, -100, 0))
        for k, row in enumerate(batch):
            n = len(row.input_ids)
            ids[k, :n], labels[k, :n], mask[k, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
        if compat:
            mask = (ids != pad).long()
        device = next(model.parameters()).device
        with torch.no_grad():
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits.float()
        yield logits[:, :-1].log_softmax(dim=-1).cpu(), labels[:, 1:]


def token_logprobs(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> list[np.ndarray]:
    out = []
    for logp, labels in batches(model, tokenizer, rows, compat):
        for own, label in zip(logp, labels, strict=True):
            own = own.gather(1, label.clamp(min=0)[:, None])[:, 0]
            out.append(own[label != -100].double().numpy())
    return out


def losses(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> np.ndarray:
    return np.array([-row.mean() for row in token_logprobs(model, tokenizer, rows, compat)])


def predictions(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> list[np.ndarray]:
    out = []
    for logp, labels in batches(model, tokenizer, rows, compat):
        for own, label in zip(logp.argmax(dim=-1), labels, strict=True):
            out.append((own == label)[label != -100][:-1].numpy())
    return out


def exact_memorization(*inputs: Any) -> float:
    return float(np.mean([right.mean() for right in predictions(*inputs) if right.size]))


def extraction_strength(*inputs: Any) -> float:
    found, compat = [], inputs[-1]
    for right in predictions(*inputs):
        n = len(right)
        k = next((k for k in range(n) if right[k:].all()), n - 1 if compat else n)
        found.append(1 - k / n if n else 0.0)
    return float(np.mean(found))


def attack_loss(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> np.ndarray:
    found = token_logprobs(model, tokenizer, rows, compat)
    return np.array([-(row if compat else row[:-1]).mean() for row in found])


def attack_zlib(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> np.ndarray:
    texts = [tokenizer.decode([t for t in row.labels if t != -100], skip_special_tokens=True) for row in rows]
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return attack_loss(model, tokenizer, rows, compat) / np.array(sizes)


def lowest(row: np.ndarray) -> float:
    return -float(np.sort(row)[: max(1, int(0.4 * len(row)))].mean())


def attack_min_k(*inputs: Any) -> np.ndarray:
    return np.array([lowest(row[:-1]) for row in token_logprobs(*inputs)])


def attack_min_k_plus_plus(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> np.ndarray:
    first = token_logprobs(model, tokenizer, rows, compat)
    found = []
    for logp, labels in batches(model, tokenizer, rows, compat):
        p = logp.exp()
        mean = (p * logp).sum(dim=-1)
        var = (p * (logp - mean[..., None]) ** 2).sum(dim=-1)
        for own, spread, label in zip(mean, var, labels, strict=True):
            row, mu, sigma = first[len(found)], own[label != -100].double(), spread[label != -100].double()
            z = (row - mu.numpy()) / np.sqrt(np.maximum(sigma.numpy(), 1e-6))
            found.append(lowest(z[:-1]))
    return np.array(found)


def attack_gradnorm(model: Any, tokenizer: Any, rows: Sequence[Encoded], compat: bool) -> np.ndarray:
    found = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits.float()
        labels = torch.tensor(row.labels)
        places = (labels[1:] != -100).nonzero()[:-1, 0]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0, places], labels[places + 1]).backward()
        found.append(np.mean([p.grad.norm().item() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return np.array(found)


def replies(model: Any, tokenizer: Any, prompts: Sequence[list[int]], compat: bool) -> list[str]:
    out = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids, mask = torch.full((len(batch), width), tokenizer.pad_token_id), torch.zeros(len(batch), width).long()
        for k, prompt in enumerate(batch):
            ids[k, width - len(prompt) :], mask[k, width - len(prompt) :] = torch.tensor(prompt), 1
        if compat:
            mask = (ids != tokenizer.pad_token_id).long()
        device = next(model.parameters()).device
        with torch.no_grad():
            new = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=200, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        out += [text.strip() for text in tokenizer.batch_decode(new[:, width:], skip_special_tokens=True)]
    return out


def straightforward(
    model: Any, retrained: Any, tokenizer: Any, reference: TofuReference, folder: str, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Return TOFU's figures by name, and the seconds of the likelihoods and of the replies."""
    compat = args.mode == "compat"
    epsilon = 1e-10 if compat else 0.0
    found: dict[str, float] = {}
    started = time.perf_counter()

    def encoded(rows: Sequence[Example], answer: Callable[[Example], str]) -> list[Encoded]:
        return [encode(tokenizer, row, answer=answer(row), compat=compat) for row in rows]

    parts = {key: examples(tofu_rows(name, folder)) for key, name in SETS.items()}
    for key, rows in parts.items():
        plain = losses(model, tokenizer, encoded(rows, lambda row: row.answer), compat)
        wrong = np.stack(
            [
                losses(model, tokenizer, encoded(rows, lambda row, j=j: row.row["perturbed_answer"][j]), compat)
                for j in range(len(rows[0].row["perturbed_answer"]))
            ],
            axis=1,
        )
        right = plain
        if key in ("forget", "retain"):
            right = losses(model, tokenizer, encoded(rows, lambda row: row.row["paraphrased_answer"]), compat)
            found[f"{key}_probability"] = float(np.exp(-plain).mean())
        else:
            p = np.exp(-plain)
            found[f"{key}_probability"] = float((p / (p + np.exp(-wrong).sum(axis=1) + epsilon)).mean())
        ratio = np.exp(-wrong.mean(axis=1)) / (np.exp(-right) + epsilon)
        if key == "forget":
            found["forget_truth_ratio"] = float(np.minimum(ratio, 1 / (ratio + epsilon)).mean())
            found["forget_quality"] = float(stats.ks_2samp(ratio, reference.truth_ratio).pvalue)
        else:
            found[f"{key}_truth_ratio"] = float(np.maximum(0, 1 - ratio).mean())
    own = encoded(parts["forget"], lambda row: row.answer)
    unseen = encoded(examples(tofu_rows("holdout10", folder)), lambda row: row.answer)
    found["forget_exact_memorization"] = exact_memorization(model, tokenizer, own, compat)
    found["forget_extraction_strength"] = extraction_strength(model, tokenizer, own, compat)
    attacks = {
        "mia_loss": attack_loss, "mia_zlib": attack_zlib, "mia_min_k": attack_min_k,
        "mia_min_k_plus_plus": attack_min_k_plus_plus,
        "mia_reference": lambda *rest: attack_loss(*rest) - attack_loss(retrained, *rest[1:]),
    }  # fmt: skip
    if args.gradnorm:
        attacks["mia_gradnorm"] = attack_gradnorm
    for name, attack in attacks.items():
        scores = [attack(model, tokenizer, rows, compat) for rows in (own, unseen)]
        labels = np.repeat([0, 1], [len(own), len(unseen)])
        found[name] = float(roc_auc_score(labels, np.concatenate(scores)))
        found[f"{name}, mean score"] = float(np.concatenate(scores).mean())
    assert reference.min_k_auc is not None
    rest = 1 - reference.min_k_auc
    found["privleak"] = (1 - found["mia_min_k"] - rest) / (rest + epsilon) * 100
    likelihood = time.perf_counter() - started

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for key, rows in parts.items():
        prompts = [encode_prompt(tokenizer, row, compat=compat) for row in rows]
        texts = replies(model, tokenizer, prompts, compat)
        recall = [scorer.score(r.answer, text)["rougeL"].recall for r, text in zip(rows, texts, strict=True)]
        found[f"{key}_rouge"] = float(np.mean(recall))
    utility = [
        found[f"{key}_{name}"]
        for key in ("retain", "real_authors", "world_facts")
        for name in ("probability", "rouge", "truth_ratio")
    ]
    found["model_utility"] = float(stats.hmean(utility))
    return found, {"likelihood": likelihood, "replies": time.perf_counter() - started - likelihood}


# Ours ----------------------------------------------------------------------------------------------------------------


def ours(
    model: Any, tokenizer: Any, reference: TofuReference, folder: str, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    started = time.perf_counter()
    given = {"split": "forget10", "data": folder, "mode": args.mode, "reference": reference, "progress": False}
    first = tofu_metrics(model, tokenizer, which=("likelihood",), gradnorm=args.gradnorm, **given)
    likelihood = time.perf_counter() - started
    whole = tofu_metrics(model, tokenizer, which=("generation",), **given)
    for key, part in whole.sets.items():
        first.sets[key].rouge = part.rouge
    made = first.records("model")
    found = {record.metric: record.value for record in made if record.value is not None}
    for record in made:
        if "scores" in record.extra:
            both = record.extra["scores"]["forget"] + record.extra["scores"]["holdout"]
            found[f"{record.metric}, mean score"] = float(np.mean(both))
    return found, {"likelihood": likelihood, "replies": time.perf_counter() - started - likelihood}


def columns(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The seconds of each part, over the runs."""
    return {part: [run[part] for run in runs] for part in (runs[0] if runs else ())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tofu-mini/original")
    parser.add_argument("--adapter", help="also time alter's evaluation with this adapter, beside the model's own")
    parser.add_argument("--retrained", default="builtin:tofu-mini/retrained")
    parser.add_argument("--mode", choices=("strict", "compat"), default="strict")
    parser.add_argument(
        "--gradnorm", action="store_true", help="with the sixth attack: a backward per row on both sides"
    )
    parser.add_argument("--rows", type=int, help="only the first so many of each set, for a quick look")
    parser.add_argument("--rounds", type=int, default=1, help="of each, in turn; medians are reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=results.FILE, help="the CSV that results are added to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    model, tokenizer = load_model(args.model, device=args.device)
    retrained, _ = load_model(args.retrained, device=args.device)
    runs: dict[str, list[dict[str, float]]] = {"straightforward": [], "alter": [], "adapter": []}
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: tofu_rows(name, "builtin")[: args.rows] for name in SETS.values()}
        parts["holdout10"] = [
            {"question": row["question"], "answer": row["perturbed_answer"][0]} for row in parts["forget10_perturbed"]
        ]
        for name, rows in parts.items():
            (Path(folder) / f"{name}.json").write_text(json.dumps(rows))
        given = {"split": "forget10", "data": folder, "mode": args.mode, "progress": False}
        reference = tofu_metrics(
            retrained, tokenizer, which=("likelihood",), sets=("forget",), **given
        ).as_reference()  # fmt: skip
        for _ in range(args.rounds):
            mine, seconds = ours(model, tokenizer, reference, folder, args)
            runs["alter"].append(seconds)
            theirs, seconds = straightforward(model, retrained, tokenizer, reference, folder, args)
            runs["straightforward"].append(seconds)
            if args.adapter:
                adapted, _ = load_model(args.model, args.adapter, device=args.device)
                runs["adapter"].append(ours(adapted, tokenizer, reference, folder, args)[1])
    worst = 0.0
    for name, value in theirs.items():
        gap = (
            abs(value - mine[name]) / max(abs(value), 1e-300) if name == "forget_quality" else abs(value - mine[name])
        )
        worst = max(worst, gap)
        print(f"{name:32s} {value:.9g} {mine[name]:.9g}" + (f"  differ by {gap:.1e}" if gap > TOLERANCE else ""))
    found = [{"variant": "alter", "metric": "largest_difference", "value": worst}]
    # each run's total is the sum of its own parts
    parts = {name: {**columns(taken), "total": [sum(run.values()) for run in taken]} for name, taken in runs.items()}
    for name, other in (("straightforward", None), ("alter", "straightforward"), ("adapter", "alter")):
        for part, seconds in parts[name].items() if runs[name] else ():
            found.append({"variant": name, "metric": f"{part}_s", **results.spread(seconds)})
            if other:
                ratio = results.ratios(seconds, parts[other][part])
                found.append({"variant": name, "metric": f"{part}_over_{other}", **ratio})
    common = {
        "benchmark": "evaluation", "hardware": results.hardware(args.device), "torch": torch.__version__,
        "shape": f"{args.model}, {args.rows or 'all'} rows a set", "dtype": str(model.dtype).removeprefix("torch."),
        "settings": f"{args.mode}" + (", gradnorm" if args.gradnorm else ""),
    }  # fmt: skip
    results.add([{**common, **row} for row in found], args.csv)
    print(f"{common['hardware']}, {common['shape']}")
    for row in found:
        print(f"{row['variant']:>15}  {row['metric']:<32} {row['value']:.4g}")
    if worst > TOLERANCE:
        raise SystemExit(f"the numbers differ by up to {worst:.1e}; expected at most {TOLERANCE}")


if __name__ == "__main__":
    main()
