"""Which rewrite for which block: the fastest model within a limit on the drift, measured on this machine."""

from .job import SearchJob
from .run import search_file

__all__ = ["SearchJob", "search_file"]
