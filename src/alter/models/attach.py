"""Attach PEFT adapters to a loaded model, completely or not at all."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from alter.core import UserError, nearest
from alter.storage import files

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter in a local folder.

    Raises:
        UserError: it cannot be read, or names no method of PEFT's.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / CONFIG
    text = files.read_text(path)
    try:
        config = files.from_json(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): take the adapter's folder from where it was saved.") from None
    kinds = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in kinds:
        raise UserError(
            f"{path} has peft_type {kind!r}; expected a method of PEFT's, such as ALTER or LORA."
            f"{nearest(str(kind), kinds)}"
        )
    assert isinstance(config, dict)
    return config


UNREAD = "which can run code and are not read: load the adapter where you trust it and save it again with `save_pretrained`, as safetensors."


def _check_readable(adapter: str) -> None:
    """Refuse an adapter of the hub that has pickled weights alone; whether there is one at all, loading says.

    Raises:
        UserError: it has no safetensors.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(adapter, WEIGHTS)
    except LocalEntryNotFoundError:
        return
    except EntryNotFoundError:
        raise UserError(
            f"{adapter} has no {WEIGHTS} on the hub; pickled weights {UNREAD.removeprefix('which ')}"
        ) from None
    except (OSError, ValueError):
        return


def attach(model: Any, adapter: str) -> Any:
    """Attach an adapter to a loaded model; every saved tensor must be used, and none may keep its random initialisation.

    Args:
        model: a loaded causal language model.
        adapter: local folder or hub id, of any of PEFT's methods.

    Raises:
        UserError: there is none, its configuration or its weights are broken, or they do not fit each other or the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    import alter.adapter  # noqa: F401  registers the method with PEFT
    from alter.adapter import check_keys

    folder = Path(adapter).expanduser()
    if folder.is_dir():
        read_config(folder)
        if not (folder / WEIGHTS).is_file():
            if (folder / PICKLED).is_file():
                raise UserError(f"{adapter} holds pickled weights ({PICKLED}), {UNREAD}")
            raise UserError(f"{adapter} has no {WEIGHTS}: the adapter's weights are missing. Copy its whole folder.")
    else:
        _check_readable(adapter)
    try:
        with warnings.catch_warnings():
            # said below, as an error
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, str(folder) if folder.is_dir() else adapter)
        config = tuned.active_peft_config
        if not config.is_prompt_learning:
            # what from_pretrained keeps to itself: the names that found no place
            found = tuned.load_adapter(str(folder) if folder.is_dir() else adapter, tuned.active_adapter)
            missing = found.missing_keys if config.peft_type in ("LORA", "ALTER") else []
            check_keys(f"the adapter {adapter!r}", config.peft_type.value, missing, found.unexpected_keys)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"The weights of the adapter {adapter!r} cannot be read ({error}): the file is cut off or broken. Copy it again."
        ) from None
    except KeyError as error:
        raise UserError(
            f"Cannot load the adapter {adapter!r}: its weights lack {error}, which its {CONFIG} asks for."
        ) from error
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Cannot load the adapter {adapter!r}: {reason} Expected a local folder or a hub id, of an adapter made for this "
            "model."
        ) from error
    return tuned
