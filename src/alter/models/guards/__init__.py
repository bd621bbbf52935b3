"""Guards: unlearned models that an adapter inside one network cannot express, each a causal LM of its own (`Guard`).

* An assistant beside the model, whose logits are taken from the model's: ULD (Ji et al. 2024, arXiv:2406.08607; a small
  one, which knows only what is to be forgotten) and WHP as MUSE evaluates it (Eldan and Russinovich 2023,
  arXiv:2310.02238; a reinforced copy, which knows it still better).
* A classifier of prompts, which are read with noise on their embeddings: ECO (Liu et al. 2024, arXiv:2406.07933).
* Agents that look over each answer before it is given: ALU (Sanyal and Mandal 2025, arXiv:2502.00406).
* A LoRA that detectors of forgotten inputs switch: O3 (Gao et al. 2025, arXiv:2407.10223). One LoRA is trained on over
  all requests, and each request adds a detector (`Former`).

A folder holds `inference.json`, the LoRA in `lora`, and for O3 what the detectors need in `detector.safetensors` and the A
of earlier requests in `earlier.safetensors`. `load_form`, which all commands call for such an `--adapter`, makes the model of a
base and a folder.
"""

from __future__ import annotations

from alter.models.guards.agents import Agents
from alter.models.guards.assistant import Subtracted, difference, first_blocks, without_rise
from alter.models.guards.corruption import Corrupted, PromptClassifier, after_block, states_after
from alter.models.guards.detector import EARLIER, FEATURES, Detected, Former, detector_inputs, fit_detector
from alter.models.guards.form import FORM_FILE, Form, Guard, is_form, lora_folder
from alter.models.guards.likeness import SHRINKAGE, Calibration, Detector, Likeness, mean_states, window_means
from alter.models.guards.neurons import Abstaining, Adjusted
from alter.models.guards.registry import GUARDS, guard, load_form

__all__ = [
    "EARLIER",
    "FEATURES",
    "FORM_FILE",
    "GUARDS",
    "SHRINKAGE",
    "Abstaining",
    "Adjusted",
    "Agents",
    "Calibration",
    "Corrupted",
    "Detected",
    "Detector",
    "Form",
    "Former",
    "Guard",
    "Likeness",
    "PromptClassifier",
    "Subtracted",
    "after_block",
    "detector_inputs",
    "difference",
    "first_blocks",
    "fit_detector",
    "guard",
    "is_form",
    "load_form",
    "lora_folder",
    "mean_states",
    "states_after",
    "window_means",
    "without_rise",
]
