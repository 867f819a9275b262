"""One step of gradient descent by Adam, and how large it is.

Source: Adam, arXiv 1412.6980; the cosine, arXiv 1608.03983.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MEMORY = (0.9, 0.99)  # of the two running means
TINY = 1e-12


def falling(step: int, steps: int, rise: int) -> float:
    """The part of the rate at ``step`` of ``steps``: up to 1 over the first ``rise``, down along a cosine to nothing."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / rise)


def adam_step(matrix: Array, gradient: Array, first: Array, second: Array, step: int, rate: float) -> None:
    """Take step number ``step``, counted from 1; all arrays are float32 of one shape and changed in place.

    Args:
        first, second: the running means of the gradient and of its square, zero before the first step.
        rate: the largest step of one number.
    """
    work = np.square(gradient)
    work -= second
    work *= np.float32(1 - MEMORY[1])
    second += work
    gradient -= first
    gradient *= np.float32(1 - MEMORY[0])
    first += gradient
    np.sqrt(np.divide(second, np.float32(1 - MEMORY[1] ** step), out=work), out=work)
    work += np.float32(TINY)
    np.divide(first, work, out=work)
    work *= np.float32(rate / (1 - MEMORY[0] ** step))
    matrix -= work
