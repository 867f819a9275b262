"""The report as one self-contained HTML page."""

from .page import missing_library, render
from .report import Report

__all__ = ["Report", "missing_library", "render"]
