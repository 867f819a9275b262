"""Steps of gradient descent by Adam whose numbers stay on the device: the update is a graph that ONNX Runtime runs.

So neither the weights nor their gradient and its two means are copied to the processor and back at each step.

Source: Adam, arXiv 1412.6980.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ...graph.model import Model
from ...runtime import open_session
from ...runtime.on_device import OnDevice
from ...runtime.ort_values import to_array
from ..base import Context
from ..fitting.adam import MEMORY, TINY

Array = npt.NDArray[Any]
_FLOAT = onnx.TensorProto.FLOAT
_MATRICES = ("weight", "gradient", "first", "second", "free")
_NUMBERS = ("evening", "rate")
_NODES = (
    ("Mul", "gradient free", "g"),
    ("ReduceSumSquare", "g", "size"),
    ("Sub", "g first", "a"), ("Mul", "a fresh", "b"), ("Add", "first b", "first_after"),
    ("Mul", "g g", "c"), ("Sub", "c second", "d"), ("Mul", "d fresh_square", "e"), ("Add", "second e", "second_after"),
    ("Mul", "second_after evening", "f"), ("Sqrt", "f", "h"), ("Add", "h tiny", "i"), ("Div", "first_after i", "j"),
    ("Mul", "j rate", "k"), ("Sub", "weight k", "weight_after"))
_AFTER = ("weight_after", "first_after", "second_after")


class Steps:
    """Weights that move, and the running means of their gradient and of its square.

    Args:
        weights: float32, by name.
        free: of some weights, which numbers may move: bool, of their shape.

    Attributes:
        weights: as they are now, ``OrtValue``s by name; those of before a step stay what they were.
        taken: how many steps were taken.
    """

    def __init__(self, weights: Mapping[str, Array], free: Mapping[str, Array], context: Context) -> None:
        self._update = OnDevice(open_session(_graph(), provider=context.provider, threads=context.threads))
        self._free = {name: self._put("free", free.get(name, np.ones((), bool))) for name in weights}
        zeros = {(kind, name): np.zeros_like(array) for name, array in weights.items() for kind in ("first", "second")}
        self.restore({**{("weight", name): array for name, array in weights.items()}, **zeros}, 0)

    def restore(self, state: Mapping[tuple[str, str], Array], taken: int) -> None:
        """Go on from what :meth:`state` gave after so many steps."""
        by_kind: dict[str, dict[str, Any]] = {"weight": {}, "first": {}, "second": {}}
        for (kind, name), array in state.items():
            by_kind[kind][name] = self._put(kind, array)
        self.weights, self._first, self._second = by_kind.values()
        self.taken = taken

    def state(self) -> dict[tuple[str, str], Array]:
        """Copies of all there is: (``weight``, ``first`` or ``second``; name of the weight) → array."""
        kinds = {"weight": self.weights, "first": self._first, "second": self._second}
        return {(kind, name): np.array(to_array(value)) for kind, values in kinds.items() for name, value in values.items()}

    def step(self, gradient: Mapping[str, Any], rates: Mapping[str, float]) -> bool:
        """Take one step, or none where there is no gradient, or the sum of its squares is not finite in float32.

        Args:
            gradient: ``OrtValue``s by name.
            rates: the largest step of one number, by name.

        Returns:
            Whether it was taken.
        """
        number = self.taken + 1
        evening = np.float32(1 / (1 - MEMORY[1] ** number))
        found = {}
        for name in gradient:
            given = {"weight": self.weights[name], "gradient": gradient[name], "first": self._first[name],
                     "second": self._second[name], "free": self._free[name],
                     "evening": np.asarray(evening), "rate": np.asarray(rates[name] / (1 - MEMORY[0] ** number), np.float32)}
            found[name] = self._update(given, [*_AFTER, "size"])
        if not found or not all(np.isfinite(to_array(each["size"])).all() for each in found.values()):
            return False
        for name, each in found.items():
            self.weights[name], self._first[name], self._second[name] = (each[output] for output in _AFTER)
        self.taken = number
        return True

    def _put(self, kind: str, array: Array) -> Any:
        return self._update.value(kind, np.array(array, np.float32))


def _graph() -> Model:
    """One step of one weight, of any shape."""
    numbers = {"fresh": 1 - MEMORY[0], "fresh_square": 1 - MEMORY[1], "tiny": TINY}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, given.split(), [made], **({"keepdims": 0} if op.startswith("Reduce") else {}))
         for op, given, made in _NODES], "adam",
        [*(onnx.helper.make_tensor_value_info(name, _FLOAT, None) for name in _MATRICES),
         *(onnx.helper.make_tensor_value_info(name, _FLOAT, []) for name in _NUMBERS)],
        [onnx.helper.make_tensor_value_info(name, _FLOAT, None) for name in (*_AFTER, "size")],
        [onnx.numpy_helper.from_array(np.array(value, np.float32), name) for name, value in numbers.items()])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return Model(proto, {}, Path("adam"), False)
