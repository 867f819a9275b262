"""Options that several commands have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..graph.errors import InputError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]



class _Place(click.Path):
    """A path. Nothing at all is none, and not the current folder; and what ends in a slash is no file."""

    def __init__(self, file: bool = False) -> None:
        super().__init__(path_type=Path)
        self._file = file

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = os.fspath(value)
        if not text:
            self.fail("the path is empty: give one", param, ctx)
        if self._file and text.endswith(("/", os.sep)):
            self.fail(f"'{text}' is a folder: give the path of the file to write", param, ctx)
        return super().convert(value, param, ctx)


class Amount(click.FloatRange):
    """A real number in a range; neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"'{value}' is no finite number.", param, ctx)
        return number


PATH = _Place()
FILE = _Place(file=True)


def data(help_text: str = "Real inputs: an .npz file, a folder of them, or test_data_set folders.") -> Decorator:
    """``--data``."""
    return click.option("--data", type=PATH, metavar="FEEDS", help=help_text)


def synthetic() -> Decorator:
    """``--synthetic``."""
    return click.option("--synthetic", is_flag=True, help="Make inputs up from the model's specification; labelled so.")


def one_kind_of_feeds(data: Path | None, synthetic: bool) -> None:
    """Check that inputs are real or made up.

    Raises:
        InputError: both were asked for.
    """
    if data is not None and synthetic:
        raise InputError("--data and --synthetic exclude each other: give real inputs, or have some made up")


def provider() -> Decorator:
    """``--provider``."""
    return click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                        help="Where ONNX Runtime runs.")


def allow_cpu() -> Decorator:
    """``--allow-cpu-nodes``."""
    return click.option("--allow-cpu-nodes", "allow_cpu", is_flag=True,
                        help="On CUDA: accept nodes that compute on the CPU for want of a CUDA kernel.")


def tf32() -> Decorator:
    """``--tf32``."""
    return click.option("--tf32", "use_tf32", is_flag=True, help="On CUDA: round float32 operands of MatMul to TF32.")


def threads() -> Decorator:
    """``--threads``."""
    return click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads inside an operator.")


def percent(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """``5`` or ``5%`` as a number, not negative."""
    if value is None:
        return None
    try:
        number = float(value.strip().removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise click.BadParameter(f"'{value}' is no percentage: write it like 5%", context, parameter)
    return number


def max_drift() -> Decorator:
    """``--max-drift``."""
    return click.option("--max-drift", "max_drift", multiple=True, metavar="METRIC[@OUTPUT]=VALUE",
                        help="A limit, e.g. cosine_mean=0.999 or rel_l2@logits=0.01. May be repeated.")


def logits() -> Decorator:
    """``--logits``."""
    return click.option("--logits", multiple=True, metavar="OUTPUT", help="Also KL divergence and top-1, top-5 for OUTPUT.")


def report() -> Decorator:
    """``--report``."""
    return click.option("--report", "report_folder", type=PATH, metavar="DIR", help="Write report.html and report.json.")


def as_json() -> Decorator:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
