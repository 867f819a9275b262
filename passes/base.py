"""What a pass is.

A pass is a frozen dataclass: its fields are its options, in Python, on the command line and in a plan file alike. It
edits the view of a :class:`~ffnfold.graph.model.Model`; the checks before and after it are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..graph.block import FFNBlock
from ..graph.model import Model
from ..runtime import Feeds
from .blocks import ALL, Blocks

if TYPE_CHECKING:
    from .fitting.evidence import Streams
    from .fitting.kept_fits import Fits
    from .fitting.resume import Resume
    from .ledger import Ledger


@dataclass(frozen=True)
class Refused:
    """A case that a pass leaves alone.

    Attributes:
        reason: one clause, for people.
        value: the value it is about.
        block: index of the block it is about, or None.
    """

    reason: str
    value: str = ""
    block: int | None = None

    def to_json(self) -> dict[str, object]:
        """The entry of the contract: ``block`` or ``value``, and ``reason``."""
        where: dict[str, object] = {"value": self.value} if self.block is None else {"block": self.block}
        return {**where, "reason": self.reason}


@dataclass(frozen=True)
class Rewritten:
    """A block that a pass has rewritten.

    Attributes:
        gone: what later passes say who ask for this block (``removed``, ``made affine``), or None while it is an FFN.
    """

    gone: str | None = None


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        name, exact: of the pass.
        fired: how many places it rewrote.
        refused: what it left alone and why.
        seconds: wall time, checks included.
        notes: what the user should know besides, a sentence each.
    """

    name: str
    exact: bool
    fired: int
    refused: list[Refused]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The entry of the contract."""
        return {"name": self.name, "exact": self.exact, "fired": self.fired,
                "refused": [each.to_json() for each in self.refused], "seconds": round(self.seconds, 3)}


@dataclass
class Context:
    """What passes may use beside the model.

    Attributes:
        fit: feeds to fit on; None where there are none.
        choose: feeds to choose by, disjoint from ``fit`` where there are enough.
        provider, threads: how ONNX Runtime runs.
        ledger: which block is which; only there where a pass of the plan is about blocks.
        progress: told what is going on, one short line.
        streams: the model and the original gone through side by side, where a pass fits block after block.
        widths: name of a block's output → neurons that stay, where a pass has decided that for all blocks together.
        resume: moments kept for the same run started again.
        fits: fits of single blocks kept for other plans that begin like this one.
        original: the model as it was before anything approximate was done to it: what blocks are fitted towards.
        memo: what passes of this plan made and may use again (weights that stay shared).
    """

    fit: Feeds | None = None
    choose: Feeds | None = None
    provider: str = "cpu"
    threads: int | None = None
    ledger: Ledger = field(default=None)  # type: ignore[assignment]
    progress: Callable[[str], None] = lambda message: None
    streams: Streams | None = None
    widths: dict[str, int] = field(default_factory=dict)
    resume: Resume | None = None
    fits: Fits | None = None
    original: Model | None = None
    memo: dict[object, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """One rewrite. Subclasses set ``name`` and ``exact`` and write ``run``."""

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False

    @property
    def needs_feeds(self) -> bool:
        """Whether it cannot run, with these options, without feeds."""
        return False

    @property
    def asks_for(self) -> tuple[Blocks, ...]:
        """The blocks that its options name; none where it is not about blocks. Each index must be there."""
        blocks = getattr(self, "blocks", None)
        return () if blocks is None else (blocks,)

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite ``model`` in place."""
        raise NotImplementedError

    def result(self, fired: int, refused: Sequence[Refused], notes: Sequence[str] = ()) -> PassResult:
        """What this pass did."""
        return PassResult(self.name, self.exact, fired, list(refused), notes=tuple(notes))


@dataclass(frozen=True)
class BlockPass(Pass):
    """A pass over FFN blocks, one after the other in order of execution.

    ``choose`` says which blocks; ``statistics`` is called for each just before it is rewritten, so that what it measures
    has already gone through the rewritten blocks before it; ``rewrite`` does it.
    """

    blocks: Blocks = field(default=ALL, metadata={"help": "which blocks, e.g. 0+3-5"})
    whole: ClassVar[bool] = False
    """Whether it takes the place of the whole block, and not of its neurons alone."""

    def choose(self, model: Model, blocks: dict[int, FFNBlock], context: Context) -> list[int]:
        """Indices of the blocks to rewrite, from those asked for that are there."""
        return list(blocks)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """What ``rewrite`` needs to know from the feeds; None where it needs nothing. May be a :class:`Refused`."""
        return None

    def check(self, block: FFNBlock) -> Refused | None:
        """Why ``block`` cannot be rewritten, before anything is measured; None where nothing is known against it."""
        return None

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Rewrite one block, or refuse and leave it as it was."""
        raise NotImplementedError

    def refuse_all(self, refusal: Refused, context: Context) -> PassResult:
        """The result where one reason is against all blocks."""
        there, refused = context.ledger.select(self.blocks, self.whole)
        refused += [Refused(refusal.reason, refusal.value, index) for index in there]
        return self.result(0, sorted(refused, key=lambda each: -1 if each.block is None else each.block))

    def able(self, context: Context, *, settled: bool = False) -> tuple[dict[int, FFNBlock], list[Refused]]:
        """The blocks asked for that ``check`` says nothing against, by index, and why not the others.

        Args:
            settled: blocks are settled before they are checked.
        """
        there, refused = context.ledger.select(self.blocks, self.whole)
        for index, block in list(there.items()):
            if settled:
                block.settle()
            refusal = self.check(block)
            if refusal is not None:
                refused.append(Refused(refusal.reason, refusal.value, index))
                del there[index]
        return there, refused

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite the chosen blocks in place."""
        ledger = context.ledger
        there, refused = self.able(context)
        chosen = self.choose(model, there, context) if there else []
        fired = 0
        for index in sorted(chosen, key=list(there).index):
            block = there[index]
            block.settle()
            context.progress(f"{self.name}: block {index}")
            statistics = self.statistics(model, block, context)
            outcome = statistics if isinstance(statistics, Refused) else self.rewrite(model, block, statistics, context)
            if isinstance(outcome, Refused):
                refused.append(Refused(outcome.reason, outcome.value, index))
                continue
            fired += 1
            if outcome.gone:
                ledger.close(index, f"{outcome.gone} by {self.name} earlier in the plan")
        return self.result(fired, sorted(refused, key=lambda each: -1 if each.block is None else each.block))
