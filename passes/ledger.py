"""Which block is which, through a whole plan: indices always mean those of the plan's input."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.edit import current
from ..graph.errors import InputError
from ..graph.ffn import find_ffn_blocks
from ..graph.model import Model
from .base import Refused
from .blocks import Blocks


class Ledger:
    """Follows the blocks of a model from pass to pass.

    After each pass the blocks are looked for afresh. One is the block it was if its output is the same value, or else if
    that value is now its sum with something else (an affine map beside the neurons), if its weights come from the same
    initializers, or (where a pass put another graph in the place of the whole) if its output has the same name.

    Args:
        model: the plan's input, before any pass.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        found = find_ffn_blocks(model)
        self._blocks: dict[int, FFNBlock] = {block.index: block for block in found}
        self._gone: dict[int, str] = {}
        self._beside: dict[int, str] = {}
        self.count = len(found)

    def select(self, blocks: Blocks, whole: bool = False) -> tuple[dict[int, FFNBlock], list[Refused]]:
        """The blocks asked for that are still there, in order of execution, and why the others are not.

        Args:
            whole: leave out those beside whose neurons a pass put something else, which is not in what is found of them.

        Raises:
            InputError: an index that the input does not have.
        """
        for index in blocks.indices or ():
            if index >= self.count:
                held = f"blocks 0 to {self.count - 1}" if self.count else "no FFN block"
                raise InputError(f"there is no block {index}: the model has {held}")
        reasons = {**self._gone, **(self._beside if whole else {})}
        there = {index: block for index, block in self._blocks.items() if index in blocks and index not in reasons}
        return there, [Refused(reason, "", index) for index, reason in sorted(reasons.items()) if index in blocks]

    @property
    def blocks(self) -> dict[int, FFNBlock]:
        """All blocks that are still there, by index."""
        return dict(self._blocks)

    def close(self, index: int, reason: str) -> None:
        """Block ``index`` is no FFN any more."""
        self._gone[index] = reason
        self._blocks.pop(index, None)

    def refresh(self, changed_by: str) -> None:
        """Look for the blocks again after the pass called ``changed_by`` changed the model."""
        outputs = {id(current(block.output)): index for index, block in self._blocks.items()}
        weights = {_sources(block): index for index, block in self._blocks.items()}
        names = {(block.path, current(block.output).name): index for index, block in self._blocks.items()}
        found: dict[int, FFNBlock] = {}
        unknown: list[FFNBlock] = []
        for block in find_ffn_blocks(self._model):
            index = outputs.get(id(block.output))
            if index is None or index in found:
                unknown.append(block)
            else:
                found[index] = block
        for block in unknown:
            index = next((outputs[id(value)] for value in block.sums() if id(value) in outputs), None)
            if index is not None and index not in found:
                self._beside[index] = f"{changed_by} put something beside its neurons that would stay: let this pass go first"
            else:
                index = weights.get(_sources(block), names.get((block.path, block.output.name)))
            if index is not None and index not in found:
                found[index] = block
        for index in set(self._blocks) - set(found):
            self._gone.setdefault(index, f"no longer an FFN block after {changed_by} earlier in the plan")
        for index, block in found.items():
            block.index = index
        self._blocks = dict(sorted(found.items()))


def _sources(block: FFNBlock) -> tuple[int, ...]:
    sources: list[gs.Constant | None] = [linear.source for linear in block.linears()]
    return tuple(id(source) for source in sources)
