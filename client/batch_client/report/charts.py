"""Two kinds of charts as SVG text: columns over an axis, and one bar of shares. Pure; colours are the page's classes.

The bare client has no matplotlib, and a page without scripts needs no more than these two.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from html import escape

from batch_client.figures import axis_labels

__all__ = ["columns", "nice_ticks", "shares_bar", "text_of"]

WIDTH, HEIGHT = 720, 230
# Classes s0, s1, … that the page has colours for.
COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 14, 14, 46
_ROW = 14
_BAR_HEIGHT = 34
# Powers of ten below it are not exact enough for an axis.
_LEAST_STEP = 1e-300
_FACTORS = (1, 2, 5, 10)
# No page may hold them: control characters, halves of surrogate pairs (names of files that are not UTF-8 have such,
# and JSON can spell them), and what is no character. https://www.w3.org/TR/xml/#charsets
_NO_CHARACTER = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def text_of(value: object) -> str:
    """Anybody's words as text of a page: escaped, with a replacement character for each that no page may hold."""
    return escape(_NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers within [low, high], 1, 2 or 5 times a power of ten apart; `low` alone where the
    two are too near each other or, for `most` up to 2, too far apart for that.
    """
    # In halves, since the difference of two floats may be over the largest one.
    raw = (high / 2 - low / 2) / most * 2
    if not _LEAST_STEP < raw < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    factor = next(factor for factor in _FACTORS if factor * power >= raw * (1 - 1e-9))
    ticks = _multiples(factor * power, low, high)
    if len(ticks) == 1 and factor == 5:  # of a range that is little more than one and a half of that
        finer = _multiples(2 * power, low, high)
        ticks = finer if len(finer) <= most + 1 else ticks
    return ticks or [low]


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1) if math.isfinite(at * step)]


def columns(
    stacks: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """Columns of equal width, one for each place of the series, which are stacked in their order and named in a legend
    when there are several.

    x_ticks, marks: places along the axis from 0 to 1 with their text; marks are lines across the chart, for one series.
    level: a height with its text, a dashed line.
    """
    count = max((len(values) for _, values in stacks), default=0)
    heights = [sum(values[at] for _, values in stacks) for at in range(count)]
    most = max([*heights, level[0] if level else 0.0, 1e-12])
    ticks = nice_ticks(0.0, min(most * 1.05, sys.float_info.max), 4)
    top = max(ticks[-1], *heights, level[0] if level else 0.0)
    head = _TOP + (_ROW * len(stacks) + 6 if len(stacks) > 1 else _ROW * len(marks))
    plot = _Plot(_LEFT, head, WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM, top)
    parts = [_grid(plot, ticks), *_columns(plot, stacks, count), _x_axis(plot, x_ticks, x_label)]
    if level is not None:
        at = plot.y(level[0])
        parts.append(f'<line class="level" x1="{plot.left}" x2="{plot.right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="note" x="{plot.right}" y="{at - 4:.1f}" text-anchor="end">'
                     f"{text_of(level[1])}</text>")
    # The one on the right begins highest: so no line goes through a text.
    parts += [_mark(plot, row, place, text) for row, (place, text) in enumerate(sorted(marks, reverse=True))]
    if len(stacks) > 1:
        parts += [_legend_line(series, plot.left, _TOP + _ROW * series, name)
                  for series, (name, _) in enumerate(stacks)]
    middle = plot.top + plot.height / 2
    parts.append(f'<text class="label" x="14" y="{middle:.1f}" text-anchor="middle" '
                 f'transform="rotate(-90 14 {middle:.1f})">{text_of(y_label)}</text>')
    return _svg(plot.bottom + _BOTTOM, f"{y_label} by {x_label}", parts)


def shares_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar of shares that add up to 1, each named with its percentage below; shares under 0.5 % are left out."""
    shown = [(name, share) for name, share in parts if share >= 0.005]
    drawn, left = [], 0.0
    for series, (name, share) in enumerate(shown):
        width = share * WIDTH
        drawn.append(f'<rect class="s{series % COLOURS}" x="{left:.1f}" y="0" width="{width:.1f}" '
                     f'height="{_BAR_HEIGHT}"/>')
        if width > 60:
            drawn.append(f'<text class="inside" x="{left + width / 2:.1f}" y="{_BAR_HEIGHT / 2 + 4}" '
                         f'text-anchor="middle">{share * 100:.0f} %</text>')
        drawn.append(_legend_line(series, 0, _BAR_HEIGHT + 8 + series * 18, f"{name}, {share * 100:.1f} %"))
        left += width
    return _svg(_BAR_HEIGHT + 12 + len(shown) * 18, "share of the run's time by what was waited for", drawn)


class _Plot:
    """The chart's inner rectangle and its vertical scale from 0 to `most`."""

    def __init__(self, left: float, top: float, width: float, height: float, most: float) -> None:
        self.left, self.top, self.width, self.height = left, top, width, height
        self.right, self.bottom = left + width, top + height
        self._most = most

    def y(self, value: float) -> float:
        return self.bottom - self.height * (value / self._most)


def _grid(plot: _Plot, ticks: Sequence[float]) -> str:
    return "".join(
        f'<line class="grid" x1="{plot.left}" x2="{plot.right}" y1="{plot.y(tick):.1f}" y2="{plot.y(tick):.1f}"/>'
        f'<text x="{plot.left - 6}" y="{plot.y(tick) + 4:.1f}" text-anchor="end">{text_of(label)}</text>'
        for tick, label in zip(ticks, axis_labels(ticks), strict=True))


def _columns(plot: _Plot, stacks: Sequence[tuple[str, Sequence[float]]], count: int) -> list[str]:
    step = plot.width / max(count, 1)
    gap = 1.0 if step > 12 else 0.0
    drawn = []
    for at in range(count):
        below = 0.0
        for series, (_, values) in enumerate(stacks):
            if values[at] <= 0:
                continue
            high, low = plot.y(below + values[at]), plot.y(below)
            drawn.append(f'<rect class="s{series % COLOURS}" x="{plot.left + at * step:.2f}" y="{high:.2f}" '
                         f'width="{step - gap:.2f}" height="{low - high:.2f}"/>')
            below += values[at]
    return drawn


def _x_axis(plot: _Plot, ticks: Sequence[tuple[float, str]], label: str) -> str:
    texts = "".join(
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.bottom}" y2="{plot.bottom + 4}"/>'
        f'<text x="{x:.1f}" y="{plot.bottom + 17}" text-anchor="middle">{text_of(text)}</text>'
        for x, text in ((plot.left + place * plot.width, text) for place, text in ticks))
    return (f'<line class="axis" x1="{plot.left}" x2="{plot.right}" y1="{plot.bottom}" y2="{plot.bottom}"/>{texts}'
            f'<text class="label" x="{plot.left + plot.width / 2:.1f}" y="{plot.bottom + 36}" text-anchor="middle">'
            f'{text_of(label)}</text>')


def _mark(plot: _Plot, row: int, place: float, text: str) -> str:
    """A line across the chart; its text stands above and to the left, unless there is no room."""
    x, y = plot.left + place * plot.width, _TOP + _ROW * row
    side, anchor = (-5, "end") if x > 2 * _LEFT else (5, "start")
    return (f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{plot.bottom}"/>'
            f'<text class="note" x="{x + side:.1f}" y="{y + 2}" text-anchor="{anchor}">{text_of(text)}</text>')


def _legend_line(series: int, x: float, y: float, text: str) -> str:
    return (f'<rect class="s{series % COLOURS}" x="{x}" y="{y}" width="11" height="11"/>'
            f'<text x="{x + 17}" y="{y + 10}">{text_of(text)}</text>')


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
            f'aria-label="{text_of(label)}">{"".join(parts)}</svg>')
