"""What ONNX Runtime really runs: the operators left after its own optimizations."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from ..graph.model import Model
from .onnx_runtime import complaints, onnx_runtime, providers, session_options
from .ort_values import weight_value
from .sessions import Source

_WEIGHTS = "weights"


def executed_ops(source: Source | bytes, *, outputs: Sequence[str] = (), provider: str = "cpu", threads: int | None = None,
                 config: Mapping[str, str] | None = None) -> Counter[str]:
    """How often each operator is in the graph that ONNX Runtime made of ``source`` (or its bytes), inner graphs included.

    Operators outside the default domain are written ``domain:Op``. Fusions show as operators that the model did not have.

    Args:
        outputs: only what these values of the main graph need (where ``source`` is a :class:`Model`); all of it if empty.
        config: further entries of the session's configuration.

    Raises:
        InputError: ONNX Runtime refuses the model.
    """
    options = session_options({"session.disable_prepacking": "1", **(config or {}),
                               "session.optimized_model_external_initializers_file_name": _WEIGHTS,
                               "session.optimized_model_external_initializers_min_size_in_bytes": "1024"}, threads, True)
    opened: str | bytes = source if isinstance(source, bytes) else str(source)
    held: list[Any] = []
    if isinstance(source, Model):
        opened, weights = source.session_parts(outputs, only=bool(outputs))
        held = [weight_value(values) for values in weights.values()]
        if held:
            options.add_external_initializers(list(weights), held)
    name = str(source.path) if isinstance(source, Model) else "the model" if isinstance(source, bytes) else str(source)
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        with contextlib.suppress(OSError, NotImplementedError):
            (Path(folder) / _WEIGHTS).symlink_to(os.devnull)  # only the graph is wanted, and weights can be gigabytes
        with complaints(name, "load"):
            onnx_runtime().InferenceSession(opened, options, providers=providers(provider, {}, False),
                                            enable_fallback=False)
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return count_ops(optimized.graph)


def count_ops(graph: onnx.GraphProto) -> Counter[str]:
    """How often each operator is in ``graph`` and the graphs inside it."""
    found: Counter[str] = Counter()
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            found[f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
            for attribute in node.attribute:
                pending += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    return found
