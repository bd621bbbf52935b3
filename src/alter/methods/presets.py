"""Published methods as combinations of parts: each a name, where it comes from, and its settings.

A preset gives the parts and the hyper-parameters that its paper or code publishes (for models of billions of weights;
smaller ones want larger rates). Whatever a recipe or a flag gives besides overrides it: `alter unlearn --method npo
--adapter.kind lora --learning-rate 1e-4`. Settings that a preset leaves out have the run's own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alter.core import UserError, nearest


@dataclass(frozen=True)
class Method:
    """A published method: what it is, where it was published, and the settings that make it."""

    title: str
    source: str
    settings: Mapping[str, Any]


FULL: dict[str, Any] = {
    "adapter": {"kind": "full"},
    "lambda_": 0.0,
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "epochs": 10,
    "warmup_epochs": 1.0,
    "batch_size": 32,
}
"""OpenUnlearning's common protocol (its docs/repro.md): all weights, 1e-5, ten epochs with a warm-up of one, batches of 32."""

LORA: dict[str, Any] = {
    "adapter": {"kind": "lora", "r": 8, "alpha": 16},
    "lambda_": 0.0,
    "learning_rate": 1e-3,
    "epochs": 3,
    "batch_size": 4,
}
"""The LoRA rows of ALTER's tables: rank 8, eta_B, three epochs, batches of 4."""

UNCLIPPED = 1e9
"""`max_grad_norm` of methods whose authors step without a bound on the gradient, in loops of their own."""

NONE = {"kind": "none"}
CE = {"kind": "cross_entropy"}
KL = {"kind": "keep_base"}
HINGE = {"kind": "inverted_hinge", "only_low": False}
ASCENT = {"kind": "gradient_ascent"}
LOKU: dict[str, Any] = {
    "adapter": {"kind": "lora", "r": 8, "alpha": 16},
    "lambda_": 0.0,
    "retain_objective": CE,
    "weight_decay": 0.01,
    "epochs": 5,
    "warmup_epochs": 1.0,
}

METHODS: dict[str, Method] = {
    # the baselines of ALTER's tables
    "finetune": Method(
        "fine-tuning on the retain set",
        "Maini et al. 2024, arXiv:2401.06121",
        {**FULL, "objective": NONE, "retain_objective": CE},
    ),
    "ga": Method(
        "GA, gradient ascent",
        "Jang et al. 2023, arXiv:2210.01504; TOFU, arXiv:2401.06121",
        {**FULL, "objective": ASCENT, "retain_objective": NONE},
    ),
    "graddiff": Method(
        "GradDiff",
        "Liu et al. 2022, arXiv:2203.12817; TOFU, arXiv:2401.06121",
        {**FULL, "objective": ASCENT, "retain_objective": CE},
    ),
    "kl_min": Method(
        "KL-min",
        "TOFU, arXiv:2401.06121",
        {**FULL, "objective": ASCENT, "retain_objective": KL},
    ),
    "npo": Method(
        "NPO",
        "Zhang et al. 2024, arXiv:2404.05868",
        {**FULL, "objective": {"kind": "npo", "beta": 0.1}, "retain_objective": NONE},
    ),
    "npo_gd": Method(
        "NPO with cross-entropy on retain rows",
        "Zhang et al. 2024, arXiv:2404.05868",
        {**FULL, "objective": {"kind": "npo", "beta": 0.1}, "retain_objective": CE},
    ),
    "npo_kl": Method(
        "NPO with KL to the base on retain rows",
        "Zhang et al. 2024, arXiv:2404.05868",
        {**FULL, "objective": {"kind": "npo", "beta": 0.1}, "retain_objective": KL},
    ),
    "random_label": Method(
        "RL, random labels",
        "Yao et al. 2024, arXiv:2402.15159",
        {
            **FULL,
            "objective": {"kind": "random_labels"},
            "retain_objective": NONE,
            "learning_rate": 2e-5,
            "weight_decay": 0.0,
            "lr_scheduler": "cosine",
            "warmup_epochs": 0.0,
            "warmup_ratio": 0.03,
            "epochs": 1,
        },
    ),
    "rmu": Method(
        "RMU, representation misdirection",
        "Li et al. 2024, arXiv:2403.03218; Zephyr-7B: layer 7, layers 5 to 7 trained, c 6.5, alpha 1200",
        {
            **FULL,
            "adapter": {"kind": "full", "modules": ["mlp.down_proj"], "depth": [5 / 32, 8 / 32]},
            "objective": {"kind": "misdirect", "c": 6.5},
            "retain_objective": {"kind": "keep_hidden"},
            "gamma": 1200.0,
            "learning_rate": 5e-5,
            "lr_scheduler": "constant",
            "warmup_epochs": 0.0,
            "max_grad_norm": UNCLIPPED,
            "batch_size": 4,
            "epochs": 1,
        },
    ),
    "elm": Method(
        "ELM, erasure of language memory",
        "Gandikota et al. 2024, arXiv:2410.02760; layers 4 to 7 of 32",
        {
            **LORA,
            "adapter": {"kind": "lora", "r": 256, "alpha": 16, "dropout": 0.05, "depth": [4 / 32, 8 / 32]},
            "objective": {"kind": "persona"},
            "retain_objective": {"kind": "keep_base_answers"},
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "lr_scheduler": "constant",
            "max_grad_norm": UNCLIPPED,
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
        },
    ),
    "whp_logits": Method(
        "WHP at inference: the base's logits without what a reinforced model raises",
        "MUSE, arXiv:2407.06460 (there all weights are reinforced, and alpha is searched from 1 to 256)",
        {
            "adapter": {"kind": "assistant", "r": 16, "alpha": 32, "share": 1.0, "rule": "rise", "weight": 5.0},
            "lambda_": 0.0,
            "objective": {"kind": "learn"},
            "retain_objective": NONE,
            "learning_rate": 1e-4,
            "epochs": 10,
            "batch_size": 32,
        },
    ),
    "whp": Method(
        "WHP, Who's Harry Potter",
        "Eldan and Russinovich 2023, arXiv:2310.02238",
        {
            **FULL,
            "objective": {"kind": "reinforced", "alpha": 5.0, "hard": True},
            "retain_objective": NONE,
            "reinforcement": {"epochs": 10},
        },
    ),
    "lora_ihl": Method(
        "LoRA with ALTER's own loss, without gating",
        "row LoRA of arXiv:2603.01792 (its loss is not stated)",
        {**LORA, "objective": HINGE, "retain_objective": CE},
    ),
    "lora_gd": Method(
        "LoRA with GradDiff",
        "row LoRA of arXiv:2603.01792 (its loss is not stated)",
        {**LORA, "objective": ASCENT, "retain_objective": CE},
    ),
    "asym_lora": Method(
        "AsymLoRA: HydraLoRA with ALTER's own loss",
        "Tian et al. 2024, arXiv:2404.19245; row AsymLoRA of arXiv:2603.01792",
        {
            **LORA,
            "adapter": {"kind": "asym_lora", "r": 8, "alpha": 16, "experts": 4},
            "objective": HINGE,
            "retain_objective": CE,
        },
    ),
    "asym_lora_gd": Method(
        "AsymLoRA: HydraLoRA with GradDiff",
        "Tian et al. 2024, arXiv:2404.19245; row AsymLoRA of arXiv:2603.01792",
        {
            **LORA,
            "adapter": {"kind": "asym_lora", "r": 8, "alpha": 16, "experts": 4},
            "objective": ASCENT,
            "retain_objective": CE,
        },
    ),
    # what peers ship
    "simnpo": Method(
        "SimNPO",
        "Fan et al. 2024, arXiv:2410.07163; OpenUnlearning's weights",
        {
            **FULL,
            "objective": {"kind": "simnpo", "beta": 4.5, "delta": 0.0},
            "retain_objective": CE,
            "beta": 0.125,
        },
    ),
    "idk_dpo": Method(
        "IdkDPO: DPO towards a refusal",
        "Rafailov et al. 2023, arXiv:2305.18290; TOFU, arXiv:2401.06121",
        {**FULL, "objective": {"kind": "prefer_refusal", "beta": 0.1}, "retain_objective": CE},
    ),
    "dpo": Method(
        "DPO towards a refusal, without retain rows",
        "Rafailov et al. 2023, arXiv:2305.18290",
        {**FULL, "objective": {"kind": "prefer_refusal", "beta": 0.1}, "retain_objective": NONE},
    ),
    "idk": Method(
        "IDK: fine-tuning on refusals and retain rows",
        "TOFU, arXiv:2401.06121",
        {**FULL, "objective": {"kind": "refuse"}, "retain_objective": CE},
    ),
    "undial": Method(
        "UNDIAL with LoRA, as its authors ran it",
        "Dong et al. 2024, arXiv:2402.10052, and its code (GPT-Neo 1.3B; there it stops early by perplexity)",
        {
            **LORA,
            "adapter": {"kind": "lora", "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
            "objective": {"kind": "undial", "beta": 3.0},
            "retain_objective": NONE,
            "learning_rate": 5e-6,
            "epochs": 100,
            "batch_size": 16,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 100,
        },
    ),
    "undial_full": Method(
        "UNDIAL on all weights, as OpenUnlearning runs it",
        "Dong et al. 2024, arXiv:2402.10052; OpenUnlearning",
        {
            **FULL,
            "objective": {"kind": "undial", "beta": 10.0},
            "retain_objective": NONE,
            "learning_rate": 1e-4,
        },
    ),
    "task_arithmetic": Method(
        "task arithmetic: learn the forget set, then subtract",
        "Ilharco et al. 2023, arXiv:2212.04089",
        {**FULL, "objective": {"kind": "learn"}, "retain_objective": NONE, "negate": 1.0},
    ),
    "wga": Method(
        "WGA, weighted gradient ascent",
        "Wang et al. 2025, arXiv:2502.19301; OpenUnlearning's weights",
        {**FULL, "objective": {"kind": "weighted_ascent", "beta": 1.0}, "retain_objective": CE},
    ),
    "satimp": Method(
        "SatImp",
        "Yang et al. 2025, arXiv:2505.11953; retain rows weigh 0.1, as in its code (satimp_gd) and in the models that "
        "OpenUnlearning published",
        {
            **FULL,
            "objective": {"kind": "satimp", "beta1": 5.0, "beta2": 1.0},
            "retain_objective": CE,
            "gamma": 0.1,
            "weight_decay": 0.0,
            "epochs": 5,
            "batch_size": 16,
        },
    ),
    "ceu": Method(
        "CE-U: the model's own distribution without the true token",
        "Yang 2025, arXiv:2503.01224",
        {**FULL, "objective": {"kind": "ceu"}, "retain_objective": NONE},
    ),
    "altpo": Method(
        "AltPO: DPO towards an answer that the model itself has made up",
        "Mekala et al. 2024, arXiv:2409.13474, and its code; values for Llama-2-7B, forget10",
        {
            **FULL,
            "objective": {"kind": "prefer_invented", "beta": 0.1},
            "retain_objective": CE,
            "learning_rate": 5e-5,
            # of their two passes over five alternatives the first
            "warmup_epochs": 5.0,
            "batch_size": 5,
            "gradient_accumulation_steps": 7,
        },
    ),
    "pdu": Method(
        "PDU: flat logits under a constraint on the retain loss",
        "Entesari et al. 2025, arXiv:2506.05314, and OpenUnlearning; values for Llama-3.2-1B, TOFU",
        {
            **FULL,
            "objective": {"kind": "flatten_logits"},
            "retain_objective": {
                "kind": "constrained",
                "epsilon": 0.3,
                "start": 100.0,
                "step": 5.0,
                "warmup_epochs": 5.0,
            },
            "gradient_accumulation_steps": 4,
        },
    ),
    "catnip": Method(
        "CATNIP: NPO token by token against 1 - p, no reference, no retain rows",
        "Yang et al. 2026, arXiv:2602.02824 (no code: rebuilt from a description)",
        {**FULL, "objective": {"kind": "catnip", "beta": 1.0}, "retain_objective": NONE},
    ),
    "duet": Method(
        "DUET: the logits of a teacher that was told to forget",
        "Zhong et al. 2026, arXiv:2601.21283 (no code: rebuilt from a description)",
        {**LORA, "objective": {"kind": "duet", "first": True}, "retain_objective": {"kind": "duet", "first": True}},
    ),
    "push_pull": Method(
        "bidirectional logit distillation: DUET, and a push on what the teacher would not say",
        "Zhong et al. 2026, arXiv:2604.15482 (no code: rebuilt from a description)",
        {**LORA, "objective": {"kind": "push_pull"}, "retain_objective": {"kind": "push_pull"}},
    ),
    "iau": Method(
        "IAU: one step of Adam along the gradients of all forget rows and of as many retain rows",
        "Liu et al., Efficient Machine Unlearning via Influence Approximation, and its code; for images there",
        {
            **FULL,
            "objective": ASCENT,
            "retain_objective": CE,
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "lr_scheduler": "constant",
            "warmup_epochs": 0.0,
            "max_grad_norm": UNCLIPPED,
            "batch_size": 8,
            # all batches of the pass in one step: as many as there are
            "gradient_accumulation_steps": 1_000_000,
            "epochs": 1,
        },
    ),
    "gru": Method(
        "GRU: gradient ascent, held against the gradient of the retain rows",
        "Wang et al. 2025, arXiv:2503.09117, and its code; values for Llama-2-7B, TOFU",
        {
            **FULL,
            "objective": ASCENT,
            "retain_objective": CE,
            "gradient": {"kind": "rectified", "decay": 0.8},
            "lr_scheduler": "constant",
            "warmup_epochs": 0.0,
            "max_grad_norm": UNCLIPPED,
            "epochs": 5,
            "batch_size": 4,
            "gradient_accumulation_steps": 8,
        },
    ),
    "repselect": Method(
        "RepSelect: ascent on the feed-forward layers, without the gradient's principal components",
        "Sondej et al. 2026, arXiv:2606.17168, and its code (RepSelectSimple)",
        {
            **FULL,
            "adapter": {"kind": "full", "modules": ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]},
            "objective": ASCENT,
            "retain_objective": NONE,
            "gradient": {"kind": "selective", "components": 512, "learning_rate": 0.01},
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "weight_decay": 0.0,
            "lr_scheduler": "constant",
            "warmup_epochs": 0.0,
            "batch_size": 8,
            # one step an epoch, of the same gradient every time: as many batches as an epoch has
            "gradient_accumulation_steps": 1_000_000,
            "max_grad_norm": UNCLIPPED,
        },
    ),
    "kuda": Method(
        "KUDA: hidden states turn away, in what the layers found by causal tracing hardly use for retain rows",
        "Fang et al. 2026, arXiv:2602.19275 (no code: rebuilt from a description)",
        {
            **FULL,
            "adapter": {"kind": "full", "modules": ["down_proj.weight"], "traced": 2},
            "objective": {"kind": "deviate"},
            "retain_objective": {"kind": "keep_hidden"},
            "gradient": {"kind": "null_space", "relaxation": 1e-3},
            "learning_rate": 5e-5,
            "lr_scheduler": "constant",
            "warmup_epochs": 0.0,
            "batch_size": 4,
            "epochs": 1,
        },
    ),
    "lunar": Method(
        "LUNAR: hidden states of forget prompts go where the model cannot answer, by one down-projection",
        "Shen et al. 2025, arXiv:2502.07218, and its code; Llama-3-8B: layer 22 of 32",
        {
            **FULL,
            "adapter": {"kind": "full", "modules": ["mlp.down_proj"], "depth": [22 / 32, 23 / 32]},
            "objective": {"kind": "redirect", "coefficient": 2.0, "depth": 22.5 / 32},
            "retain_objective": {"kind": "keep_hidden", "depth": 22.5 / 32},
            "learning_rate": 1e-2,
            "epochs": 20,
            "warmup_epochs": 0.0,
            "max_grad_norm": UNCLIPPED,
        },
    ),
    "sae_guided": Method(
        "SAE-guided unlearning: names look like names that the model does not know, in a sparse autoencoder's code",
        "Yamashita et al. 2025, arXiv:2509.15631 (no code: rebuilt from a description)",
        {**FULL, "objective": {"kind": "unknown_code"}, "retain_objective": CE},
    ),
    "seuf": Method(
        "SEUF, first UOE: GradDiff on the one expert that forget rows go to most, and its router",
        "Zhuang et al. 2024, arXiv:2411.18797 (from the paper: its code is not to be had); for mixtures of experts",
        {
            **FULL,
            "adapter": {"kind": "expert", "alpha": 1.0},
            "objective": ASCENT,
            "retain_objective": CE,
            "learning_rate": 1e-4,
            "batch_size": 16,
        },
    ),
    # LoRA relatives
    "loku": Method(
        "LoKU: inverted hinge with FILA",
        "Cha et al. 2024, arXiv:2408.06621",
        {
            **LOKU,
            "initializer": {"kind": "fila"},
            "objective": HINGE,
            "learning_rate": 1e-4,
            "batch_size": 2,
            "gradient_accumulation_steps": 16,
        },
    ),
    "vila": Method(
        "VILA with the inverted hinge",
        "Kim et al. 2025, arXiv:2508.21300, and its code; values for Llama-2-7B, forget10",
        {
            **LOKU,
            "initializer": {"kind": "vila"},
            "objective": HINGE,
            "gamma": 1.3,
            "learning_rate": 1e-4,
            "batch_size": 8,
            "gradient_accumulation_steps": 4,
        },
    ),
    "reglu": Method(
        "REGLU with the inverted hinge",
        "REGLU, Findings of ACL 2026, arXiv:2604.17396, and its code; values for TOFU, Phi-1.5",
        {
            **LOKU,
            "adapter": {"kind": "lora", "r": 32, "alpha": 64},
            "initializer": {"kind": "reglu", "beta": 0.7},
            "objective": HINGE,
            "learning_rate": 1e-4,
            "batch_size": 4,
            "gradient_accumulation_steps": 8,
        },
    ),
    "o3": Method(
        "O3: one LoRA of refusals for all requests (start_from), kept orthogonal to earlier ones, switched by a detector "
        "for each; no retain rows",
        "Gao et al. 2025, arXiv:2407.10223, and its code for TOFU (that for ScienceQA has the loss on questions too)",
        {
            **LORA,
            "adapter": {"kind": "lora", "r": 8, "alpha": 32, "dropout": 0.05, "orthogonality": 0.1, "detector": True},
            "objective": {"kind": "refuse"},
            "retain_objective": NONE,
            "learning_rate": 2e-4,
            "epochs": 10,
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
            "weight_decay": 0.1,
            "warmup_ratio": 0.1,
        },
    ),
    "stable": Method(
        "Stable Forgetting: bounded LoRA on the MLPs with GradDiff",
        "Garg et al. 2025, arXiv:2509.24166 (no code; frequency and gain are readings)",
        {**LORA, "adapter": {"kind": "bounded_lora"}, "objective": ASCENT, "retain_objective": CE},
    ),
    "e2urec": Method(
        "E2URec: distilling the base pushed away from a reinforced model, with retain rows from the second epoch on",
        "Wang et al. 2024, arXiv:2403.03536; w 0.6, alpha 2, LoRA of rank 16 on q and v",
        {
            **LORA,
            "adapter": {
                "kind": "lora",
                "r": 16,
                "alpha": 32,
                "dropout": 0.05,
                "target_modules": ["q_proj", "v_proj"],
            },
            "objective": {"kind": "reinforced", "alpha": 2.0, "hard": False},
            "retain_objective": {"kind": "distil"},
            "beta": 0.4,
            "gamma": 0.6,
            "retain_after": 1.0,
            "reinforcement": {"epochs": 1, "learning_rate": 5e-5},
            "weight_decay": 0.01,
            "lr_scheduler": "constant",
            "max_grad_norm": UNCLIPPED,
            "epochs": 20,
            "batch_size": 16,
        },
    ),
    "uld": Method(
        "ULD: logit difference with an assistant that knows only the forget set",
        "Ji et al. 2024, arXiv:2406.08607; TOFU (without its paraphrased and perturbed rows)",
        {
            "adapter": {"kind": "assistant", "r": 16, "alpha": 32, "dropout": 0.05, "share": 0.25, "weight": 0.8},
            "lambda_": 0.0,
            "objective": {"kind": "learn"},
            "retain_objective": {"kind": "uniform"},
            "gamma": 5.0,
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "warmup_ratio": 0.1,
            "epochs": 10,
            "batch_size": 8,
            "gradient_accumulation_steps": 2,
        },
    ),
    "sha256": Method(
        "SHA256: ascent on early MLPs with an adaptive retain weight",
        "team SHA256, SemEval-2025 task 4, arXiv:2504.12996, and its code; blocks 0 to 5 of 16",
        {
            **FULL,
            "adapter": {"kind": "full", "modules": [".mlp."], "depth": [0.0, 6 / 16]},
            "objective": ASCENT,
            "retain_objective": {"kind": "adaptive"},
            "learning_rate": 1.5e-5,
            "weight_decay": 0.0,
            "warmup_epochs": 0.0,
            "epochs": 8,
            # 12 rows of both sets together
            "batch_size": 6,
            "gradient_accumulation_steps": 10,
        },
    ),
    # ALTER and what each of its parts is worth
    "alter": Method("ALTER, the paper's objective and rates", "Chen et al. 2026, arXiv:2603.01792", {}),
    "alter_bounded": Method(
        "ALTER with a bounded objective, experts alone: what a run without a method takes",
        "arXiv:2603.01792 for adapter and routing; objective, rate and length are ours, chosen by measurement",
        {
            "adapter": {"kind": "alter"},
            "objective": {"kind": "without_truth", "hinge": 2.0},
            "experts_only": True,
            "learning_rate_experts": 2e-3,
            "epochs": 3,
            "least_steps": 60,
        },
    ),
    "alter_scalar_gate": Method(
        "ALTER with the paper's literal gate, which sees the token's own entropy alone",
        "arXiv:2603.01792, Eq. 7; no bias, no memory; W_g stays as drawn (a reading, see `fit_router`)",
        {"adapter": {"kind": "alter", "router": "entropy", "router_memory": 0.0}},
    ),
    "alter_no_entropy_gate": Method(
        "ALTER without the entropy gate: every token takes its best expert; losses and isolation as ever",
        "ablation",
        {"adapter": {"kind": "alter", "entropy_gate": False}},
    ),
    "alter_shannon": Method(
        "ALTER with Shannon's entropy",
        "ablation; Eq. 3; the threshold of as many equally likely tokens (6.25) as 1.2 is at q = 1.5",
        {"adapter": {"kind": "alter", "entropy_q": 1.0, "entropy_threshold": 1.83}},
    ),
    "alter_no_isolation": Method(
        "ALTER without gradient isolation", "ablation", {"adapter": {"kind": "alter", "isolation": False}}
    ),
    "alter_no_retention": Method(
        "ALTER without the retention expert", "ablation", {"adapter": {"kind": "alter", "retention_expert": False}}
    ),
    "alter_one_expert": Method(
        "ALTER with one forgetting expert", "ablation", {"num_forget_experts": 1, "domain_column": None}
    ),
}


def published() -> dict[str, dict[str, Any]]:
    """Return the published values of each preset by name, and of each guard (`guard.KIND`): `sources`, `values`,
    `otherwise`, `left_out` and `ours` (all lists but `values`, which maps settings such as `adapter.r` to theirs); see
    the head of published.yaml.
    """
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    empty: dict[str, Any] = {"sources": [], "values": {}, "otherwise": [], "left_out": [], "ours": []}
    return {name: {**empty, **entry} for name, entry in yaml.safe_load(text).items()}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Override `below` with `above`; nested settings are merged too, unless `above` names another `kind`."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            result[name] = merged(old, value)
        else:
            result[name] = value
    return result


WARM_UPS = ("warmup_steps", "warmup_epochs", "warmup_ratio")
"""Settings that say how long the learning rate rises, of which a run takes one."""


def overridden(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Override a preset's settings with those of a run (`merged`); a warm-up replaces the preset's, whatever its unit."""
    if any(warm_up in above for warm_up in WARM_UPS):
        below = {key: value for key, value in below.items() if key not in WARM_UPS}
    return merged(below, above)


DEFAULT = "alter_bounded"
"""The method of a run that names none, nor an objective, nor another kind of adapter than ALTER's."""


def with_default(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add `DEFAULT` as the method to a run's settings that choose none.

    Commands and the Python API ask for it; `Unlearn` itself does not, so that the settings that a run has written down
    mean the same whatever the default becomes.
    """
    adapter = given.get("adapter") or {}
    kind = adapter.get("kind", "alter") if isinstance(adapter, Mapping) else getattr(adapter, "kind", "alter")
    chosen = given.get("method") is not None or "objective" in given or kind != "alter"
    return dict(given) if chosen else {**given, "method": DEFAULT}


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the settings of a run's `method` below its own; `adapter.kind` is alter unless given.

    Raises:
        UserError: there is no such method.
    """
    settings = dict(given)
    name = settings.get("method")
    if name is not None:
        if name not in METHODS:
            raise UserError(f"No method {name!r}; expected one of {', '.join(METHODS)}.{nearest(str(name), METHODS)}")
        settings = overridden(METHODS[name].settings, settings)
    adapter = settings.get("adapter")
    if isinstance(adapter, Mapping) and "kind" not in adapter:
        settings["adapter"] = {"kind": "alter", **adapter}
    return settings
