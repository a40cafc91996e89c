"""The report of the learning studies: a table and a plot each, written into ``docs/``.

Invariant: every number comes from the runs' own records; a study without finished runs says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from statistics_of_seeds import Estimate, area, estimate, final, paired, peak
from studies import Study, results

from agentgym.errors import UsageError

BEGIN, END = "<!-- figures: {name} -->", "<!-- end: {name} -->"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def write(study: Study, root: Path, docs: Path, tell: Callable[[str], None] = lambda text: None) -> str:
    """Put the study's figures into ``learning.md``, or at its end, and the plot beside it; return the table.

    Raises:
        UsageError: The page says where they begin and not where they end.
    """
    page = docs / "learning.md"
    begin, end = BEGIN.format(name=study.name), END.format(name=study.name)
    before, begun, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if begun and not ended:
        raise UsageError(f"{page} has {begin} and no {end}", hint="the figures stand between these two")
    found = results(study, root, tell)
    text = table(study, found)
    folder = docs / "learning"
    folder.mkdir(exist_ok=True)
    if any(found.values()):
        (folder / f"{study.name}.svg").write_text(plot(study, found))
        text += f"\n![Success over steps](learning/{study.name}.svg)\n"
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
    return text


def table(study: Study, found: dict[str, dict[int, list[tuple[int, float]]]]) -> str:
    """Markdown: an arm a line, then the paired differences."""
    lines = [
        "| arm | seeds | final success | area under the curve | peak, beside |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, curves in found.items():
        if not curves:
            lines.append(f"| {arm} | 0 | not run | | |")
            continue
        ends, areas = (estimate([f(c) for c in curves.values()]) for f in (final, area))
        top = estimate([peak(c) for c in curves.values()]).mean
        lines.append(f"| {arm} | {len(curves)} | {_percent(ends)} | {_percent(areas)} | {top:.1%} |")
    lines += [
        "",
        "| paired difference | seeds | final success | area under the curve |",
        "| --- | --- | --- | --- |",
    ]
    for arm, base in study.pairs:
        cells = []
        seeds = 0
        for f in (final, area):
            gap = paired({s: f(c) for s, c in found[arm].items()}, {s: f(c) for s, c in found[base].items()})
            seeds = gap.seeds if gap else 0
            cells.append(_percent(gap, sign="+") if gap else "not run")
        lines.append(f"| {arm} - {base} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(study: Study, found: dict[str, dict[int, list[tuple[int, float]]]]) -> str:
    """SVG: thin lines a seed, a thick one their mean, an arm a colour."""
    width, height, left, top, right, bottom = 720, 380, 56, 20, 170, 44
    most = max((step for curves in found.values() for c in curves.values() for step, _ in c), default=0) + 1

    def place(step: int, value: float) -> str:
        x = left + (width - left - right) * (step + 1) / most
        return f"{x:.1f},{top + (height - top - bottom) * (1 - value):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(-1, tick).split(",")
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{width - right}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
        )
    for tick in range(0, most + 1, max(1, math.ceil(most / 6))):
        x = place(tick - 1, 0.0).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">steps</text>'
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" '
        'text-anchor="middle">success</text>'
    )
    for number, (arm, curves) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        for curve in curves.values():
            points = " ".join(place(*point) for point in curve)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" opacity="0.25"/>')
        if curves:
            steps = sorted(set.intersection(*({s for s, _ in c} for c in curves.values())))
            means = [sum(dict(c)[s] for c in curves.values()) / len(curves) for s in steps]
            points = " ".join(place(s, m) for s, m in zip(steps, means, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        y = top + 16 + 20 * number
        parts.append(
            f'<line x1="{width - right + 14}" y1="{y - 4}" x2="{width - right + 38}" y2="{y - 4}" '
            f'stroke="{colour}" stroke-width="2.5"/><text x="{width - right + 44}" y="{y}">{arm}</text>'
        )
    return "".join(parts) + "</svg>\n"


def _percent(value: Estimate, sign: str = "") -> str:
    if math.isinf(value.low):
        return f"{value.mean:{sign}.1%}"
    return f"{value.mean:{sign}.1%} ({value.low:{sign}.1%} to {value.high:{sign}.1%})"
