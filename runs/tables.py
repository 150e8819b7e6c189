"""Markdown tables and figures with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float | None], form: str = "{:.2e}") -> str:
    """Format mean ± standard deviation; the mean alone where all agree, "-" where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.fmean(known))
    if len(set(known)) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(known))}"
