"""`alter export`: models and adapters in forms that other programs read.

`gguf` writes a model for llama.cpp and Ollama, with its tokenizer from `vocabulary` and, in 4 and 5 bits, the values
of `rounding`; `loras` writes an adapter as plain LoRAs; `run` is the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.exporting import loras as loras
    from alter.exporting.run import Export as Export
    from alter.exporting.run import export as export

lazy(globals())
