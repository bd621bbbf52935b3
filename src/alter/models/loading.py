"""Models by name: a folder, a hub id or a shipped model, with the adapter on it."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict

from alter.core import UserError, memory, nearest
from alter.data import TemplateArguments, ensure_pad_token, set_template_arguments
from alter.models import devices, gguf, precision, quantized
from alter.models.given import check_held, copied
from alter.models.naming import is_local, model_folder, shipped_model
from alter.models.quantized import Bits
from alter.models.tokenizers import first_line, read_tokenizer
from alter.storage import files


class ModelSettings(BaseModel):
    """The model to look at: settings of every command that loads one."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model: local folder, hub id, file.gguf, hub-id:file.gguf, or builtin:NAME."""
    adapter: str | None = None
    """Adapter on top of it: local folder or hub id."""
    merged: bool = False
    """Fold the adapter into the weights first, where that is exact; a routed adapter is refused."""
    dtype: str = "auto"
    """Number format: auto, float32, bfloat16, float16."""
    quantization: Bits | None = None
    """Hold the linear layers of the model in 4bit or 8bit (bitsandbytes), the rest in bfloat16 unless dtype says."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""
    chat_template_kwargs: TemplateArguments = []

    def alike(self, model: str, adapter: str | None = None) -> ModelSettings:
        """Return another model with the same loading settings."""
        same = self.model_dump(include={"dtype", "quantization", "device", "chat_template_kwargs"})
        return ModelSettings(model=model, adapter=adapter, **same)

    def load(self) -> tuple[Any, Any]:
        """Return model and tokenizer.

        Raises:
            UserError: see `load_model`; or `merged` without an adapter, or with one that cannot be merged.
        """
        from alter.models.guards import is_form

        if not self.merged:
            return load_model(
                self.model, self.adapter, self.dtype, self.device, self.quantization, self.chat_template_kwargs
            )
        if self.adapter is None:
            raise UserError("`merged` folds an adapter into the weights: give one with `adapter`, or leave it out.")
        if is_form(self.adapter):
            raise UserError(f"`merged`: {self.adapter} acts on the logits or by the input, so no weights hold it.")
        if self.quantization is not None:
            raise UserError("`merged` is not exact on quantised weights: leave `merged` or `quantization` out.")
        network, tokenizer = load_model(
            self.model, self.adapter, self.dtype, self.device, template=self.chat_template_kwargs
        )
        try:
            return network.merge_and_unload(), tokenizer
        except NotImplementedError as error:
            raise UserError(f"`merged`: {error}") from None

    def load_tokenizer(self) -> Any:
        """Return the model's tokenizer alone, without reading its weights.

        Raises:
            UserError: no such model, its tokenizer cannot be read, or variables that its chat template does not have.
        """
        name, packed_file = _located(self.model, self.quantization)
        inside = memory.held(name)
        try:
            if inside is not None:
                tokenizer = copy.deepcopy(inside[1])
            else:
                tokenizer = read_tokenizer(name) if packed_file is None else gguf.load_tokenizer(packed_file)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise _missing(name, error) from error
        set_template_arguments(tokenizer, self.chat_template_kwargs)
        return tokenizer

    def identity(self, memo: Path | None = None) -> dict[str, str | None]:
        """Return digests of what is loaded, `weights` and `adapter`: a folder's by the contents of its files.

        A hub id is known by its commit. `adapter` is None without one; either is "unknown" if the hub does not answer.

        Args:
            memo: folder in which the digests of files are kept (see `files.folder_digest`).

        Raises:
            UserError: no such folder, or not one of a model or an adapter.
        """
        from alter.models.guards import FORM_FILE, is_form

        needs = "adapter_config.json" if self.adapter is None or not is_form(self.adapter) else FORM_FILE
        adapter = None if self.adapter is None else _content(self.adapter, needs, "adapter", memo)
        return {"weights": _content(shipped_model(self.model), "config.json", "model", memo), "adapter": adapter}

    def place(self) -> str:
        """Return the type of device that the model is loaded to: results of one type do not stand for another's."""
        place = devices.device_of(self.device)
        if place.type == "cuda":
            return f"cuda {torch.cuda.get_device_name(place)}"
        return f"{place.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _content(name: str, needs: str, what: str, memo: Path | None) -> str:
    if memory.held(name) is not None:
        return "unknown"  # a fingerprint is of a sample of the weights: no result is kept under it
    if (file := gguf.gguf_place(name)) is not None and file.path is not None:
        return files.file_digest(file.path)
    if is_local(name):
        return files.folder_digest(model_folder(name, needs, what), memo)
    place = gguf.gguf_place(name)
    if place is not None:
        name, needs = place
    from huggingface_hub import hf_hub_download

    try:
        commit = Path(hf_hub_download(name, needs)).parent.name
        return f"{name}@{commit}" if place is None else f"{name}@{commit}:{needs}"
    except (OSError, ValueError):  # no network, no such name: loading, which comes next, says what is wrong
        return "unknown"


def load_model(
    model: str,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantization: Bits | None = None,
    template: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, with an adapter if one is named, ready for evaluation.

    Args:
        model: local folder, hub id, `file.gguf` or `hub-id:file.gguf` (dequantised), or `builtin:NAME` for one that comes
            with this package.
        adapter: local folder or hub id of a PEFT adapter made for that model (ALTER's or any other).
        dtype: "auto" keeps the checkpoint's number format, but on a CPU fp16 becomes fp32, and so does bf16 where the CPU has
            no instructions for it and the memory suffices; or "float32", ...
        device: "cpu", "cuda", "cuda:1", "mps", ...; None takes the GPU if there is one. Under several processes each
            takes its own.
        quantization: hold the linear layers in "4bit" or "8bit" (bitsandbytes).
        template: variables of the chat template (see `alter.data.chat.set_template_arguments`).

    Raises:
        UserError: no such model, adapter, number format or device, an adapter without its model, weights that are
            NaN or infinite, quantisation of what is quantised already or without bitsandbytes, or variables that the
            chat template does not have.
    """
    from alter.models.attach import attach
    from alter.models.guards import is_form, load_form

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        choices = ["auto", "float32", "bfloat16", "float16"]
        raise UserError(f"No number format {dtype!r}: expected one of {', '.join(choices)}.{nearest(dtype, choices)}")
    if quantization not in (None, *get_args(Bits)):
        raise UserError(f"`quantization` is {quantization!r}; expected 4bit, 8bit or none at all.")
    place = devices.device_of(device)
    model, packed_file = _located(model, quantization)
    form = adapter is not None and is_form(adapter)
    if adapter is not None and is_local(adapter) and not form:
        adapter = model_folder(adapter, "adapter_config.json", "adapter")
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantization is not None:
        options = quantized.loading(quantization, dtype, place)
    network, tokenizer = _read(model, packed_file, options)
    packed = getattr(network, "hf_quantizer", None)
    if quantization is not None and packed is not None and packed.pre_quantized:
        raise UserError(f"{model} is stored in quantised form already: leave `quantization` out.")
    wide = precision.wanted(network, place) if packed is None and dtype == "auto" else None
    network = network if wide is None else network.to(wide)
    quantized.keep_gradients(network)
    if adapter is not None and not form and _fit_vocabulary(network, Path(adapter)):
        tokenizer = read_tokenizer(str(adapter))
    ensure_pad_token(tokenizer)
    set_template_arguments(tokenizer, template)
    _pad_inside(network, tokenizer)
    if adapter is not None:
        network = load_form(network, adapter, tokenizer) if form else attach(network, adapter)
    _check_finite(network, adapter or model)
    return network.to(place).eval(), tokenizer


def _check_finite(network: Any, what: str) -> None:
    """Refuse NaN and infinite weights; `what` names their source in the message."""
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"The weights of {what} are broken: {name} holds NaN or infinite values. "
                "Take an earlier checkpoint, or train again with a lower learning rate."
            )


def _located(model: str, quantization: Bits | None) -> tuple[str, gguf.GgufPlace | None]:
    """Return a model's name or folder, and the place of its GGUF file if it is one.

    Raises:
        UserError: there is no such folder, it was in memory once, or it is in memory or quantised and `quantization` is asked for.
    """
    check_held(model)
    model = shipped_model(model)
    if memory.held(model) is not None:
        if quantization is not None:
            raise UserError("`quantization` is for models that are loaded by name: this one is in memory already.")
        return model, None
    packed_file = gguf.gguf_place(model)
    if packed_file is not None and quantization is not None:
        raise UserError(f"{model} is stored in quantised form already: leave `quantization` out.")
    if packed_file is None and is_local(model):
        model = model_folder(model, "config.json", "model")
    return model, packed_file


def _read(model: str, packed_file: gguf.GgufPlace | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a model and its tokenizer from memory, a GGUF file, a folder or the hub.

    Args:
        model, packed_file: what `_located` gives.
        options: number format and quantisation, as transformers takes them.

    Raises:
        UserError: there is none, or it is broken.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    inside = memory.held(model)
    if inside is not None:
        return copied(inside, options["dtype"])
    try:
        if packed_file is not None:
            return gguf.load_file(packed_file, **options)
        check_json(model)
        network, found = AutoModelForCausalLM.from_pretrained(
            model, use_safetensors=True, output_loading_info=True, **options
        )
        _check_whole(network, model, found)
        tokenizer = read_tokenizer(model)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"The weights of the model {model!r} cannot be read ({error}): a file is cut off or broken. Copy it again."
        ) from None
    except (OSError, ValueError) as error:
        raise _missing(model, error) from error
    except torch.OutOfMemoryError:
        raise
    except (
        StrictDataclassError,
        AssertionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
    ) as error:
        # what a model's own code raises where a value of its configuration makes no sense
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"The model {model!r} cannot be built as its config.json says ({said}): a value there is "
            "wrong. Copy the whole folder again."
        ) from error
    return network, tokenizer


OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
"""Files of a model's folder that hold a JSON object, where they are there; the libraries that read them take that for granted."""


def check_json(folder: str) -> None:
    """Refuse a local folder whose configuration is truncated, nested too deep or not an object.

    Raises:
        UserError: names the file.
    """
    for name in OBJECTS:
        path = Path(folder).expanduser() / name
        if path.is_file():
            files.read_object(path, "what save_pretrained writes")


def load_classifier(model: str, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """Load a sequence classifier and its tokenizer, ready for evaluation, in float32.

    Raises:
        UserError: no such model, one that is no classifier, or a tokenizer that needs the extra `nli`.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        if is_local(model):
            model = model_folder(model, "config.json", "model")
        check_json(model)
        network, found = AutoModelForSequenceClassification.from_pretrained(
            model, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        _check_whole(network, model, found)
        tokenizer = read_tokenizer(model)
    except SafetensorError as error:
        raise UserError(f"The weights of the classifier {model!r} cannot be read ({error}). Copy it again.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Cannot load the classifier {model!r}: {first_line(error)} Expected a local folder or a hub id."
        ) from error
    return network.to(devices.device_of(None if device is None else str(device))).eval(), tokenizer


def _check_whole(network: Any, name: str, found: Mapping[str, Any]) -> None:
    """Refuse a model with a tensor left at random initialisation, or a block missing from its weights.

    Other tensors without a place are common: text models are read out of ones that also see.
    """
    missing = sorted(found["missing_keys"])
    lists = tuple(f"{path}." for path, part in network.named_modules() if isinstance(part, torch.nn.ModuleList))
    left = sorted(key for key in found["unexpected_keys"] if key.startswith(lists))
    if missing or left:
        what, which = ("lack", missing) if missing else ("also hold", left)
        raise UserError(
            f"The weights of {name} do not fit its config.json: they {what} {which[0]}"
            f"{f' and {len(which) - 1} more' if len(which) > 1 else ''}. Copy the whole folder again."
        )


def _fit_vocabulary(network: Any, adapter: Path) -> bool:
    """Resize a model's embeddings to those of a local adapter; return whether the adapter brings a tokenizer for them."""
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return False
    embeddings = network.get_input_embeddings()
    name = next(name for name, part in network.named_modules() if part is embeddings)
    try:
        with safe_open(path, "pt") as weights:
            names = list(weights.keys())
            own = [key for key in names if key.removesuffix(".weight").removesuffix(".base_layer").endswith(name)]
            rows = weights.get_slice(own[0]).get_shape()[0] if own else len(embeddings.weight)
    except SafetensorError:
        return False  # attaching, which comes next, says what is wrong
    if rows == len(embeddings.weight):
        return False
    network.resize_token_embeddings(rows, mean_resizing=False)
    return (adapter / "tokenizer_config.json").is_file()


def _pad_inside(network: Any, tokenizer: Any) -> None:
    """Choose a padding token that has an embedding: the end of a sequence, or token 0. Padding is masked by length."""
    rows = network.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        end = tokenizer.eos_token_id
        inside = end if isinstance(end, int) and end < rows else 0
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(inside)


def _missing(model: str, error: Exception) -> UserError:
    return UserError(
        f"Cannot load the model {model!r}: {first_line(error)} Expected a local folder or a hub id (owner/name)."
    )
