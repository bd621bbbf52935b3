"""A LoRA that detectors of forgotten inputs switch, one detector for each request so far (O3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from alter.core import UserError, as_input, progress
from alter.data import Collator, Encoded
from alter.models.attach import attach
from alter.models.guards.form import FORM_FILE, Form, Guard, check_base, is_form, lora_folder, places, read_tensors
from alter.models.guards.likeness import Calibration, Detector, Likeness, mean_states
from alter.storage import read_object

FEATURES = "detector.safetensors"
"""Beside it, for detectors: what each compares inputs with; "0" is the first request's."""
EARLIER = "earlier.safetensors"
"""Beside it, from the second request on: every earlier request's A, named NUMBER.NAME."""
DEPTHS = 12
"""Hidden states that the detector looks at, at most, evenly spread over the blocks."""
FOLDS = 5
MOST_ROWS = 512
"""Forget rows that a detector is fitted on, at most."""


def detector_inputs(rows: Sequence[Encoded]) -> list[list[list[int]]]:
    """Return each row as the model may meet it: its prompt, if it has one, and the whole."""
    inputs = []
    for row in rows:
        start = next((i for i, label in enumerate(row.labels) if label != -100), len(row.labels))
        inputs.append([row.input_ids[:start], list(row.input_ids)] if start else [list(row.input_ids)])
    return inputs


@torch.no_grad()
def fit_detector(model: Any, rows: Sequence[Encoded], *, pad_token_id: int, seed: int) -> Form:
    """Fit O3's detector to forget rows alone, by the hidden states of the untouched model.

    O3 trains an encoder of its own (RoBERTa-large, by contrast with a frozen copy); here the base itself encodes, which
    needs no further network (a reading). The calibration is that of rows left out in `FOLDS` parts.

    Returns:
        the form of a first request, as `load_form` reads it; `Former.then` puts it behind those of earlier ones.

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"The detector is fitted on forget rows and needs two at least; there are {len(rows)}.")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(rows), generator=generator)[:MOST_ROWS].tolist()
    inputs = detector_inputs([rows[i] for i in drawn])
    flat = [(place, ids) for place, forms in enumerate(inputs) for ids in forms]
    blocks = model.config.num_hidden_layers
    # the state before the first block is the embedding, which O3 leaves out too
    depths = sorted({round(1 + i * (blocks - 1) / max(DEPTHS - 1, 1)) for i in range(DEPTHS)})
    collate, device = Collator(pad_token_id), next(model.parameters()).device
    order = sorted(range(len(flat)), key=lambda i: -len(flat[i][1]))
    found: dict[int, Tensor] = {}
    for start in progress(range(0, len(order), 16), total=-(-len(order) // 16), label="detector"):
        members = order[start : start + 16]
        batch = collate([{"input_ids": flat[i][1], "labels": flat[i][1]} for i in members])
        seen = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states
        means = mean_states([seen[depth] for depth in depths], batch["attention_mask"])
        found |= dict(zip(members, means.cpu(), strict=True))
    features = torch.stack([found[i] for i in range(len(flat))])
    owner = torch.tensor([place for place, _ in flat])
    likeness = torch.zeros(features.shape[:2])
    for fold in range(min(FOLDS, len(inputs))):
        out = owner % min(FOLDS, len(inputs)) == fold
        likeness[out] = Likeness.of(features[~out])(features[out])
    settings = {"kind": "detector", "depths": depths, "calibrations": [vars(Calibration.of(likeness))]}
    return settings, {FEATURES: {"0": features}}


class Detected(Guard):
    """A model with a LoRA adapter whose update is scaled for each input: y = W0 x + w s B A x (O3's soft loading).

    The weight w, the largest that any request's detector gives, comes from the input of the first call, which the untouched
    base reads once; while generating, that is the prompt, and w stays as it is.

    Args:
        tuned: the base with its LoRA.
        detectors: one for each request, in any order.
        depths: numbers of the hidden states that they read.
    """

    kind: ClassVar[str] = "detector"
    decides: ClassVar[bool] = True

    def __init__(self, tuned: PeftModel, detectors: Sequence[Detector], depths: list[int]) -> None:
        super().__init__(tuned.get_base_model())
        self.detectors, self.depths = list(detectors), depths
        self.weights: Tensor | None = None
        for name, module in self.base.named_modules():
            if name.endswith(".lora_B.default"):
                module.register_forward_hook(self._scale)

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Detected:
        """See `Guard.read`."""
        detectors = [
            Detector(Likeness.of(features), Calibration(**calibration))
            for features, calibration in zip(features_of(path, settings), settings["calibrations"], strict=True)
        ]
        return cls(attach(base, str(lora_folder(str(path)))), detectors, settings["depths"])

    def _scale(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert self.weights is not None
        # some architectures flatten rows and tokens into one axis
        weights = self.weights.repeat_interleave(len(output) // len(self.weights))
        return output * weights.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)

    def _base(self, inputs: dict[str, Any], weights: Tensor, **options: Any) -> Any:
        self.weights = weights
        try:
            return self.base(**{**inputs, **options})
        finally:
            self.weights = None

    def decide(self, ids: Tensor, mask: Tensor | None, prompts: Sequence[int] | None = None) -> Tensor:
        """Return the adapter's weight for each row, [B]: the maximum over the detectors, which look at what was asked alone, so
        that an answer is scored with the weight that it would be given with.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        inside = mask
        if prompts is not None:
            inside = mask * (mask.cumsum(1) <= torch.tensor(list(prompts), device=ids.device)[:, None])
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}
        none = torch.zeros(len(ids), device=ids.device)
        with torch.no_grad():
            seen = self._base(given, none, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
            means = mean_states([seen[depth] for depth in self.depths], inside)
            if self.detectors[0].likeness.centre.device != means.device:
                self.detectors = [detector.to(means.device) for detector in self.detectors]
            return torch.stack([detector(means) for detector in self.detectors]).amax(0)

    def untouched(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Any:
        """See `Guard.untouched`."""
        ids = inputs["input_ids"]
        return self._base(inputs, torch.zeros(len(ids), device=ids.device), **as_input(cache))

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        assert decision is not None
        return self._base(inputs, decision, **as_input(cache))


def features_of(path: Path, settings: Mapping[str, Any]) -> list[Tensor]:
    """Read the features [n, L, H] of each request's detector, the first request's first.

    Raises:
        UserError: the folder was written before detectors were kept apart, or see `read_tensors`.
    """
    if "calibrations" not in settings:
        raise UserError(f"{path} was written by another version of alter, with one detector for all: train it again.")
    found = read_tensors(path / FEATURES)
    return [found[str(place)] for place in range(len(settings["calibrations"]))]


@dataclass(frozen=True)
class Former:
    """An O3 adapter of earlier requests that the next request continues: one LoRA trains on, each detector stays.

    Attributes:
        folder: where it is.
        settings: of the form.
        config: of PEFT's LoRA.
        weights: the LoRA's, by PEFT's names.
        features: of each detector, in the order of the requests.
        earlier: A of each request before its last, by PEFT's names.
    """

    folder: str
    settings: dict[str, Any]
    config: dict[str, Any]
    weights: dict[str, Tensor]
    features: list[Tensor]
    earlier: list[dict[str, Tensor]]

    @classmethod
    def read(cls, folder: str) -> Former:
        """Read an adapter's folder.

        Raises:
            UserError: there is none, it has no detector, or its weights are not finite.
        """
        path, settings = Path(folder).expanduser(), {}
        if is_form(folder):
            settings = read_object(path / FORM_FILE, "the settings of an inference form")
        if settings.get("kind") != "detector":
            inside = f" Did you mean {path / 'adapter'}?" if is_form(str(path / "adapter")) else ""
            raise UserError(
                f"`start_from` is {folder!r}, which is no folder of a LoRA with a detector: expected the adapter that a run of "
                f"method o3 has saved.{inside}"
            )
        features = features_of(path, settings)
        weights = load_file(str(lora_folder(folder) / "adapter_model.safetensors"))
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise UserError(f"The weights of {folder} are broken: {name} holds NaN or infinite values.")
        earlier: list[dict[str, Tensor]] = [{} for _ in features[1:]]
        if earlier:
            for key, A in load_file(str(path / EARLIER)).items():
                number, _, name = key.partition(".")
                earlier[int(number)][name] = A
        config = read_object(lora_folder(folder) / "adapter_config.json", "the settings of an adapter")
        return cls(folder, settings, config, weights, features, earlier)

    @property
    def snapshots(self) -> list[dict[str, Tensor]]:
        """A [r, in] of each request so far, by PEFT's names."""
        return [*self.earlier, {name: weight for name, weight in self.weights.items() if ".lora_A." in name}]

    def check(self, base: Any, layers: Sequence[str]) -> None:
        """Refuse another base model, or another choice of its layers.

        Raises:
            UserError: see above.
        """
        check_base(self.settings, base, self.folder)
        own = {name.removeprefix("base_model.model.").partition(".lora_A.")[0] for name in self.snapshots[-1]}
        other = sorted(own ^ set(layers))
        if other:
            has, lacks = (self.folder, "this run") if other[0] in own else ("this run", self.folder)
            raise UserError(
                f"`start_from` goes on with the same LoRA, but {has} adapts {other[0]} and {lacks} does not: give "
                "`adapter.target_modules` and `adapter.depth` as they were."
            )

    def then(self, form: Form) -> Form:
        """Append the form of the next request to these."""
        settings, files = form
        features = [*self.features, files[FEATURES]["0"]]
        return settings | {"calibrations": self.settings["calibrations"] + settings["calibrations"]}, {
            FEATURES: {str(place): value for place, value in enumerate(features)},
            EARLIER: {f"{place}.{name}": A for place, one in enumerate(self.snapshots) for name, A in one.items()},
        }
