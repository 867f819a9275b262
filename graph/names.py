"""The one place new names come from, so that no name is ever given twice."""

from __future__ import annotations

import onnx


class Names:
    """Hands out names that no value, node or subgraph of the model uses.

    Args:
        graph: the main graph; names inside subgraphs count as used too.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._used: set[str] = set()
        self._next: dict[str, int] = {}
        pending = [graph]
        while pending:
            current = pending.pop()
            self._used.update(tensor.name for tensor in current.initializer)
            self._used.update(info.name for info in (*current.input, *current.output, *current.value_info))
            for node in current.node:
                self._used.add(node.name)
                self._used.update(node.output)
                pending += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
                for attribute in node.attribute:
                    pending += attribute.graphs

    def fresh(self, hint: str) -> str:
        """``hint``, or ``hint_1``, ``hint_2``, … if that is taken; the name counts as used from now on."""
        name = hint
        number = self._next.get(hint, 0)
        while name in self._used:
            number += 1
            name = f"{hint}_{number}"
        self._next[hint] = number
        self._used.add(name)
        return name
