"""The weights of a block seen neuron by neuron, a tile at a time: never a matrix as a whole where it lies plainly in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.constant import Folded, fold
from ...graph.linear import Linear
from ...graph.weights import ComputedValues, Values

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
_TILE = 1 << 20  # elements


@dataclass(frozen=True)
class NeuronWeight:
    """A matrix with a row or a column for each neuron.

    Attributes:
        folded: the matrix as its node reads it.
        axis: which axis counts the neurons.
    """

    folded: Folded
    axis: int

    @classmethod
    def of(cls, linear: Linear, *, down: bool) -> NeuronWeight:
        """The weight of an up or gate projection (neurons are outputs), or of a down projection (inputs)."""
        folded = fold(linear.node.inputs[1])
        assert folded is not None
        outputs = 0 if linear.node.attrs.get("transB", 0) else 1
        return cls(folded, 1 - outputs if down else outputs)

    @property
    def count(self) -> int:
        """Neurons."""
        return self.folded.shape[self.axis]

    def tiles(self) -> Iterator[tuple[int, Array]]:
        """First row and rows, as stored."""
        rows, columns = self.folded.shape
        step = max(1, _TILE // max(columns, 1))
        stored = self._stored()
        whole = None if stored is not None else self.folded.load()
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stored.rows(start, stop) if stored is not None else whole[start:stop]  # type: ignore[index]

    def sample(self, count: int = 8) -> Array:
        """``[neurons, at most count]``: some of the numbers of each neuron."""
        if self.axis == 1:
            stored = self._stored()
            first = stored.rows(0, min(count, self.folded.shape[0])) if stored is not None else self.folded.load()[:count]
            return np.ascontiguousarray(first.T)
        return np.concatenate([tile[:, :count].copy() for _, tile in self.tiles()])

    def take(self, neurons: Indices) -> Array:
        """``[len(neurons), *]``: all numbers of these neurons, as stored."""
        if self.axis == 1:
            return np.ascontiguousarray(np.concatenate([tile[:, neurons] for _, tile in self.tiles()]).T)
        parts = [tile[neurons[(neurons >= start) & (neurons < start + len(tile))] - start] for start, tile in self.tiles()]
        order = np.argsort(np.argsort(neurons, kind="stable"), kind="stable")
        return np.concatenate(parts)[order] if np.any(np.diff(neurons) < 0) else np.concatenate(parts)

    def zero(self, neurons: Indices) -> Indices:
        """Those of ``neurons`` all of whose numbers are zero."""
        found = [part[~self.take(part).any(axis=1)] for part in self._parts(neurons)]
        return np.concatenate(found) if found else neurons[:0]

    def finite(self, neurons: Indices) -> Indices:
        """Those of ``neurons`` none of whose numbers is infinite or NaN."""
        found = [part[np.isfinite(self.take(part).astype(np.float64)).all(axis=1)] for part in self._parts(neurons)]
        return np.concatenate(found) if found else neurons[:0]

    def digests(self, neurons: Indices) -> list[bytes]:
        """A hash of all numbers of each of ``neurons``."""
        return [hashlib.sha256(row.tobytes()).digest() for part in self._parts(neurons) for row in self.take(part)]

    def kept(self, neurons: Indices, added: dict[int, list[int]] | None = None) -> Values:
        """The matrix with ``neurons`` only (ascending), each with the numbers of those ``added`` to it summed in."""
        rows, columns = self.folded.shape
        place = {int(neuron): number for number, neuron in enumerate(neurons)}
        kind = self.folded.onnx_type
        stored = self._stored()
        if self.axis == 1:
            def part(tile: Array) -> Array:
                taken = tile[:, neurons]
                for neuron, others in (added or {}).items():
                    taken[:, place[neuron]] = tile[:, [neuron, *others]].astype(np.float64).sum(axis=1)
                return taken

            def some_rows(start: int, stop: int) -> Array:
                assert stored is not None
                step = max(1, _TILE // max(columns, 1))
                return np.concatenate([part(stored.rows(low, min(low + step, stop))) for low in range(start, stop, step)])

            return ComputedValues((rows, len(neurons)), kind, lambda: part(self.folded.load()),
                                  None if stored is None else some_rows)

        def compute() -> Array:
            whole = self.folded.load()
            taken = whole[neurons]
            for neuron, others in (added or {}).items():
                taken[place[neuron]] = whole[[neuron, *others]].astype(np.float64).sum(axis=0)
            return taken

        def some(start: int, stop: int) -> Array:
            assert stored is not None
            chosen = neurons[start:stop]
            taken = np.concatenate([stored.rows(int(near[0]), int(near[-1]) + 1)[near - near[0]]
                                    for near in _near(chosen, columns)])
            for neuron in set(added or {}) & set(chosen.tolist()):
                rows = [stored.rows(each, each + 1)[0].astype(np.float64) for each in (neuron, *(added or {})[neuron])]
                taken[place[neuron] - start] = np.sum(rows, axis=0)
            return taken

        return ComputedValues((len(neurons), columns), kind, compute, None if stored is None else some)

    def _stored(self) -> Values | None:
        """The weight in the file, where nothing lies between it and the node."""
        if self.folded.nodes or not self.folded.sources:
            return None
        values: Values = self.folded.sources[0]._values
        return values if values.by_rows else None

    def _parts(self, neurons: Indices) -> Iterator[Indices]:
        step = max(1, _TILE // max(self.folded.shape[1 - self.axis], 1))
        for start in range(0, len(neurons), step):
            yield neurons[start:start + step]


def _near(neurons: Indices, columns: int) -> Iterator[Indices]:
    """``neurons`` (ascending) in groups that lie within a tile of rows of ``columns`` numbers."""
    step, start = max(1, _TILE // max(columns, 1)), 0
    while start < len(neurons):
        stop = int(np.searchsorted(neurons, neurons[start] + step))
        yield neurons[start:stop]
        start = stop


def bound(weight: NeuronWeight, scale: Array, shift: Array | None, bias: Array | None) -> tuple[Array, Array]:
    """Centre and radius of what each neuron can get from a norm: ``|z − c| ≤ √d ‖γ ∘ w‖``, ``c = β·w + b``.

    LayerNorm's x̂ has no mean, so ‖P(γ ∘ w)‖ with the mean taken away would bound it too; but it has one by rounding, for
    inputs far from zero. The radius is widened by what rounding in float32 may add.
    """
    d = weight.folded.shape[1 - weight.axis]
    squares, centre, size = (np.zeros(weight.count) for _ in range(3))
    beta = np.zeros(d) if shift is None else shift
    for start, tile in weight.tiles():
        matrix = tile.astype(np.float64)
        stop = start + len(matrix)
        if weight.axis == 1:
            squares += ((matrix * scale[start:stop, None]) ** 2).sum(axis=0)
            centre += beta[start:stop] @ matrix
            size += np.abs(beta[start:stop]) @ np.abs(matrix)
        else:
            squares[start:stop] = ((matrix * scale) ** 2).sum(axis=1)
            centre[start:stop] = matrix @ beta
            size[start:stop] = np.abs(matrix) @ np.abs(beta)
    offset = np.zeros(weight.count) if bias is None else bias.astype(np.float64)
    length = np.sqrt(d * squares)
    return centre + offset, length + d * 2.0 ** -22 * (length + size + np.abs(offset))
