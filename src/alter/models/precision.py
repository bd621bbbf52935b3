"""Whether to compute in 16 bits: on a CPU without instructions for it, PyTorch takes ten times as long."""

from __future__ import annotations

import functools

import psutil
import torch

from alter.core import show


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the device multiplies matrices of this dtype at least about as fast as float32.

    Of a CPU without AVX-512, or Arm's instructions for bfloat16, that is false for bfloat16: linear layers of 64 to 512 tokens
    take 6 to 10 times as long (`docs/results/cost.md`). It is false for float16 on every CPU, where some operations are missing.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wanted(model: torch.nn.Module, device: torch.device) -> torch.dtype | None:
    """Return the dtype to convert a model to where none was asked for; None: it stays as stored.

    That is float32 on a CPU that does not multiply in the model's own. Of bfloat16 it is so only where the wider weights take
    less than half of the free memory.
    """
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if multiplies(own, device):
        return None
    size = 4 * sum(p.numel() for p in model.parameters())
    if own == torch.float16:
        return torch.float32
    if size >= psutil.virtual_memory().available // 2:
        return None
    _say_wide()
    return torch.float32


@functools.cache
def _say_wide() -> None:
    """Report, once per process, that a model takes twice the memory of its file."""
    show("This processor is slow at bfloat16: models are loaded in float32. `dtype` bfloat16 keeps it.", stderr=True)


def autocasts(asked: bool, device: torch.device) -> bool:
    """Tell whether training that asks for bfloat16 autocast gets it on this device; report it where it does not."""
    if asked and not multiplies(torch.bfloat16, device):
        show("This processor multiplies bfloat16 slower than float32: training computes in float32.", stderr=True)
        return False
    return asked
