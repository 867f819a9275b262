"""Which blocks are so alike that one can do the work of the other.

    D[k, b] = min Σ_t w_t ‖y_b − fix(x_b, f_k(x_b))‖²      x_b, y_b what block b reads and gives, w_t as in token_weights

so D is an error beside the residual stream, and counts a block that adds little for little. ``fix`` is what the pass may put
around the other's function: nothing, a number for each feature and an offset, or an affine map of both; fitted on four fifths of
the tokens and measured on the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ...graph.model import Model
from ...runtime import capture
from ..base import Context
from .token_weights import token_weights, weight_values

Array = npt.NDArray[Any]
NEAR = 8  # blocks further apart are not compared
_TOKENS = 4  # for each feature of the block, up to
_MOST = 4096
_HELD_OUT = 5
_RIDGE = 1e-3


def distances(model: Model, blocks: Sequence[FFNBlock], fix: str, weight: str, context: Context) -> dict[tuple[int, int], float]:
    """(k, b) → D[k, b] for blocks not further apart than ``NEAR``, by their indices."""
    samples = _sample(model, blocks, weight, context)
    found = {}
    for at, block in enumerate(blocks):
        context.progress(f"share-ffn: what could stand for block {block.index}")
        x, y, weights = samples[block.index]
        if not len(x):
            continue
        for other in blocks[max(0, at - NEAR):at + NEAR + 1]:
            if other is not block and (other.d_model, other.d_out) == (block.d_model, block.d_out):
                found[other.index, block.index] = _error(x, function(other, x), y, weights, fix)
    return found


def choose_keepers(cost: Mapping[tuple[int, int], float], indices: Sequence[int], left: int) -> dict[int, int]:
    """For each block that gives up its weights the one whose weights it takes; ``left`` keep theirs (more, where they must).

    All keep theirs at first; then, one after the other, the one goes whose going adds least to the sum of D.
    """
    keepers = set(indices)
    while len(keepers) > left:
        totals = {index: sum(min((cost.get((keeper, each), np.inf) for keeper in keepers - {index}), default=np.inf)
                             for each in indices if each not in keepers or each == index) for index in sorted(keepers)}
        best = min(totals, key=lambda index: (totals[index], index))
        if not np.isfinite(totals[best]):
            break
        keepers.remove(best)
    return {each: min(keepers, key=lambda keeper: (cost.get((keeper, each), np.inf), keeper))
            for each in indices if each not in keepers}


def function(block: FFNBlock, x: Array) -> Array:
    """``f(x)`` in float32, ``[rows, d_out]``."""
    projected = []
    for projection in (block.up, block.gate):
        if projection is None:
            continue
        z = x.astype(np.float32) @ projection.weight().astype(np.float32)
        bias = projection.bias()
        projected.append(z if bias is None else z + bias.astype(np.float32))
    y = block.hidden_from(*projected).astype(np.float32) @ block.down.weight().astype(np.float32)
    bias = block.down.bias()
    return y if bias is None else y + bias.astype(np.float32)


def _sample(model: Model, blocks: Sequence[FFNBlock], weight: str, context: Context) -> dict[int, tuple[Array, Array, Array]]:
    assert context.fit is not None
    parts: dict[int, list[tuple[Array, Array, Array]]] = {block.index: [] for block in blocks}
    seen, wanted = 0, min(_MOST, _TOKENS * max(block.d_model + block.d_out for block in blocks) // 2)
    each_feed = max(1, -(-wanted // len(context.fit)))
    for part in _captured(model, blocks, weight, context):
        most = 0
        for index, rows in part.items():
            step = max(1, len(rows[0]) // each_feed)
            parts[index].append(tuple(values[::step] for values in rows))  # type: ignore[arg-type]
            most = max(most, len(rows[0][::step]))
        seen += most
        if seen >= wanted:
            break
    return {index: tuple(np.concatenate(columns) for columns in zip(*found, strict=True))  # type: ignore[misc]
            for index, found in parts.items()}


def _captured(model: Model, blocks: Sequence[FFNBlock], weight: str,
              context: Context) -> Iterator[dict[int, tuple[Array, Array, Array]]]:
    others = {block.index: weight_values(block, weight) for block in blocks}
    tensors = {tensor.name: block.axis for block in blocks for tensor in (block.input, block.output, *others[block.index])}
    assert context.fit is not None
    for values in capture(model, context.fit, list(tensors), axes=tensors, provider=context.provider, threads=context.threads):
        found = {}
        for block in blocks:
            x, y = values[block.input.name], values[block.output.name]
            rows = min(len(x), len(y))
            weights = token_weights(block, y, [values[each.name] for each in others[block.index]], weight)
            good = np.isfinite(x[:rows]).all(axis=1) & np.isfinite(y[:rows]).all(axis=1) & np.isfinite(weights[:rows])
            found[block.index] = (x[:rows][good], y[:rows][good], weights[:rows][good])
        yield found


def _error(x: Array, f: Array, y: Array, weights: Array, fix: str) -> float:
    f = np.where(np.isfinite(f), f, 0)
    size = np.sqrt(weights / weights.sum())[:, None].astype(np.float32)
    if fix == "none":
        return float(np.sum((size * (y - f)) ** 2, dtype=np.float64))
    held = np.arange(len(x)) % _HELD_OUT == _HELD_OUT - 1
    if held.all() or not held.any():
        held = np.zeros(len(x), bool)
    total = np.sum(weights[~held])
    features, wanted = (f, y) if fix == "scale" else (np.concatenate([x, f], axis=1), y)
    middle = [(weights[~held] @ part[~held] / total).astype(np.float32) for part in (features, wanted)]
    a, b = (size * (part - mean) for part, mean in zip((features, wanted), middle, strict=True))
    seen, judged = ~held, held if held.any() else ~held
    if fix == "scale":
        factor = np.sum(a[seen] * b[seen], axis=0) / np.maximum(np.sum(a[seen] ** 2, axis=0), 1e-30)
        left = b[judged] - a[judged] * factor
    else:
        gram = (a[seen].T @ a[seen]).astype(np.float64)
        gram[np.diag_indices_from(gram)] += _RIDGE * np.diag(gram) + 1e-9 * np.trace(gram) / len(gram) + 1e-30
        left = b[judged] - a[judged] @ np.linalg.solve(gram, (a[seen].T @ b[seen]).astype(np.float64))
    return float(np.sum(left.astype(np.float64) ** 2) / np.sum(size[judged] ** 2))
