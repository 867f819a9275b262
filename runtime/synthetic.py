"""Made-up feeds: what an input is called, its type and its dimensions say what to put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..graph.errors import InputError
from ..graph.model import Model
from .feeds import Feed, Feeds
from .sessions import Session, open_session
from .specs import Array, InputSpec, Shape, input_specs

_SAMPLES = 16000  # one second of audio
_IMAGE = 224
_LENGTHS = (128, 64, 32, 16, 8)
_VOCABULARY = 100
_THROUGH = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand"}


def synthetic_feeds(inputs: Sequence[InputSpec] | Model, shapes: Mapping[str, tuple[int, ...]] | None = None, *,
                    count: int = 1, seed: int = 0, model: Model | None = None, provider: str = "cpu") -> Feeds:
    """Feeds made up from the input specification, the same for the same arguments.

    Masks are ones, token type ids zeros, positions 0, 1, 2, …, other integers random token ids below 100, floats standard
    normal, booleans true (``use_cache_branch`` false). Dimensions left open: the batch is 1, a sequence 128 (the same
    wherever its symbolic name returns), an image 3×224×224, audio 16000 samples, a past of key and value states 0.

    Args:
        inputs: the inputs, or the model that has them.
        shapes: input name → shape, for inputs whose open dimensions should be something else.
        count: how many feeds.
        model: bounds token ids by the rows of the embedding they index, and shortens a sequence until the model runs
            (128, 64, 32, 16, 8): a table of positions takes no more tokens than it has rows, 77 in CLIP.
        provider: where it is tried; the CPU has no kernels for some models (in bfloat16, say).

    Raises:
        InputError: ``shapes`` names no input or contradicts a fixed dimension, or an input is no tensor.
    """
    if isinstance(inputs, Model):
        model, inputs = inputs, input_specs(inputs)
    needed = [spec for spec in inputs if not spec.optional or spec.name in (shapes or {})]
    for spec in needed:
        if not spec.is_tensor or spec.dtype == object:
            raise InputError(f"input '{spec.name}' is {spec.onnx_type}, which cannot be made up: give real inputs (--data)")
    rows = {spec.name: _embedding_rows(model, spec.name) for spec in needed}

    def feeds_of(tokens: int) -> tuple[Feeds, bool]:
        dimensions = _Dimensions(needed, shapes or {}, tokens)
        resolved = dimensions.resolved()

        def make(index: int) -> Feed:
            random = np.random.default_rng([seed, index])
            return {spec.name: _array(spec, resolved[spec.name], rows[spec.name], random) for spec in needed}

        return Feeds([partial(make, index) for index in range(count)], synthetic=True), dimensions.open

    longest, is_open = feeds_of(_LENGTHS[0])
    if model is None or not is_open or not count:
        return longest
    session = open_session(model, provider=provider)
    return next((feeds for feeds in (feeds_of(tokens)[0] for tokens in _LENGTHS) if _runs(session, feeds[0])), longest)


def _runs(session: Session, feed: Feed) -> bool:
    try:
        session.run(feed)
    except InputError:
        return False
    return True


class _Dimensions:
    """Gives every open dimension a number, the same number wherever its symbolic name returns."""

    def __init__(self, inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], tokens: int) -> None:
        self.inputs = inputs
        self.shapes = shapes
        self.known: dict[str, int] = {}
        self.batch, self.tokens = 1, tokens
        self.open = False  # whether a dimension became ``tokens`` by default
        names = {spec.name: spec for spec in inputs}
        for name, shape in shapes.items():
            if name not in names:
                raise InputError(f"shape of '{name}': the model has no such input: its inputs are {', '.join(names)}")
            self._learn(names[name], shape)

    def resolved(self) -> dict[str, tuple[int, ...]]:
        """Input name → shape."""
        return {spec.name: self.shapes.get(spec.name) or self._shape(spec) for spec in self.inputs}

    def _learn(self, spec: InputSpec, shape: tuple[int, ...]) -> None:
        declared: Shape = spec.shape if spec.shape is not None else (None,) * len(shape)
        if len(declared) != len(shape) or any(isinstance(dim, int) and dim != size
                                              for dim, size in zip(declared, shape, strict=True)):
            raise InputError(f"shape of '{spec.name}': expected {spec.shape_text}, given {list(shape)}")
        for dim, size in zip(declared, shape, strict=True):
            if isinstance(dim, str):
                self.known[dim] = size
        if shape and not isinstance(declared[0], int):
            self.batch = shape[0]
        if len(shape) == 2 and spec.dtype.kind == "i" and not isinstance(declared[1], int):
            self.tokens = shape[1]

    def _shape(self, spec: InputSpec) -> tuple[int, ...]:
        dims = enumerate(spec.shape or ())
        return tuple(dim if isinstance(dim, int) else self._size(spec, axis, dim) for axis, dim in dims)

    def _size(self, spec: InputSpec, axis: int, dim: str | None) -> int:
        if dim is not None and dim in self.known:
            return self.known[dim]
        size = self._default(spec, axis, dim or "")
        if dim is not None:
            self.known[dim] = size
        return size

    def _default(self, spec: InputSpec, axis: int, dim: str) -> int:
        """What an open dimension is when nothing says otherwise."""
        if "+" in dim:
            parts = [part.strip() for part in dim.split("+")]
            return sum(int(part) if part.isdigit() else self._size(spec, axis, part) for part in parts)
        if "batch" in dim.lower() or (axis == 0 and len(spec.shape or ()) > 1):
            return self.batch
        if "past" in dim.lower() or (spec.name.startswith("past") and axis > 0):
            return 0
        floating = spec.dtype.kind == "f"
        if floating and len(spec.shape or ()) == 4:
            channels = 3 if (spec.shape or ())[-1] in (1, 3, 4) else 1
            return 3 if axis == channels else _IMAGE
        audio = ("audio", "wave", "samples", "input_values")
        if floating and any(word in f"{spec.name} {dim}".lower() for word in audio):
            return _SAMPLES
        self.open = True
        return self.tokens


def _array(spec: InputSpec, shape: tuple[int, ...], rows: int | None, random: np.random.Generator) -> Array:
    name = spec.name.lower()
    if spec.dtype.kind == "b":
        return np.full(shape, "use_cache" not in name)
    if "mask" in name:
        return np.ones(shape, spec.dtype)
    if spec.dtype.kind in "iu":
        if "token_type" in name or "segment" in name:
            return np.zeros(shape, spec.dtype)
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1], dtype=spec.dtype), shape).copy()
        return random.integers(0, max(1, min(_VOCABULARY, rows or _VOCABULARY)), shape).astype(spec.dtype)
    return np.asarray(random.standard_normal(shape)).astype(spec.dtype)


def _embedding_rows(model: Model | None, name: str) -> int | None:
    """The fewest rows of a constant that a Gather indexes with the input ``name``; None where there is none."""
    if model is None:
        return None
    pending: list[Any] = [tensor for tensor in model.graph.inputs if tensor.name == name]
    fewest: int | None = None
    seen: set[int] = set()
    while pending:
        tensor = pending.pop()
        for node in tensor.outputs:
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op in _THROUGH:
                pending += node.outputs
            elif node.op == "Gather" and node.inputs[1] is tensor and isinstance(node.inputs[0], gs.Constant):
                found = int(node.inputs[0].shape[int(node.attrs.get("axis", 0))])
                fewest = found if fewest is None else min(fewest, found)
    return fewest
