"""The array type of everything that is computed with numpy outside of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
"""Numbers in float64; the docstring of what takes or returns them says the shape."""
