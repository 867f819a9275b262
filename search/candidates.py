"""What may become of a block, and the plan that makes it so."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..graph.block import FFNBlock
from ..passes.base import Pass
from ..passes.blocks import Blocks
from ..passes.factorize_ffn import FactorizeFFN
from ..passes.fitting.less_work import why_no_less
from ..passes.fitting.widths import Width
from ..passes.plan import EXACT_PLAN, Plan
from ..passes.quantize_ffn import QuantizeFFN
from ..passes.remove_ffn import RemoveFFN
from ..passes.slim_ffn import SlimFFN

MEANING = 9
"""Raised where a candidate comes to stand for something else, so that what is in a cache is measured again."""
OTHERS = -1
"""The unit that stands for the linears outside FFN blocks, those of attention."""
HEAD = -2
"""The unit that stands for the linear that gives logits."""
_EIGHTHS = (1, 2, 3, 4, 5, 6)  # of the neurons, an affine map beside them
_FEW_EIGHTHS = (2, 4)
_BARE_EIGHTHS = (1, 2, 3, 4, 5, 6, 7)  # without one
_FEW_BARE_EIGHTHS = (4, 6)
_RATIOS = (0.25, 0.5)
_FORMS: dict[str, dict[str, object]] = {
    "int8": {"form": "dynamic", "smooth": "feeds"}, "int8-plain": {"form": "dynamic", "smooth": "feeds", "row_scale": "false"},
    "8-bit": {"form": "nbits"},
    "4-bit": {"bits": 4}, "stored-8-bit": {"form": "weight-only"}}
_COMPENSATED = {"int8": "int8-gptq", "int8-plain": "int8-plain-gptq", "4-bit": "4-bit-gptq"}
_FORMS |= {better: {**_FORMS[form], "gptq": True} for form, better in _COMPENSATED.items()}
_WIDEST = 4096  # inputs of a linear for which GPTQ's inverse of their Gram matrix takes seconds
_OF_TARGET = {"cpu": ("int8", "int8-plain", "8-bit", "4-bit"), "cuda": ("8-bit", "4-bit", "stored-8-bit")}
_ALSO = {(False, False): "", (True, False): "attention", (False, True): "head", (True, True): "everything"}
_PAIRED = {"cpu": ("int8", "int8-plain"), "cuda": ("8-bit",)}


@dataclass(frozen=True)
class Candidate:
    """What may become of a unit: an FFN block, the linears outside them, or the head.

    Attributes:
        neurons: how many stay, beside an affine map of the input; 0: the affine map alone; None: all, as they are.
        bare: without that map.
        removed: the block is gone, its mean kept.
        ratio: part of the numbers that stays in two thin matrices for each; 0: the matrices are whole.
        form: how weights are stored and multiplied; empty: as they are.
    """

    neurons: int | None = None
    bare: bool = False
    removed: bool = False
    form: str = ""
    ratio: float = 0.0

    def __str__(self) -> str:
        body = "removed" if self.removed else f"low-rank-{self.ratio:g}" if self.ratio else ""
        if self.neurons is not None:
            body = f"{'bare' if self.bare else 'slim'}-{self.neurons}" if self.neurons else "affine"
        return "+".join(part for part in (body, self.form) if part) or "keep"

    @property
    def fitted(self) -> bool:
        """Whether feeds are fitted to."""
        return self.neurons is not None or self.ratio > 0

    @property
    def parts(self) -> tuple[Candidate, Candidate] | None:
        """Of a pair, the two: neurons left out, then what is left in another form."""
        if not self.form or self.neurons is None:
            return None
        return Candidate(self.neurons, self.bare), Candidate(form=self.form)


KEEP = Candidate()
Choice = Mapping[int, Candidate]
"""Unit → what becomes of it; units that are kept may be left out."""


def compensated(block: FFNBlock, few: bool = False) -> bool:
    """Whether the search has the time to undo errors of rounding, of this block's linears and of others as wide."""
    return not few and max(block.d_model, block.d_ff) <= _WIDEST


def _best(forms: tuple[str, ...], better: bool) -> tuple[str, ...]:
    return tuple(_COMPENSATED.get(form, form) if better else form for form in forms)


def block_candidates(block: FFNBlock, target: str, *, few: bool = False) -> list[Candidate]:
    """What may become of ``block``, to keep it first. ``few``: two widths only, for a short search."""
    better = target == "cpu" and compensated(block, few)
    forms, paired = _best(_OF_TARGET[target], better), _best(_PAIRED[target], better)
    multiple = min(64, 1 << max(0, (block.d_ff // 8).bit_length() - 1))
    matrices = len(block.linears())
    whole = matrices * block.d_ff
    slim = [Candidate(width) for width in _widths(block, _FEW_EIGHTHS if few else _EIGHTHS, multiple)
            if matrices * width + block.d_model < whole and why_no_less(block, width, affine=True) is None]
    slim += [Candidate(width, bare=True) for width in _widths(block, _FEW_BARE_EIGHTHS if few else _BARE_EIGHTHS, multiple)
             if why_no_less(block, width, affine=False) is None]
    alone = [Candidate(0)] if why_no_less(block, 0, affine=True) is None else []
    found = [KEEP, *(Candidate(form=form) for form in forms), *alone, *slim]
    found += [replace(each, form=form) for each in slim for form in paired]
    found += [] if few else [Candidate(ratio=ratio) for ratio in _RATIOS]
    return [*found, Candidate(removed=True)]


def spread_out(several: Sequence[Candidate]) -> list[Candidate]:
    """The same so that those that come first, however many, are spread over all sizes: the middle, the middles of the halves…"""
    found, parts = [], [sorted(several, key=lambda each: (each.ratio, each.neurons or 0, each.bare))]
    for part in parts:
        middle = len(part) // 2
        found += part[middle:middle + 1]
        parts += [half for half in (part[:middle], part[middle + 1:]) if half]
    return found


def _widths(block: FFNBlock, eighths: tuple[int, ...], multiple: int) -> list[int]:
    return sorted({math.ceil(block.d_ff * part / 8 / multiple) * multiple for part in eighths})


def other_candidates(target: str, better: bool = False) -> list[Candidate]:
    """What may become of the linears outside the blocks, and of the head. ``better``: with time to undo errors of rounding."""
    return [KEEP, *(Candidate(form=form) for form in _best(_OF_TARGET[target], better and target == "cpu"))]


def name_of(unit: int) -> str:
    """A unit, for people."""
    return {OTHERS: "attention", HEAD: "the head"}.get(unit, f"block {unit}")


def exact_passes() -> list[Pass]:
    """What every plan begins with. Without ``fold-norm``, as in the default plan: it unevens what is rounded after it."""
    return list(Plan.parse(text for text in EXACT_PLAN if text != "fold-norm"))


def quantizing(form: str, target: str, units: Collection[int], *, timed: bool = False) -> QuantizeFFN:
    """The pass that writes ``form``. ``timed``: only how long the result takes matters, not its numbers."""
    outside = _ALSO[OTHERS in units, HEAD in units]
    also = {"also": outside} if outside else {}
    blocks = _blocks([unit for unit in units if unit not in (OTHERS, HEAD)])
    options = {**_FORMS[form], **({"gptq": False} if timed else {}), **({"target": target} if target != "cpu" else {}), **also}
    return QuantizeFFN(blocks, **options)  # type: ignore[arg-type]


def plan_of(choice: Choice, target: str, last: Sequence[Pass] = ()) -> Plan:
    """The plan of a choice: what is exact, what is removed, what is fitted (all in one pass), what is quantized, and ``last``."""
    passes = exact_passes()
    gone = [unit for unit, each in choice.items() if each.removed]
    if gone:
        passes.append(RemoveFFN(_blocks(gone)))
    widths: dict[Width, list[int]] = {}
    for unit, each in sorted(choice.items()):
        if each.neurons is not None:
            widths.setdefault(Width(each.neurons, each.bare), []).append(unit)
    if widths:
        units = [unit for several in widths.values() for unit in several]
        text = "/".join(f"{width}@{_blocks(several)}" for width, several in sorted(widths.items()))
        passes.append(SlimFFN(_blocks(units), widths=text, multiple=1, refine=0))
    for ratio in sorted({each.ratio for each in choice.values()} - {0.0}):
        passes.append(FactorizeFFN(_blocks([unit for unit, each in choice.items() if each.ratio == ratio]), ratio=ratio))
    for form in _FORMS:
        units = [unit for unit, each in choice.items() if each.form == form]
        if units:
            passes.append(quantizing(form, target, units))
    return Plan((*passes, *last))


def _blocks(units: list[int]) -> Blocks:
    return Blocks(tuple(sorted(units)))
