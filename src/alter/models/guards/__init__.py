"""Inference forms: unlearned models that an adapter inside one network cannot express, each a causal LM of its own.

* An assistant beside the model, whose logits are taken from the model's: ULD (Ji et al. 2024, arXiv:2406.08607; a small
  one, which knows only what is to be forgotten) and WHP as MUSE evaluates it (Eldan and Russinovich 2023,
  arXiv:2310.02238; a reinforced copy, which knows it still better).
* A LoRA that detectors of forgotten inputs switch: O3 (Gao et al. 2025, arXiv:2407.10223). One LoRA is trained on over
  all requests, and each request adds a detector (`Former`).

A folder holds `inference.json`, the LoRA in `lora`, and for O3 what the detectors need in `detector.safetensors` and the A
of earlier requests in `earlier.safetensors`. `load_form`, which all commands call for such an `--adapter`, makes the model of a
base and a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alter.core.errors import UserError, nearest
from alter.core.files import read_object
from alter.core.plugins import Registry
from alter.models.guards.assistant import Subtracted, difference, first_blocks, subtracted, without_rise
from alter.models.guards.detector import EARLIER, FEATURES, Detected, Former, detected, detector_inputs, fit_detector
from alter.models.guards.form import FILE, Form, check_base, is_form, lora_folder
from alter.models.guards.likeness import SHRINKAGE, Calibration, Detector, Likeness, mean_states

__all__ = [
    "EARLIER",
    "FEATURES",
    "FILE",
    "GUARDS",
    "SHRINKAGE",
    "Calibration",
    "Detected",
    "Detector",
    "Form",
    "Former",
    "Guard",
    "Likeness",
    "Subtracted",
    "detector_inputs",
    "difference",
    "first_blocks",
    "fit_detector",
    "is_form",
    "load_form",
    "lora_folder",
    "mean_states",
    "without_rise",
]

Guard = Callable[[Any, Path, dict[str, Any]], Any]
"""Makes the unlearned model of a loaded base, the folder that `load_form` was given, and what its `inference.json` says."""

GUARDS: Registry[Guard] = Registry("guard", {"detector": detected, "assistant": subtracted})
"""Inference forms by the `kind` in their `inference.json`; open to plugins."""


def load_form(base: Any, folder: str) -> Any:
    """The unlearned model: a loaded base and the inference form in `folder`.

    Raises:
        UserError: the form was made for another base, by another version, or by a plugin that is not installed.
    """
    path = Path(folder).expanduser()
    settings = read_object(path / FILE, "the settings of an inference form")
    check_base(settings, base, folder)
    if settings["kind"] not in GUARDS:
        raise UserError(
            f"{path / FILE} is of kind {settings['kind']!r}; expected one of {', '.join(GUARDS)}."
            f"{nearest(settings['kind'], GUARDS)} Install the plugin that it was made with."
        )
    return GUARDS[settings["kind"]](base, path, settings).eval()
