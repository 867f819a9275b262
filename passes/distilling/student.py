"""How far a model is from the original, and which way its weights have to go.

    L = Σ over ends  Σ_t w_t ‖y_t − t_t‖²            w_t = 1 / (rows · (‖t_t‖² + 1e-3 · average)),  0 for padding
                  or Σ_t w_t KL(softmax t_t ‖ softmax y_t)    w_t = 1 / rows, where the end is logits

The ends are the outputs of the model, or where no derivative leads there the last values that one leads to (see
:mod:`~ffnfold.graph.gradient.backward`). In values of four dimensions (images) all rows count alike.

Source: distillation, arXiv 1503.02531 (at temperature 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.errors import InputError
from ...graph.export import constants_read
from ...graph.gradient.backward import OLDEST, Path, add_gradients, path_from
from ...graph.gradient.tape import NoDerivativeError
from ...graph.model import Model
from ...runtime import open_session
from ...runtime.on_device import OnDevice
from ...runtime.ort_values import to_array
from ...runtime.padding import Padding
from ..base import Context, Refused

Array = npt.NDArray[Any]
_LOGITS = "logits"
_FLOOR = 1e-3  # of the average, added to the size of each row
_MOST_WITHOUT = 64  # nodes whose rule does not cover them


class Student:
    """A model whose weights are given at each run, beside the original.

    Args:
        model: as it stands.
        original: has values of the same names.
        weights: names of float32 initializers of the main graph.

    Attributes:
        weights: those of ``weights`` that anything compared depends on.
        ends: what is compared.
        blocked: operators without a derivative that the ends lie in front of.
    """

    def __init__(self, model: Model, original: Model, weights: Sequence[str], context: Context) -> None:
        trial, path, losses, gradients = _with_gradients(model, original, weights)
        self.ends, self.blocked, self.weights = path.ends, path.blocked, list(gradients)
        self._losses = losses
        self._as_logits = _logits(model)
        self._sums = {name: _so_far(name) for name in gradients}
        given = {_target(end) for end in path.ends} | {_row_weight(end) for end in path.ends}
        self._session = OnDevice(open_session(
            trial, provider=context.provider, threads=context.threads, outputs=[*losses, *gradients.values()],
            inputs=dict.fromkeys([*given, *gradients, *self._sums.values()], onnx.TensorProto.FLOAT), use_tf32=True))
        self._teacher = OnDevice(open_session(original, provider=context.provider, threads=context.threads,
                                              outputs=list(path.ends), only=True, use_tf32=True))
        self._gradients = gradients
        self._session.hold({_so_far(name): np.zeros(_shape_of(model, name), np.float32) for name in gradients})
        self._sum: dict[str, Any] = {}
        self._failed = False

    def move_to(self, weights: Mapping[str, Any]) -> None:
        """Let the weights be these from now on, ``OrtValue``s or arrays that stay as they are. The sum begins anew."""
        self._session.hold({name: weights[name] for name in self.weights})
        self._sum = {}
        self._failed = False

    def loss(self, feed: Mapping[str, Any]) -> float:
        """L on one feed; infinite where it is no number.

        Raises:
            InputError: ONNX Runtime fails.
        """
        return self._run(feed, {}, [])[0]

    def add(self, feed: Mapping[str, Any], share: float = 1.0) -> None:
        """Add ``share`` times the gradient of L on one feed to the sum, on the device."""
        loss, found = self._run(feed, {self._sums[name]: value for name, value in self._sum.items()},
                                list(self._gradients.values()), share)
        if np.isfinite(loss):
            self._sum = {name: found[self._gradients[name]] for name in self.weights}
        else:
            self._failed = True

    def gradient(self) -> dict[str, Any]:
        """The sum, ``OrtValue``s by name; nothing where no feed was added or one had no loss."""
        return {} if self._failed else dict(self._sum)

    def targets(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """What the original gives at the ends, ``OrtValue``s by name."""
        return self._teacher(feed, self.ends)

    def _run(self, feed: Mapping[str, Any], more: Mapping[str, Any], wanted: list[str],
             share: float = 1.0) -> tuple[float, dict[str, Any]]:
        padding = Padding(feed)
        targets = self.targets(feed)
        given: dict[str, Any] = {**feed, **more}
        for end, target in targets.items():
            if target.element_type() != onnx.TensorProto.FLOAT:
                raise InputError(f"the original has '{end}' in another type than float32: name another teacher")
            counted = row_weights(target, padding) if end not in self._as_logits else even_weights(target, padding)
            if counted is None:
                return np.inf, {}
            given |= {_target(end): target, _row_weight(end): np.asarray(counted * np.float32(share))}
        found = self._session(given, [*self._losses, *wanted], of=feed)
        loss = sum(float(to_array(found[name])) for name in self._losses)
        return (loss if np.isfinite(loss) else np.inf), found


def why_no_student(model: Model, original: Model, weights: Sequence[str]) -> Refused | None:
    """Why the way from ``weights`` cannot be gone back; None where it can."""
    if model.opset < OLDEST:
        return Refused(f"opset {model.opset}: derivatives are written in opset {OLDEST} or later: export with that")
    path = path_from(model, weights)
    if _compared(path, original).ends:
        return None
    behind = f"no derivative leads through {', '.join(path.blocked)}" if path.blocked else "no output depends on them"
    return Refused(behind, weights[0])


def row_weights(target: Any, padding: Padding) -> Array | None:
    """w of each row of an ``OrtValue``: float32, of its shape but 1 along the last axis; None where what counts is not finite."""
    values = to_array(target)
    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    even = even_weights(target, padding)
    if even is None:
        return None
    kept = even.reshape(-1) > 0
    if not np.isfinite(rows[kept]).all():
        return None
    sizes = np.einsum("rd,rd->r", rows, rows, dtype=np.float64)
    average = max(float(sizes[kept].mean()), 1e-30)
    counted = 1 / (np.full(len(rows), average) if values.ndim > 3 else sizes + _FLOOR * average)
    return np.where(kept, even.reshape(-1) * counted, 0).astype(np.float32).reshape(even.shape)


def even_weights(target: Any, padding: Padding) -> Array | None:
    """1 / rows for each row that is no padding; None where there is none."""
    shape = tuple(target.shape())
    leading = shape[:-1]
    kept = padding.kept(shape) if len(shape) > 1 else None
    counted = np.ones(int(np.prod(leading)), np.float32) if kept is None else kept.astype(np.float32)
    return (counted / counted.sum()).reshape((*leading, *[1] * min(len(shape), 1))) if counted.any() else None


def _with_gradients(model: Model, original: Model, weights: Sequence[str]) -> tuple[Model, Path, list[str], dict[str, str]]:
    """A copy of ``model`` that computes them; the path; the names of the parts of L and of the gradients."""
    without: set[str] = set()
    while True:
        trial = model.copy()
        path = _compared(path_from(trial, weights, frozenset(without)), original)
        seeds, losses = _seeds(trial, path.ends)
        try:
            gradients = add_gradients(trial, seeds, weights, frozenset(without))
            return trial, path, losses, _added_up(trial, gradients)
        except NoDerivativeError as error:
            if len(without) == _MOST_WITHOUT:
                raise
            without.add(str(error))


def _added_up(model: Model, gradients: Mapping[str, str]) -> dict[str, str]:
    """Weight → the sum of its gradient and of what is given as the sum so far."""
    values = {tensor.name: tensor for node in model.graph.nodes for tensor in node.outputs}
    build = Builder(model, model.graph, "distill")
    return {name: build.op("Add", values[gradient], gs.Variable(_so_far(name))).name for name, gradient in gradients.items()}


def _shape_of(model: Model, name: str) -> tuple[int, ...]:
    return next(tuple(constant.shape) for constant in constants_read(model.graph.nodes) if constant.name == name)


def _compared(path: Path, original: Model) -> Path:
    """``path`` with those of its ends that ``original`` has as well."""
    there = {tensor.name for node in original.graph.nodes for tensor in node.outputs}
    return Path(tuple(end for end in path.ends if end in there), path.blocked)


def _seeds(model: Model, ends: Sequence[str]) -> tuple[dict[str, gs.Tensor], list[str]]:
    """∂L/∂end for each end (of half of L where it is a square), and the parts of L; what does not count may be no number."""
    values = {tensor.name: tensor for node in model.graph.nodes for tensor in node.outputs}
    build = Builder(model, model.graph, "distill")
    zero, as_logits = build.number(0, "zero"), _logits(model)
    seeds: dict[str, gs.Tensor] = {}
    losses = []
    for end in ends:
        value, given, counted = values[end], gs.Variable(_target(end)), gs.Variable(_row_weight(end))
        target = build.op("Reshape", given, build.op("Shape", value))  # fails where the original has it in another size
        counts = build.op("Greater", counted, zero)
        if end in as_logits:
            ours, theirs = (build.op("LogSoftmax", x, axis=-1) for x in (value, target))
            chances = build.op("Exp", theirs)
            apart = build.op("Where", build.op("Greater", chances, zero), build.op("Sub", theirs, ours), zero)
            lost = build.op("Mul", chances, apart)
            seed = build.op("Sub", build.op("Exp", ours), chances)
        else:
            seed = build.op("Sub", value, target)
            lost = build.op("Mul", seed, seed)
        seeds[end], lost = (build.op("Mul", build.op("Where", counts, each, zero), counted) for each in (seed, lost))
        losses.append(build.op("ReduceSum", lost, keepdims=0).name)
    return seeds, losses


def _logits(model: Model) -> frozenset[str]:
    """The output called ``logits``, where its last axis can be classes."""
    shapes = {tensor.name: tensor.shape for tensor in model.graph.outputs}
    shape = shapes.get(_LOGITS)
    classes = shape is None or (2 <= len(shape) <= 3 and shape[-1] != 1)
    return frozenset((_LOGITS,)) if _LOGITS in shapes and classes else frozenset()


def _target(end: str) -> str:
    return f"distill/target/{end}"


def _row_weight(end: str) -> str:
    return f"distill/weight/{end}"


def _so_far(name: str) -> str:
    return f"distill/so far/{name}"
