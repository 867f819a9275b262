"""What a page is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """Each part may be missing, and its section then is.

    Attributes:
        title: heading.
        ok: whether every limit was kept; None where there was none to keep.
        summary: pairs of texts for the top.
        plan: YAML; passes: ``optimize``'s entries ``passes``; contributions: what each of them contributed.
        drift: ``verify``'s object, with ``blocks`` where they were compared.
        timing: ``bench``'s object, its models with ``times_ms`` where the distributions are to be drawn.
        bytes: model → size of its files.
        equivalence: ``optimize``'s entry of that name.
        front: ``search``'s entries, ``drift`` a number; drift_metric: which; feeds: on what inputs.
        notes: sentences. missed: limits that were not kept, in sentences.
    """

    title: str
    ok: bool | None = None
    summary: Sequence[tuple[str, str]] = ()
    plan: str | None = None
    passes: Sequence[Mapping[str, Any]] = ()
    contributions: Sequence[Mapping[str, Any]] = ()
    drift: Mapping[str, Any] | None = None
    timing: Mapping[str, Any] | None = None
    bytes: Mapping[str, int] = field(default_factory=dict)
    equivalence: Mapping[str, Any] | None = None
    front: Sequence[Mapping[str, Any]] = ()
    drift_metric: str = "drift"
    feeds: str | None = None
    notes: Sequence[str] = ()
    missed: Sequence[str] = ()
