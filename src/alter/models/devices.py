"""The device that a model is loaded to."""

from __future__ import annotations

import errno
import os

import torch

from alter.core import UserError, processes


def device_of(device: str | None) -> torch.device:
    """Return the device that a setting names; without one this process's GPU, else the CPU.

    Raises:
        UserError: no such device, or it is not in this machine.
    """
    if device in (None, "cuda"):
        device = processes.place() if device == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        count = torch.get_device_module(place).device_count()
    except RuntimeError:
        # no such name, or one without devices, as meta
        raise UserError(f"No device {device!r}: expected cpu, cuda, cuda:0 or mps.") from None
    if not count:
        # a machine's lack, which another machine of a cluster does not have (`passing`)
        raise UserError(
            f"Device {device!r} was asked for, but there is no {place.type.upper()} here: use `device` cpu."
        ) from OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    if (place.index or 0) >= count:
        raise UserError(f"Device {device!r} was asked for, but the last one here is {place.type}:{count - 1}.")
    return place
