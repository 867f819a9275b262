"""Values inside a model, block after block, without running again what was run for the block before.

    feed ──► [nodes up to block 0] ──► frontier ──► [nodes up to block 1] ──► frontier ──► …

What later nodes read of what is computed already (the frontier: the residual stream, masks, position tables) is kept on disk
for each feed; the next run begins there. So fitting all blocks one after the other, each on what the rewritten blocks before
it give, costs one pass over the model and not one for each block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.edit import consumers, producer
from ...graph.model import Model
from ...graph.sort import reads
from ...graph.types import numpy_type
from ...runtime import Feeds, open_session
from ...runtime.capture import as_rows
from ...runtime.feeds import Feed, NamedFeed, name_of
from ...runtime.padding import Padding
from ...runtime.specs import input_specs
from ..base import Context

Array = npt.NDArray[Any]
_NO_SPINNING = {"session.intra_op.allow_spinning": "0"}  # between two runs the cores are for the moments


class Stream:
    """Goes through a model from its beginning to its end. A context manager: the frontier is deleted at the end.

    Args:
        model: may be rewritten between two calls of :meth:`rows`, behind what was asked for so far; else see :meth:`forget`.
    """

    def __init__(self, model: Model, feeds: Feeds, context: Context) -> None:
        self._model = model
        self._feeds = feeds
        self._context = context
        self._folder = tempfile.TemporaryDirectory(prefix="ffnfold-")
        self._kept: dict[str, int] = {}  # name → element type of the frontier
        self._numbers: dict[str, int] = {}
        self._seen: dict[int, tuple[Feed, Padding]] = {}
        self._optional = {spec.name for spec in input_specs(model) if spec.optional}
        self._done: dict[int, gs.Node] = {}  # the nodes themselves, so that no other takes their identity

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def rows(self, tensors: Sequence[str], axes: Sequence[int], passing: Sequence[str] = ()) -> Iterator[list[Array]]:
        """Values of the main graph, for each feed a list of arrays ``[rows, features]`` without padding.

        Args:
            tensors: names of values.
            axes: where each has its features, counted from the end.
            passing: names of those that nothing will read any more, which therefore need not be kept.

        Raises:
            InputError: ONNX Runtime fails, or has no such value.
        """
        visited = self._visit(tensors)
        fresh = [tensor.name for node in visited for tensor in node.outputs
                 if tensor.name and self._stays(tensor) and fold(tensor) is None]
        computed = {tensor.name for node in visited for tensor in node.outputs}
        known = {name: kind for name, kind in self._kept.items() if name not in computed}
        frontier = [name for name in fresh if name not in passing]
        wanted = list(dict.fromkeys([*tensors, *frontier]))
        session = open_session(self._model, provider=self._context.provider, threads=self._context.threads,
                               outputs=wanted, inputs=known, config=_NO_SPINNING)
        taken = {spec.name for spec in session.inputs}
        kinds = {spec.name: spec.element_type for spec in session.outputs if spec.is_tensor and spec.dtype != object}
        frontier = [name for name in frontier if name in kinds]
        begins = any(spec.name not in known and not spec.optional for spec in session.inputs)
        for number in range(len(self._feeds)):
            feed, padding = self._feed(number, whole=begins)
            given = {name: array for name, array in feed.items() if name in taken and name not in known}
            given |= {name: self._load(number, name) for name in known if name in taken}
            values = session.run(given, wanted, of=feed)
            for name in frontier:
                self._save(number, name, values[name])
            yield [as_rows(values[name], axis, padding) for name, axis in zip(tensors, axes, strict=True)]
        self._kept |= {name: kinds[name] for name in frontier}
        self._drop_passed()

    def forget(self, name: str) -> None:
        """Say that the value ``name`` has been rewritten: what was computed from it no longer holds."""
        graph = self._model.graph
        start = next((tensor for node in graph.nodes for tensor in node.outputs if tensor.name == name), None)
        pending = [] if start is None else [start]
        seen: set[int] = set()
        while pending:
            for node in consumers(pending.pop()):
                if id(node) not in seen:
                    seen.add(id(node))
                    self._done.pop(id(node), None)
                    pending += node.outputs
                    for tensor in node.outputs:
                        self._kept.pop(tensor.name, None)

    def _feed(self, number: int, *, whole: bool) -> tuple[Feed, Padding]:
        """A feed and its padding; with ``whole`` said to be false only its name and what may be left out, once it was seen."""
        if whole or number not in self._seen:
            feed = self._feeds[number]
            others = {name: array for name, array in feed.items() if name in self._optional}
            self._seen[number] = NamedFeed(others, name_of(feed) or f"feed {number}"), Padding(feed)
            return feed, self._seen[number][1]
        return self._seen[number]

    def _visit(self, names: Sequence[str]) -> list[gs.Node]:
        """The nodes to run for ``names``, which are done from now on."""
        values = {tensor.name: tensor for node in self._model.graph.nodes for tensor in node.outputs if tensor.name}
        pending = [values[name] for name in names if name in values and name not in self._kept]
        visited: dict[int, gs.Node] = {}
        while pending:
            node = producer(pending.pop())
            if node is None or id(node) in visited:
                continue
            visited[id(node)] = node
            pending += [tensor for tensor in reads(node) if tensor.name not in self._kept]
        self._done |= visited
        return list(visited.values())

    def _stays(self, tensor: gs.Tensor) -> bool:
        """Whether later nodes read it, or another output of its node (a norm that gives the sum as well): a rewrite may come to
        read one where the other is kept, and the node would have to run again."""
        node = producer(tensor)
        return any(self._is_read_later(each) for each in (node.outputs if node is not None else [tensor]) if each.name)

    def _is_read_later(self, tensor: gs.Tensor) -> bool:
        return any(id(reader) not in self._done for reader in consumers(tensor))

    def _drop_passed(self) -> None:
        values = {tensor.name: tensor for node in self._model.graph.nodes for tensor in node.outputs if tensor.name}
        for name in list(self._kept):
            if name not in values or not self._stays(values[name]):
                del self._kept[name]
                for number in range(len(self._feeds)):
                    self._file(number, name).unlink(missing_ok=True)

    def _file(self, number: int, name: str) -> Path:
        value = self._numbers.setdefault(name, len(self._numbers))
        return Path(self._folder.name) / f"{number}-{value}.npy"

    def _save(self, number: int, name: str, value: Array) -> None:
        array = np.asarray(value)
        stored = array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")  # bfloat16 is no type of .npy
        np.save(self._file(number, name), stored, allow_pickle=False)

    def _load(self, number: int, name: str) -> Array:
        array = np.load(self._file(number, name), allow_pickle=False)
        kind = numpy_type(self._kept[name])
        return array if array.dtype == kind else array.view(kind)
