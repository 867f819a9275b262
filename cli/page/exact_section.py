"""The exact passes on the page: what they changed in the graph, and that the outputs did not move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .section import Section, Table


def exact_section(equivalence: Mapping[str, Any], feeds: str | None) -> Section:
    """Nodes before and after, operators that ONNX Runtime executes, and the outputs on many kinds of inputs."""
    counts = [["in the file", *equivalence["nodes"].values()]]
    if equivalence["executed"] is not None:
        counts.append(["executed by ONNX Runtime", *equivalence["executed"].values()])
        counts += [[f"executed {op}", each["before"], each["after"]] for op, each in equivalence["operators"].items()]
    tables = [Table("Nodes before and after the exact passes", ["nodes", "before", "after"], counts)]
    if equivalence["differences"]:
        tables.append(Table("Largest difference, as a share of an output's largest number", ["inputs", "difference"], [
            [kind, "not taken by the model" if value is None else value] for kind, value in equivalence["differences"].items()]))
    text = f"{', '.join(equivalence['passes'])}: they change nothing but rounding. Inputs called given are those of the report, "
    return Section("exact", "Exact passes", f"{text}the others are made up to tempt a rewrite.", feeds, tables=tables)
