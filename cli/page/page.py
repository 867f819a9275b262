"""The page itself: one HTML text that refers to nothing outside itself."""

from __future__ import annotations

import importlib
from pathlib import Path

from .report import Report

_LIBRARIES = ("jinja2", "matplotlib")
_TEMPLATE = Path(__file__).with_name("page.html.j2")


def missing_library() -> str | None:
    """How to get what the page is made with; None where it is there."""
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            return f"report.html was not written, as '{name}' is not installed: pip install 'ffnfold[report]'"
    return None


def render(report: Report) -> str:
    """The page. The same report gives the same text."""
    import jinja2
    import markupsafe

    from .sections import sections

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(svg=markupsafe.Markup, shown=_shown, sortable=_sortable)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, sections=sections(report))


def _shown(value: object) -> str:
    """A cell for people: six digits at most, a dash for what there is not."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sortable(value: object) -> str:
    """What a column is sorted by."""
    return "" if value is None else str(value)
