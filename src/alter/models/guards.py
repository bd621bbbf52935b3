"""Inference forms: unlearned models that no adapter inside one network can be, each a causal language model of its own.

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

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from alter.adapter.model import base_fingerprint, same_base
from alter.core.console import progress
from alter.core.errors import UserError, nearest
from alter.core.files import read_object
from alter.core.plugins import Registry
from alter.data.batching import Collator
from alter.data.encoding import Encoded
from alter.models.attach import attach

FILE = "inference.json"
"""In an adapter's folder: which form it is, and its settings."""
FEATURES = "detector.safetensors"
"""Beside it, for detectors: what each compares inputs with; "0" is the first request's."""
EARLIER = "earlier.safetensors"
"""Beside it, from the second request on: every earlier request's A, named NUMBER.NAME."""

Form = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""What `load_form` needs besides the LoRA: settings, and tensors by file."""


# Logits of two networks ----------------------------------------------------------------------------------------------


def first_blocks(model: Any, name: str, count: int) -> Any:
    """The model with only the first `count` blocks of its list `name`; all weights are shared, none is copied."""
    small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    parent, _, last = name.rpartition(".")
    setattr(small.get_submodule(parent), last, nn.ModuleList(list(small.get_submodule(name))[:count]))
    small.config.num_hidden_layers = count
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[:count]
    return small


def difference(base: Tensor, assistant: Tensor, weight: float, plausible: float) -> Tensor:
    """ULD: z_base - weight * log p_assistant where p_base is at least `plausible` times its largest value, else z_base.

    (A reading: the authors subtract logits and mask implausible tokens out. The assistant's log-probabilities differ
    from its logits by a constant, and this way every token keeps a probability above 0.)

    Args:
        base, assistant: [..., V] logits.
    """
    wide = base.float()
    likely = wide >= wide.amax(-1, keepdim=True) + torch.tensor(plausible).log().item()
    away = torch.where(likely, torch.log_softmax(assistant.float(), dim=-1), 0.0)
    return (wide - weight * away).to(base.dtype)


def without_rise(base: Tensor, reinforced: Tensor, weight: float) -> Tensor:
    """WHP: v_base - weight * relu(v_reinforced - v_base), of [..., V] logits."""
    wide = base.float()
    return (wide - weight * torch.relu(reinforced.float() - wide)).to(base.dtype)


RULES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "knowledge": lambda base, other, given: difference(base, other, given["weight"], given["plausible"]),
    "rise": lambda base, other, given: without_rise(base, other, given["weight"]),
}
"""How an assistant is taken from the base: by its log-probabilities, or by what its logits exceed the base's."""


class _Form(PreTrainedModel, GenerationMixin):
    """A causal language model around another: it scores and generates, with one cache for all that it keeps."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: Any) -> None:
        super().__init__(base.config)
        self.base = base
        self.generation_config = base.generation_config
        self.enabled = True

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this is the untouched base."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @abstractmethod
    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Tensor:
        """Logits of the unlearned model; what has to be kept for the next token goes into `cache`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits at the positions that `logits_to_keep` names, as transformers' models give them.

        Raises:
            UserError: the cache is not one that grows.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and type(past_key_values) is not DynamicCache:
            raise UserError("This model generates with a growing cache only: leave cache_implementation out.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        logits = self.unlearned(inputs, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _behind(cache: DynamicCache, blocks: int, count: int) -> list[Any]:
    """The `count` layers of a cache behind the base's: what is done to the rows of the whole is done to them."""
    while len(cache.layers) < blocks + count:
        cache.layers.append(DynamicLayer())
    return cache.layers[blocks:]


class Subtracted(_Form):
    """A model and its assistant as one causal language model: z = RULES[rule](z_base, z_assistant).

    Both keep their keys and values in one cache, the assistant's behind the base's.
    """

    def __init__(self, base: Any, assistant: Any, settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.assistant, self.settings = assistant, settings

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Tensor:
        """See `_Form.unlearned`."""
        own = None
        if cache is not None:
            own = DynamicCache()
            own.layers = _behind(cache, self.config.num_hidden_layers, self.assistant.config.num_hidden_layers)
        base = self.base(**inputs, past_key_values=cache).logits
        if not self.enabled:
            return base
        assistant = self.assistant(**inputs, past_key_values=own).logits
        return RULES[self.settings["rule"]](base, assistant, self.settings)


# A detector of forgotten inputs --------------------------------------------------------------------------------------

DEPTHS = 12
"""Hidden states that the detector looks at, at most, evenly spread over the blocks."""
SHRINKAGE = 0.1
"""Share of the mean variance in each covariance: with fewer rows than dimensions the empirical one has no inverse."""
FOLDS = 5
MOST_ROWS = 512
"""Forget rows that a detector is fitted on, at most."""
LOW, HIGH, FULL = 0.3, 0.9, 1.2
"""O3's bands: the adapter is off at a weight of 0.3 or less, and 1.2 times as strong above 0.9."""


def mean_states(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """[B, L, H] means of L hidden states [B, T, H] over the real tokens of each row (`mask` [B, T]), in float32."""
    real = mask.to(states[0].device).float()[..., None]
    return torch.stack([(state.float() * real).sum(1) / real.sum(1).clamp_min(1.0) for state in states], dim=1)


@dataclass(frozen=True)
class Likeness:
    """How like a set of rows an input is, in each of L layers: -1/2 d_Mahalanobis^2 + 1000 max cosine (O3).

    The published code subtracts the cosine; since both terms measure likeness, they are added here (a reading). The
    covariance is shrunk to (1 - a) C + a tr(C) / H I with a = `SHRINKAGE`, another one.

    Attributes:
        centre: [L, H] means of the rows.
        axes: [L, k, H] principal axes, each times the root of its share in the inverse.
        floor: [L] the variance a tr(C) / H in all directions.
        units: [L, n, H] the rows, of length 1.
    """

    centre: Tensor
    axes: Tensor
    floor: Tensor
    units: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Likeness:
        """Fit to rows [n, L, H]."""
        rows = rows.double().transpose(0, 1)
        centre = rows.mean(1)
        away = rows - centre[:, None]
        n, size = rows.shape[1:]
        floor = (SHRINKAGE * away.square().sum((1, 2)) / n / size).clamp_min(1e-12)
        # the axes of the covariance from the [n, n] products of its rows
        squares, mixing = torch.linalg.eigh(away @ away.transpose(1, 2))
        squares = squares.clamp_min(0)
        axes = mixing.transpose(1, 2) @ away / squares.sqrt().clamp_min(1e-9)[..., None]
        variance = (1 - SHRINKAGE) * squares / n
        share = variance / (variance + floor[:, None])
        units = torch.nn.functional.normalize(rows, dim=-1)
        return cls(centre.float(), (axes * share.sqrt()[..., None]).float(), floor.float(), units.float())

    def to(self, device: torch.device) -> Likeness:
        """The same on another device."""
        return Likeness(*(getattr(self, name).to(device) for name in ("centre", "axes", "floor", "units")))

    def __call__(self, rows: Tensor) -> Tensor:
        """[m, L] of rows [m, L, H]."""
        rows = rows.float().transpose(0, 1)
        away = rows - self.centre[:, None]
        inside = (away @ self.axes.transpose(1, 2)).square().sum(-1)
        distance = (away.square().sum(-1) - inside) / self.floor[:, None]
        cosine = (torch.nn.functional.normalize(rows, dim=-1) @ self.units.transpose(1, 2)).amax(-1)
        return (1000 * cosine - distance / 2).t()


@dataclass(frozen=True)
class Calibration:
    """Likeness of rows that were not fitted on: mean and spread in each layer, and the spread of their joint score."""

    layer_mean: list[float]
    layer_std: list[float]
    joint_std: float

    @classmethod
    def of(cls, likeness: Tensor) -> Calibration:
        """Fit to the likeness [n, L] of rows that took no part in what measured it."""
        spread, middle = torch.std_mean(likeness.double(), dim=0, correction=0)
        spread = spread.clamp_min(1e-6)
        joint = ((likeness - middle) / spread).mean(-1)
        return cls(middle.tolist(), spread.tolist(), max(float(joint.std(correction=0)), 1e-6))

    def __call__(self, likeness: Tensor) -> Tensor:
        """The adapter's weight [m] for likenesses [m, L]: 0 for inputs that are unlike the forget rows, up to 1.2.

        The joint score is the mean of the layers' standardised likenesses, over its spread; c = min(1, 2 Phi(score)) is its
        tail probability, and w = sigmoid(10 c - 2); w <= 0.3 counts as 0 and w > 0.9 as 1.2. Readings: O3 fits its Gaussian to a batch of
        test inputs as well, and joins the layers by a one-class SVM, of which nothing but a direction matters here; it
        sets weights between 0.4 and 0.9 to 0, so that a likelier input could get less. Here w never falls with c.
        """
        middle, spread = (torch.tensor(value, device=likeness.device) for value in (self.layer_mean, self.layer_std))
        joint = ((likeness - middle) / spread).mean(-1)
        tail = (2 * torch.special.ndtr(joint / self.joint_std)).clamp(max=1.0)
        weight = torch.sigmoid(10 * tail - 2)
        weight = torch.where(weight > HIGH, FULL, weight)
        return torch.where(weight > LOW, weight, 0.0)


@dataclass(frozen=True)
class Detector:
    """Recognises the inputs of one request: the adapter's weight [m] for mean states [m, L, H] (see `mean_states`)."""

    likeness: Likeness
    calibration: Callable[[Tensor], Tensor]

    def __call__(self, means: Tensor) -> Tensor:
        """The weights."""
        return self.calibration(self.likeness(means))

    def to(self, device: torch.device) -> Detector:
        """The same on another device."""
        return Detector(self.likeness.to(device), self.calibration)


def detector_inputs(rows: Sequence[Encoded]) -> list[list[list[int]]]:
    """Each row as the model meets it: its prompt, if it has one, and the whole."""
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


class Detected(_Form):
    """A model with a LoRA adapter whose update is scaled for each input: y = W0 x + w s B A x (O3's soft loading).

    The weight w, the largest that any request's detector gives, comes from the input of the first call, which the untouched
    base reads once; while generating, that is the prompt, and w stays as it is, in the cache behind the base's keys and
    values.

    Args:
        tuned: the base with its LoRA.
        detectors: one for each request, in any order.
        depths: numbers of the hidden states that they read.
    """

    def __init__(self, tuned: PeftModel, detectors: Sequence[Detector], depths: list[int]) -> None:
        super().__init__(tuned.get_base_model())
        self.detectors, self.depths = list(detectors), depths
        self.weights: Tensor | None = None
        for name, module in self.base.named_modules():
            if name.endswith(".lora_B.default"):
                module.register_forward_hook(self._scale)

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

    def detect(self, inputs: dict[str, Any]) -> Tensor:
        """[B] weights of the adapter for the rows of a first call: the maximum over the detectors."""
        ids = inputs["input_ids"]
        mask = torch.ones_like(ids) if inputs["attention_mask"] is None else inputs["attention_mask"]
        none = torch.zeros(len(ids), device=ids.device)
        with torch.no_grad():
            seen = self._base(inputs, none, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
            means = mean_states([seen[depth] for depth in self.depths], mask)
            if self.detectors[0].likeness.centre.device != means.device:
                self.detectors = [detector.to(means.device) for detector in self.detectors]
            return torch.stack([detector(means) for detector in self.detectors]).amax(0)

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Tensor:
        """See `_Form.unlearned`.

        Raises:
            UserError: the cache was filled by another model.
        """
        kept = None if cache is None else _behind(cache, self.config.num_hidden_layers, 1)[0]
        if kept is not None and kept.is_initialized:
            weights = kept.keys[:, 0, 0, 0]
        elif cache is not None and cache.get_seq_length():
            raise UserError(
                "The cache holds tokens that this model has not read, so no weight is known: start without."
            )
        else:
            weights = self.detect(inputs)
            if kept is not None:
                kept.update(*[weights.view(-1, 1, 1, 1)] * 2)
        if not self.enabled:
            weights = torch.zeros_like(weights)
        return self._base(inputs, weights, past_key_values=cache).logits


# Loading -------------------------------------------------------------------------------------------------------------


def is_form(folder: str) -> bool:
    """Whether an adapter's folder holds an inference form."""
    return (Path(folder).expanduser() / FILE).is_file()


def lora_folder(folder: str) -> Path:
    """Where the LoRA adapter in an adapter's folder is: in `lora` for an inference form, else there."""
    path = Path(folder).expanduser()
    return path / "lora" if is_form(folder) else path


def _check_base(settings: Mapping[str, Any], base: Any, folder: str) -> None:
    measured = base_fingerprint(base)
    if settings["base"] and measured and not same_base(settings["base"], measured):
        raise UserError(
            f"{folder} was made for another base model: its fingerprint is {settings['base']}, this model's is {measured}."
        )


def _features(path: Path, settings: Mapping[str, Any]) -> list[Tensor]:
    """[n, L, H] features of each request's detector, the first request's first."""
    if "calibrations" not in settings:
        raise UserError(f"{path} was written by another version of alter, with one detector for all: train it again.")
    found = load_file(str(path / FEATURES))
    return [found[str(place)] for place in range(len(settings["calibrations"]))]


@dataclass(frozen=True)
class Former:
    """An O3 adapter of earlier requests, as the next request takes it over: one LoRA goes on, each detector stays.

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
            settings = read_object(path / FILE, "the settings of an inference form")
        if settings.get("kind") != "detector":
            inside = f" Did you mean {path / 'adapter'}?" if is_form(str(path / "adapter")) else ""
            raise UserError(
                f"start_from is {folder!r}, which is no folder of a LoRA with a detector: expected the adapter that a run of "
                f"method o3 has saved.{inside}"
            )
        features = _features(path, settings)
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
        """Refuse another base model, or a choice of other layers of it.

        Raises:
            UserError: see above.
        """
        _check_base(self.settings, base, self.folder)
        own = {name.removeprefix("base_model.model.").partition(".lora_A.")[0] for name in self.snapshots[-1]}
        other = sorted(own ^ set(layers))
        if other:
            has, lacks = (self.folder, "this run") if other[0] in own else ("this run", self.folder)
            raise UserError(
                f"start_from goes on with the same LoRA, but {has} adapts {other[0]} and {lacks} does not: give "
                "adapter.target_modules and adapter.depth as they were."
            )

    def then(self, form: Form) -> Form:
        """The form of the next request behind these."""
        settings, files = form
        features = [*self.features, files[FEATURES]["0"]]
        return settings | {"calibrations": self.settings["calibrations"] + settings["calibrations"]}, {
            FEATURES: {str(place): value for place, value in enumerate(features)},
            EARLIER: {f"{place}.{name}": A for place, one in enumerate(self.snapshots) for name, A in one.items()},
        }


def _detected(base: Any, path: Path, settings: dict[str, Any]) -> Any:
    detectors = [
        Detector(Likeness.of(features), Calibration(**calibration))
        for features, calibration in zip(_features(path, settings), settings["calibrations"], strict=True)
    ]
    tuned = attach(base, str(lora_folder(str(path))))
    return Detected(tuned, detectors, settings["depths"])


def _subtracted(base: Any, path: Path, settings: dict[str, Any]) -> Any:
    small = first_blocks(base, settings["list"], settings["blocks"])
    # not merged: the weights are the base's own
    assistant = attach(small, str(lora_folder(str(path)))).get_base_model()
    return Subtracted(base, assistant, settings)


Guard = Callable[[Any, Path, dict[str, Any]], Any]
"""Makes the unlearned model of a loaded base, the folder that `load_form` was given, and what its `inference.json` says."""

GUARDS: Registry[Guard] = Registry("guard", {"detector": _detected, "assistant": _subtracted})
"""Inference forms by the `kind` in their `inference.json`; open to plugins."""


def load_form(base: Any, folder: str) -> Any:
    """The unlearned model: a loaded base and the inference form in `folder`.

    Raises:
        UserError: the form was made for another base, by another version, or by a plugin that is not installed.
    """
    path = Path(folder).expanduser()
    settings = read_object(path / FILE, "the settings of an inference form")
    _check_base(settings, base, folder)
    if settings["kind"] not in GUARDS:
        raise UserError(
            f"{path / FILE} is of kind {settings['kind']!r}; expected one of {', '.join(GUARDS)}."
            f"{nearest(settings['kind'], GUARDS)} Install the plugin that it was made with."
        )
    return GUARDS[settings["kind"]](base, path, settings).eval()
