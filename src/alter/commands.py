"""The registry of commands: where each one's settings and function live, and its help line."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, cast


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command's settings and its function live, and its help line.

    The module of the settings is imported for every help text: it must import nothing that takes long
    (`alter.core.deferral`). `function` is a name in it, or MODULE:NAME. `presets` is a module whose `expand` fills in what a
    named setting stands for, before flags override it. `together` says that several processes can do it together
    (`alter.core.processes`).
    """

    module: str
    settings: str
    function: str
    help: str
    chooser: str | None = None
    presets: str | None = None
    together: bool = False

    def load(self) -> Callable[[Any], Any]:
        """Import the command's function."""
        module, _, name = self.function.rpartition(":")
        return cast("Callable[[Any], Any]", getattr(importlib.import_module(module or self.module), name))


COMMANDS = {
    "demo": Command(
        "alter.demo", "Demo", "demo", "forget 20 authors with the shipped model: before, after, retrained"
    ),
    "unlearn": Command(
        "alter.training.settings",
        "Unlearn",
        "alter.training.closing:command",
        "make a model forget, by ALTER's adapter or any other method",
        presets="alter.methods.presets",
        together=True,
    ),
    "forget": Command(
        "alter.forgetting.settings",
        "Forget",
        "alter.forgetting.run:command",
        "make a model forget a subject or a document: rows, training, probes",
    ),
    "guard": Command(
        "alter.guarding.settings",
        "MakeGuard",
        "alter.guarding.run:make_guard",
        "a guard at inference, without training the model: ECO's classifier, ALU's agents",
    ),
    "distill": Command(
        "alter.distillation.settings",
        "Distill",
        "alter.distillation.run:command",
        "plain weights that no longer know, from an unlearned model",
    ),
    "export": Command(
        "alter.exporting.run", "Export", "export", "a GGUF file for llama.cpp and Ollama, or plain LoRAs of an adapter"
    ),
    "evaluate": Command(
        "alter.evaluation.run",
        "Evaluation",
        "evaluate",
        "measure a model, with or without an adapter",
        chooser="benchmark",
        together=True,
    ),
    "chat": Command(
        "alter.serving.settings", "Chat", "alter.serving.chat:chat", "talk to a model and its adapter in the terminal"
    ),
    "serve": Command(
        "alter.serving.settings",
        "Serve",
        "alter.serving.openai:serve",
        "answer over HTTP as OpenAI's API does, routing active",
    ),
    "request init": Command("alter.requests.intake", "Init", "init", "a database of erasure requests for one model"),
    "request add": Command("alter.requests.intake", "Add", "add", "write down an erasure request"),
    "request list": Command("alter.requests.register", "List", "list_requests", "all requests with their evidence"),
    "request show": Command(
        "alter.requests.register", "Show", "show_request", "one request, its evidence and its history"
    ),
    "request run": Command(
        "alter.requests.commands", "RunRequests", "run", "make the model forget what was asked for"
    ),
    "request verify": Command(
        "alter.requests.verification", "Verify", "verify", "was anything altered, has anything come back?"
    ),
    "request revoke": Command("alter.requests.commands", "Revoke", "revoke", "take a request back"),
    "request distill": Command(
        "alter.requests.rebasing",
        "DistillRequests",
        "distill_requests",
        "the weights themselves forget what is in force",
    ),
    "request purge": Command(
        "alter.requests.commands", "Purge", "purge", "remove what is kept of a request's subject and rows"
    ),
    "request export": Command(
        "alter.requests.export", "ExportRequests", "export_requests", "the adapter or a merged model, with a card"
    ),
    "certificate": Command(
        "alter.requests.certificate.command",
        "Certificate",
        "certificate",
        "a signed statement of what was forgotten; check one",
    ),
    "muse-curve": Command(
        "alter.evaluation.musecurve",
        "MuseCurve",
        "muse_curve",
        "MUSE of models that forgot more and more, side by side",
    ),
    "aggregate": Command(
        "alter.evaluation.run", "AggregateLogs", "aggregate_logs", "TOFU's numbers from published logs"
    ),
    "attack": Command(
        "alter.attacks.settings",
        "Attack",
        "alter.attacks.run:attack",
        "try to bring the forgotten back, beside a retrained model",
    ),
    "report": Command(
        "alter.reporting.settings",
        "Report",
        "alter.reporting.page:report",
        "one HTML page about runs, attacks and requests, to hand over",
    ),
    "inspect": Command(
        "alter.serving.settings",
        "Inspect",
        "alter.serving.inspector:inspect",
        "a page: ask, see before and after, and each token's expert",
    ),
    "generate": Command(
        "alter.evaluation.run",
        "Generate",
        "answer_prompts",
        "answer prompts with a model and an adapter",
        together=True,
    ),
    "judge": Command(
        "alter.evaluation.judged", "JudgeFile", "judge_file", "have saved replies graded by a language model"
    ),
    "entropy": Command(
        "alter.evaluation.entropies",
        "Study",
        "alter.evaluation.entropystudy:entropy",
        "token entropies of a model on a text, and what adapting changes",
    ),
    "compare": Command(
        "alter.comparison.settings",
        "Compare",
        "alter.comparison.run:command",
        "methods x seeds x forget splits x a small grid, with equal budget",
    ),
    "meta-evaluate": Command(
        "alter.metaevaluation.settings",
        "MetaEvaluate",
        "alter.metaevaluation.run:meta_evaluate",
        "which metrics can be trusted: tried on models that know and that do not",
    ),
    "finetune": Command(
        "alter.training.finetune", "Finetune", "finetune", "train a model on rows or on texts, or from scratch"
    ),
    "completion": Command(
        "alter.completion", "Completion", "completion", "a script that completes commands and options in your shell"
    ),
}


COMMON = {
    "unlearn": "method retain domain_column num_forget_experts start_from epochs batch_size learning_rate_experts learning_rate "
    "max_steps quantization closing_rows must_forget watch.every_epoch watch.holdout seed device resume overwrite",
    "forget": "subject document kind keep epochs learning_rate erase erasing.max_steps examples seed device resume overwrite",
    "distill": "run model adapter student forget retain general form noise.alpha attacker.rate epochs learning_rate batch_size seed "
    "device resume overwrite",
    "attack": "adapter retrained original attacks rows seed quantization device budget relearn.steps relearn.rows samples",
    "compare": "splits forget retain seeds rates epochs retrained.forget01 retrained.forget05 retrained.forget10 retrained.rows data "
    "holdout executor workers run device",
    "meta-evaluate": "split rows rates seeds readings run device",
    "finetune": "model data corpora epochs max_steps batch_size learning_rate seed resume overwrite",
}
"""Options that `--help` shows of commands with many, besides those that are required and every `kind`; `--help-all` shows
all."""
