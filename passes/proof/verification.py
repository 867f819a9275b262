"""The job of ``verify``: drift of the outputs, of the blocks, and where numbers overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...graph.model import Model
from ...runtime import Drift, Feeds, Limit, compare
from ...runtime.overflow import Overflow, first_overflow, has_float16
from .per_block import BlockDrift, drift_per_block, ranked

BLOCK_FEEDS = 4  # of the feeds, spread evenly, that blocks are compared on


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        drift: of the outputs, on all feeds.
        blocks: of each FFN block, on ``block_samples`` of the feeds; None where it was not asked for.
        overflow: the first node of the candidate that overflows; None where none does, or nothing suggests it.
    """

    drift: Drift
    blocks: Sequence[BlockDrift] | None = None
    block_samples: int = 0
    overflow: Overflow | None = None

    def to_json(self) -> dict[str, Any]:
        """``verify``'s object."""
        found = self.drift.to_json()
        if self.overflow is not None:
            found["first_nonfinite"] = self.overflow.to_json()
        if self.blocks is not None:
            found |= {"block_samples": self.block_samples, "blocks": ranked(self.blocks)}
        return found


@dataclass(frozen=True)
class Check:
    """What ``verify`` is asked to do.

    Attributes:
        reference, candidate: files; feeds: inputs of both.
        per_block: look at each FFN block too, and take the memory of one model at a time for everything.
        provider, threads, use_tf32, allow_cpu, logits, limits: as in :func:`compare`.
    """

    reference: Path
    candidate: Path
    feeds: Feeds
    per_block: bool = False
    provider: str = "cpu"
    threads: int | None = None
    use_tf32: bool = False
    allow_cpu: bool = False
    logits: Sequence[str] = ()
    limits: Sequence[Limit] = field(default_factory=tuple)


def verify_files(check: Check, progress: Callable[[str], None] = lambda message: None) -> Verification:
    """Do ``check``.

    Raises:
        InputError: as :func:`compare` and :func:`drift_per_block`, or no feed has a row that is no padding.
    """
    drift = compare(check.reference, check.candidate, check.feeds, provider=check.provider, threads=check.threads,
                    logits=check.logits, limits=check.limits, use_tf32=check.use_tf32, allow_cpu=check.allow_cpu,
                    lean=check.per_block, progress=lambda done, total: progress(f"feed {done} of {total}"))
    drift.check_rows()
    broken = any(metrics["nonfinite"] for metrics in drift.outputs.values())
    if not broken and not check.per_block:
        return Verification(drift)
    reference, candidate = Model.load(check.reference), Model.load(check.candidate)
    overflow = None
    if broken or has_float16(candidate):
        progress("looking for the first number that is not finite")
        overflow = first_overflow(candidate, reference, check.feeds, provider=check.provider, threads=check.threads)
    if not check.per_block:
        return Verification(drift, overflow=overflow)
    some = spread(check.feeds)
    blocks = drift_per_block(reference, candidate, some, provider=check.provider, threads=check.threads,
                             use_tf32=check.use_tf32, logits=check.logits,
                             progress=lambda done, total: progress(f"block {done} of {total}"))
    return Verification(drift, blocks, len(some), overflow)


def spread(feeds: Feeds, most: int = BLOCK_FEEDS) -> Feeds:
    """At most ``most`` of ``feeds``, from beginning to end."""
    count = min(most, len(feeds))
    return feeds[::max(1, len(feeds) // count)][:count] if count else feeds
