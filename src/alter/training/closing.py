"""The end of `alter unlearn`: load the result from disk, measure it beside the base, and state the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alter.core import forked, give_back, processes, show, warn
from alter.data import load_examples
from alter.evaluation import (
    RowsEvaluation,
    closing_of,
    measured,
    ordinary_loss,
    ordinary_sentence,
    refuse_missed,
    show_closing,
)
from alter.storage import read_object, to_json, write_atomic, write_records
from alter.training.own import OWN
from alter.training.run import unlearn
from alter.training.settings import Unlearn


def command(run: Unlearn) -> Path:
    """Run `alter unlearn`: train, then `closing`; returns the run's folder.

    Raises:
        UserError: see `unlearn` and `closing`.
        Finding: `must_forget` is set, and it was not forgotten or the model collapsed.
    """
    out = unlearn(run)
    give_back()
    with forked.allowed():
        closed = closing(run, out) if run.closing_rows else None
    if run.must_forget and closed is not None:
        refuse_missed(closed["verdict"], out)
    return out


def closing(run: Unlearn, out: Path) -> dict[str, Any] | None:
    """Measure a run's result, print before and after with the verdict, and write `records.json` in its folder.

    What an adapter costs on ordinary text joins `run.json` as `ordinary_loss`.

    The records hold figures alone, no question, answer or reply. Under several processes nothing is measured: the
    command for it is printed.

    Args:
        run: the settings; `closing_rows` rows of each set are scored and answered.
        out: the run's folder.

    Returns:
        what `alter.evaluation.closing.closing_facts` gives, or None where nothing was measured.

    Raises:
        UserError: the result does not load, its weights are not finite, or rows cannot be scored.
    """
    kind = "model" if (out / "model").is_dir() else "adapter"
    settings = RowsEvaluation(
        model=str(out / "model") if kind == "model" else run.model,
        adapter=str(out / "adapter") if kind == "adapter" else None,
        before=run.model if kind == "model" or run.start_from is not None else None,
        forget=run.forget,
        retain=run.retain or str(out / OWN),
        holdout=run.watch.holdout,
        quantization=run.quantization,
        chat_template_kwargs=run.chat_template_kwargs,
        device=run.device,
        limit=run.closing_rows,
        seed=run.seed,
        max_new_tokens=100,
        cache="off",
    )
    if processes.launched() > 1:
        warn(f"To see whether it was forgotten: {_evaluate(settings, out)}")
        return None
    # shown on the screen, where who runs this sees the data anyway; what is written keeps no text
    shown = closing_of(records := measured(settings))
    write_records(out / "records.json", [replace(record, extra=_without_texts(record.extra)) for record in records])
    if shown is not None:
        show_closing(shown, next_commands(run, out, settings, shown))
    if kind == "adapter":
        model, tokenizer = settings.load()
        if hasattr(model, "disable_adapter"):
            cost = ordinary_loss(model, tokenizer, load_examples(run.forget))
            show(ordinary_sentence(cost))
            record = read_object(out / "run.json", "what alter unlearn wrote")
            write_atomic(out / "run.json", to_json({**record, "ordinary_loss": cost}))
    return shown


def _without_texts(extra: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in extra.items() if key not in ("questions", "references", "generations")}
    if "closing" in plain:
        rows = [
            {key: value for key, value in row.items() if key not in ("question", "truth", "reply")}
            for row in plain["closing"]["worst"]
        ]
        plain["closing"] = {**plain["closing"], "worst": rows}
    return plain


def _evaluate(settings: RowsEvaluation, out: Path) -> str:
    named = {
        "model": settings.model,
        "adapter": settings.adapter,
        "before": settings.before,
        "forget": settings.forget,
        "retain": settings.retain,
        "holdout": settings.holdout,
        "json": str(out / "after.json"),
    }
    given = [f" --{name} {shlex.quote(value)}" for name, value in named.items() if value is not None]
    if settings.chat_template_kwargs:
        given.append(f" --chat-template-kwargs {shlex.join(settings.chat_template_kwargs)}")
    return f"alter evaluate --benchmark rows{''.join(given)}"


def next_commands(run: Unlearn, out: Path, settings: RowsEvaluation, closed: Mapping[str, Any]) -> list[str]:
    """Return what to type next, by the verdict: try harder, more gently, with all rows, or look closer."""
    word = closed["verdict"]["word"]
    again = f"alter unlearn {shlex.quote(str(out / 'run.yaml'))} --out {shlex.quote(f'{out}-2')}"
    name, rate = run.adapter.rate.replace("_", "-"), run.adapter.learning_rate(run)
    if closed["verdict"].get("wordings") and run.adapter.routes:
        # the experts have learned it; the router does not know the question
        return [f"{again} --router-fit.rewordings {3 * max(run.router_fit.rewordings, 1)}", _evaluate(settings, out)]
    if word == "not forgotten":
        longer = f" --max-steps {2 * run.max_steps}" if run.max_steps else f" --epochs {2 * run.epochs:g}"
        return [f"{again}{longer}", f"{again} --{name} {3 * rate:g}"]
    if word == "collapsed":
        return [f"{again} --{name} {rate / 3:g}", f"{again} --watch.every-epoch 1"]
    look = f"alter report {shlex.quote(str(out))}"
    return [_evaluate(settings, out), look] if word == "unproven" else [look, _evaluate(settings, out)]
