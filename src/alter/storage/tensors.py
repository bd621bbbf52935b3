"""Store tensors in a file under a key, readable by its owner alone; read them back only if intact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alter.core import warn
from alter.storage.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor


def _digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def keep(path: Path, tensors: Mapping[str, Tensor], key: str, **metadata: str) -> None:
    """Write tensors to one safetensors file, atomically, with the key and a digest of their values.

    Args:
        path: the file; its mode is 0600.
        tensors: by name.
        key: of what they were made from.
        metadata: further texts to keep with them.
    """
    from safetensors.torch import save

    whole = {name: value.contiguous() for name, value in tensors.items()}
    content = save(whole, metadata={**metadata, "key": key, "digest": _digest(whole)})
    write_atomic(path, content, private=True)


def kept(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Read what `keep` wrote under the same key, with its metadata.

    Returns:
        None where there is no such file, it was made from anything else, or it is not what was written: a byte of it was
        changed, or its end is missing; that is reported.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        warn(f"{path} cannot be read ({error}): it is made again.")
        return None
    if metadata.get("digest") != _digest(tensors):
        warn(f"{path} is not what was written to it: it is made again.")
        return None
    return tensors, metadata
