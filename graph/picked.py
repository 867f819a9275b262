"""Constants of experts, picked out of one packed constant at run time: by a router, or by the counter of a loop."""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from .constant import Folded, fold
from .edit import producer

_DEPTH = 8


def picked(tensor: gs.Tensor) -> Folded | None:
    """The packed constant ``[experts, …]`` that ``tensor`` is a part of, picked by indices known only at run time.

    A Transpose of the two last axes behind the Gather is applied to it, so that every matrix is as ``tensor`` holds it.
    None where ``tensor`` is computed otherwise.
    """
    turned: list[gs.Node] = []
    for _ in range(_DEPTH):
        node = producer(tensor)
        if node is None or node.domain not in (None, "", "ai.onnx") or not node.inputs:
            return None
        if node.op in ("Gather", "GatherND"):
            if int(node.attrs.get("axis", 0)) != 0 or int(node.attrs.get("batch_dims", 0)) != 0:
                return None
            packed = fold(node.inputs[0])
            if packed is None or len(packed.shape) not in (2, 3) or fold(node.inputs[1]) is not None:
                return None
            return _turn(replace(packed, experts=packed.shape[0]), turned)
        if node.op == "Transpose":
            perm = node.attrs.get("perm")
            if perm is not None and list(perm) != [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]:
                return None
            turned.append(node)
        elif node.op not in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
            return None
        tensor = node.inputs[0]
    return None


def _turn(packed: Folded, turned: list[gs.Node]) -> Folded | None:
    if len(turned) % 2 == 0:
        return packed
    if len(packed.shape) != 3:
        return None
    experts, rows, columns = packed.shape
    return replace(packed, shape=(experts, columns, rows), load=lambda: packed.load().swapaxes(1, 2),
                   nodes=[turned[0], *packed.nodes])
