"""Sparse autoencoders of hidden states: read from a folder as `sae-lens` saves them, or trained on the run's own rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alter.core import UserError, progress
from alter.storage import read_object

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""Files of such a folder."""

SAE_ARCHITECTURES = ("standard", "jumprelu", "topk")
"""Encoders that can be read; sae-lens saves a trained BatchTopK as jumprelu."""

STATES_OF_STEP = 1024
"""Hidden states of a training step."""


@dataclass(frozen=True)
class Autoencoder:
    """An encoder s = act(W^T (x - b) + e) of hidden states x, and the decoder x ~ V^T s + b that it was trained with.

    act is relu; of its values those at or below `threshold` become 0 if there is one (JumpReLU), or all but the `active`
    largest of a state (TopK).

    Attributes:
        encoder: W, [D, S].
        bias: e, [S].
        decoder: V, [S, D].
        centre: b, [D].
        centred: whether the encoder takes b off its input.
        threshold: [S], or None.
        active: features of a state that stay, or None.
        normed: whether a state is standardised over its width first.
        by_decoder: whether values are multiplied by the length of their decoder row before the largest are taken.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    centre: Tensor
    centred: bool = True
    threshold: Tensor | None = None
    active: int | None = None
    normed: bool = False
    by_decoder: bool = False

    def encode(self, states: Tensor) -> Tensor:
        """Encode states [..., D] as codes [..., S]; gradients reach the states through the features that are active."""
        if self.normed:
            states = states - states.mean(-1, keepdim=True)
            states = states / (states.std(-1, keepdim=True) + 1e-5)
        if self.centred:
            states = states - self.centre.to(states)
        before = states @ self.encoder.to(states) + self.bias.to(states)
        if self.by_decoder:
            before = before * self.decoder.to(states).norm(dim=-1)
        code = before.relu()
        if self.threshold is not None:
            code = code * (before > self.threshold.to(states))
        if self.active is not None and self.active < code.shape[-1]:
            kept = code.topk(self.active, dim=-1)
            code = torch.zeros_like(code).scatter(-1, kept.indices, kept.values)
        return code

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name, to be saved."""
        return {"encoder": self.encoder, "bias": self.bias, "decoder": self.decoder, "centre": self.centre}


def read_autoencoder(folder: str) -> tuple[Autoencoder, int | None]:
    """Read an autoencoder that `sae-lens` saved (`cfg.json`, `sae_weights.safetensors`).

    Returns:
        the autoencoder, and the block whose output it was trained on, where its settings name one.

    Raises:
        UserError: a file is missing or broken, or the autoencoder is of a kind, or of a place in the model, that is not read.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserError(
            f"`objective.sae` is {folder!r}; expected a folder with {CONFIG} and {WEIGHTS}, as sae-lens saves them: give one, or "
            "leave `objective.sae` out, and a small autoencoder is trained."
        )
    config = read_object(path / CONFIG, "the settings of a sparse autoencoder")
    try:
        weights = load_file(str(path / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS} cannot be read ({error}): copy the folder again.") from None
    kind = config.get("architecture", "standard")
    if kind not in SAE_ARCHITECTURES:
        raise UserError(f"{path / CONFIG} has architecture {kind!r}; expected {', '.join(SAE_ARCHITECTURES)}.")
    norm = config.get("normalize_activations", "none")
    if norm not in ("none", "layer_norm", "expected_average_only_in"):
        raise UserError(
            f"{path / CONFIG} has normalize_activations {norm!r}; expected none, layer_norm or expected_average_only_in, whose "
            "factor sae-lens folds into the weights."
        )
    active = _active(config, kind, path)
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if kind == "jumprelu" else [])]
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise UserError(
            f"{path / WEIGHTS} has no {' and no '.join(missing)}: it is no {kind} autoencoder of sae-lens."
        )
    wide = {name: weights[name].float() for name in wanted}
    if wide["W_enc"].dim() != 2 or wide["W_dec"].shape != wide["W_enc"].t().shape:
        raise UserError(
            f"{path / WEIGHTS} has W_enc {list(wide['W_enc'].shape)} and W_dec {list(wide['W_dec'].shape)}; expected [width, "
            "features] and the other way round."
        )
    found = Autoencoder(
        wide["W_enc"],
        wide["b_enc"],
        wide["W_dec"],
        wide["b_dec"],
        bool(config.get("apply_b_dec_to_input", True)),
        wide.get("threshold"),
        active,
        norm == "layer_norm",
        bool(config.get("rescale_acts_by_decoder_norm", False)),
    )
    return found, _block(config, path)


def _active(config: Mapping[str, Any], kind: str, path: Path) -> int | None:
    """Return the number of active features per state; None: all."""
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if kind != "topk" and function == "relu":
        return None
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if kind != "topk" and function != "topk":
        raise UserError(f"{path / CONFIG} has activation_fn {function!r}; expected relu or topk.")
    if not isinstance(k, int) or k < 1:
        raise UserError(f"{path / CONFIG} has k {k!r}; expected how many features of a state are active.")
    return k


def _block(config: Mapping[str, Any], path: Path) -> int | None:
    """Return the block whose output the autoencoder reads, from the hook name in its settings."""
    name = (config.get("metadata") or {}).get("hook_name") or config.get("hook_name")
    if name is None:
        return None
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name)
    plain = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)", name)
    number = int(match[1]) - (match[2] == "pre") if match else int(plain[1]) if plain else -1
    if number < 0:
        raise UserError(
            f"{path / CONFIG} reads {name!r}; expected a block's output (blocks.N.hook_resid_post, blocks.N.hook_resid_pre with N "
            "above 0, or a block's name)."
        )
    return number


def train_autoencoder(
    states: Tensor, features: int, active: int, *, steps: int, seed: int
) -> tuple[Autoencoder, float]:
    """Train a TopK autoencoder (Gao et al. 2024, arXiv:2406.04093) on hidden states.

    Adam at 1e-3, batches of `STATES_OF_STEP` states drawn anew in each epoch, decoder rows of length 1; it starts with the
    decoder at random, the encoder its transpose and the centre at the mean. States are scaled to a mean square of 1, which is folded
    back into the weights.

    Args:
        states: [n, D].
        features: how many, S.
        active: features of a state that stay.
        steps: of Adam.
        seed: of the start and the batches.

    Returns:
        the autoencoder of the states as they are, and the share of their variance that it gives back.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = float(states.float().square().mean().sqrt().clamp_min(1e-12))
    data = states.float() / scale
    start = torch.nn.functional.normalize(torch.randn(features, data.shape[1], generator=generator), dim=-1)
    weights = (start.t(), torch.zeros(features), start, data.mean(0))
    W, e, V, b = (weight.to(data).clone().requires_grad_() for weight in weights)
    optimizer = torch.optim.Adam([W, e, V, b], lr=1e-3)
    order: list[int] = []
    for _ in progress(range(steps), total=steps, label="autoencoder"):
        if not order:
            order = torch.randperm(len(data), generator=generator).tolist()
        batch, order = data[order[:STATES_OF_STEP]], order[STATES_OF_STEP:]
        code = Autoencoder(W, e, V, b, active=active).encode(batch)
        loss = (code @ V + b - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            V.copy_(torch.nn.functional.normalize(V, dim=-1))
    with torch.no_grad():
        # act(W^T (x / c - b) + e) c is act(W^T (x - b c) + e c), as act is homogeneous
        W, e, V, b = (weight.detach() for weight in (W.contiguous(), e * scale, V.contiguous(), b * scale))
        found = Autoencoder(W, e, V, b, active=active)
        wide = states.float()
        left = (found.encode(wide) @ V + b - wide).square().sum()
        told = 1 - float(left / (wide - wide.mean(0)).square().sum().clamp_min(1e-12))
    return found, told
