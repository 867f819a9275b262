"""Drift on the page: of the outputs, and of the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .section import Figure, Section, Table, feeds, worst

_METRICS = {"rel_l2": "relative error", "sqnr_db": "SQNR, dB", "cosine_mean": "cosine, mean",
            "cosine_p5": "cosine, 5th percentile", "cosine_min": "cosine, least", "max_abs": "largest difference",
            "mean_abs": "mean difference", "kl_mean": "KL, nats", "top1": "top-1 agreement", "top5": "top-5 agreement",
            "nonfinite": "no longer finite"}


def outputs_section(drift: Mapping[str, Any]) -> Section:
    """How far each output moved."""
    outputs = drift["outputs"]
    columns = [key for key in _METRICS if any(metrics[key] is not None for metrics in outputs.values())]
    table = Table("Drift of each output", ["output", *(_METRICS[key] for key in columns)],
                  [[name, *(metrics[key] for key in columns)] for name, metrics in outputs.items()])
    figures = [Figure(charts.drift_of_outputs(outputs), "Relative error of each output.")] if len(outputs) > 1 else []
    text = (f"How far the outputs are from those of the reference, over {feeds(drift['samples'])} of {drift['feeds']} inputs "
            f"on {drift['provider'].upper()}. Rows of the last axis are vectors; padding is left out.")
    return Section("outputs", "Drift of the outputs", text, drift["feeds"], figures=figures, tables=[table])


def blocks_section(drift: Mapping[str, Any]) -> Section:
    """What each block does alone and adds in the chain."""
    blocks = drift["blocks"]
    shown = [each for each in blocks if each["rank"] is not None]
    columns = ["block", "name", "rank", "alone: relative error", "alone: cosine, mean", "chain: relative error",
               "added in the chain", "at the block: relative error"]
    rows = [[each["block"], each["name"], each["rank"], worst(each["alone"]).get("rel_l2"),
             worst(each["alone"]).get("cosine_mean"), worst(each["chain"]).get("rel_l2"),
             max((size for size in each["added"].values() if size is not None), default=None), each["rel_l2"]] for each in shown]
    tables = [Table("Drift of each FFN block, at the output that moved most", columns, rows)] if shown else []
    left_out = [[each["block"], each["name"], each["reason"]] for each in blocks if each["rank"] is None]
    if left_out:
        tables.append(Table("Blocks that could not be compared", ["block", "name", "reason"], left_out))
    caption = "Bars: one block rewritten, the rest original. Line: everything rewritten up to and with the block."
    text = (f"Each FFN block on its own and in the chain, over {feeds(drift['block_samples'])}, spread over those above. "
            "Rank 1 does most damage alone.")
    return Section("blocks", "Drift by block", text, drift["feeds"],
                   figures=[Figure(charts.drift_of_blocks(shown), caption)] if shown else [], tables=tables)
