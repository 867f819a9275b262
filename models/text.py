"""Real English text: 300 news articles of the Australian Broadcasting Corporation, 2000 to 2001 (the Lee background corpus).

Source: ``gensim/test/test_data/lee_background.cor`` in the wheel of gensim 4.4.0. One article a line, in its own order;
articles 0 to 29 are for reporting, 30 to 59 for choosing, the others for fitting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .download import Wheel, fetch, read_member
from .recipe import Progress

_WHEEL = Wheel("gensim==4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
               ("manylinux_2_24_x86_64", "manylinux_2_28_x86_64"))
_MEMBER = "gensim/test/test_data/lee_background.cor"
_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
RANGES: dict[str, tuple[int, int]] = {"report": (0, 30), "choose": (30, 60), "fit": (60, 300)}
"""First article and the one behind the last, for each purpose."""


def articles(progress: Progress) -> dict[str, list[str]]:
    """The articles for each purpose.

    Raises:
        InputError: the text cannot be downloaded or has another SHA-256.
    """
    text = read_member(fetch(_WHEEL, progress), _MEMBER, _SHA256).decode("utf-8", "replace")
    every = [line.strip() for line in text.splitlines() if line.strip()]
    return {part: every[first:end] for part, (first, end) in RANGES.items()}


def sources() -> Mapping[str, Any]:
    """What to write into a recipe."""
    return {"text": {"package": _WHEEL.requirement, "file": _MEMBER, "sha256": _SHA256, "articles": RANGES}}
