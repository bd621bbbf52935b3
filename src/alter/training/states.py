"""Hidden states of rows in one safetensors file: written in any order, read when they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

ALIGNED = 64
"""Alignment of the numbers in the file, in bytes."""


class States:
    """Hidden states [T_i, D] of rows in one safetensors file, one row after the other; only what is read is in memory.

    The file is allocated at its full length, so that a full disk fails at once, and renamed when all rows are in it.

    Args:
        path: the file, for its owner alone.
        key: of what the states were made from.
        lengths: T_i of each row.
    """

    def __init__(self, path: Path, key: str, lengths: Sequence[int]) -> None:
        self.path, self.key = path, key
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self._places = [slice(a, b) for a, b in pairwise(ends)]
        self.tokens: int = ends[-1]
        self.tuple_length = 0
        self._all: Tensor | None = None
        self._file: int | None = None
        self._start = 0

    def __getitem__(self, row: int) -> Tensor:
        """Return [T, D] states of a row, read from the file when they are used."""
        assert self._all is not None
        return self._all[self._places[row]]

    @property
    def partial(self) -> Path:
        """Path of the file while it is being written."""
        return self.path.with_name(f".{self.path.name}.partial")

    def _header(self, states: Tensor) -> bytes:
        size = self.tokens * states.shape[-1] * states.element_size()
        kinds = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        told = {
            "__metadata__": {"key": self.key, "tuple": str(self.tuple_length)},
            "states": {
                "dtype": kinds[states.dtype],
                "shape": [self.tokens, states.shape[-1]],
                "data_offsets": [0, size],
            },
        }
        text = json.dumps(told).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        return len(text).to_bytes(8, "little") + text

    def write(self, row: int, states: Tensor) -> None:
        """Write the states [T, D] of one row; rows may come in any order.

        Raises:
            OSError: the disk cannot hold them.
        """
        if self._file is None:
            header = self._header(states)
            self._start = len(header)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.posix_fallocate(self._file, 0, self._start + self.tokens * states.shape[-1] * states.element_size())
            os.pwrite(self._file, header, 0)
        # memory-mapped tensors share the width of a token
        width = states.shape[-1] * states.element_size()
        data = states.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data
        place = self._start + self._places[row].start * width
        while len(data):
            done = os.pwrite(self._file, data, place)
            data, place = data[done:], place + done

    def close(self) -> None:
        """Finish writing: rename the file to its final name, after which rows can be read.

        Raises:
            OSError: the disk did not take all of it.
        """
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
            os.replace(self.partial, self.path)
            self._map()

    def give_up(self) -> None:
        """Stop writing and delete the partial file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.partial.unlink(missing_ok=True)

    def read(self) -> bool:
        """Open the file if it is complete and of the same rows and key; return whether it was opened."""
        try:
            return self._map()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _map(self) -> bool:
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            told = json.loads(file.read(size))
        if told["__metadata__"]["key"] != self.key or told["states"]["shape"][0] != self.tokens:
            return False
        kinds = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        kind, shape, end = kinds[told["states"]["dtype"]], told["states"]["shape"], told["states"]["data_offsets"][1]
        whole = 8 + size + end
        if os.path.getsize(self.path) != whole:
            return False
        data = torch.from_file(str(self.path), shared=False, size=whole, dtype=torch.uint8)
        self._all = data[8 + size :].view(kind).view(*shape)
        self.tuple_length = int(told["__metadata__"]["tuple"])
        return True
