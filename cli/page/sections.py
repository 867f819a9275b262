"""Which sections a page has, in order."""

from __future__ import annotations

from .drift_sections import blocks_section, outputs_section
from .exact_section import exact_section
from .plan_sections import front_section, plan_section, size_section
from .report import Report
from .section import Section
from .timing_sections import latency_section, machine_section, placement_section, roofline_section


def sections(report: Report) -> list[Section]:
    """A section for each part that ``report`` has."""
    drift, timing = report.drift, report.timing
    found: list[Section] = []
    if drift is not None:
        found.append(outputs_section(drift))
        if drift.get("blocks"):
            found.append(blocks_section(drift))
    if report.front:
        found.append(front_section(report.front, report.drift_metric, report.feeds))
    if timing is not None:
        found.append(latency_section(timing))
        if "roofline" in timing["models"][0]:
            found.append(roofline_section(timing))
    if report.bytes:
        found.append(size_section(report.bytes))
    if timing is not None:
        found.append(placement_section(timing))
    if report.equivalence is not None:
        found.append(exact_section(report.equivalence, report.feeds))
    if report.plan is not None:
        found.append(plan_section(report.plan, report.passes, report.contributions, report.feeds))
    if timing is not None:
        found.append(machine_section(timing))
    return found
