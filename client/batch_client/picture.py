"""Records and what the model said of them, as a PNG: arrays in, bytes out, nothing read and nothing written.

Right and wrong differ by colour (a pair that colour-blind people tell apart), by a sign and by the frame's
width, so the picture also works in grey. No text is mathematics: a dollar in a name is a dollar.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batch_client.errors import UsageError
from batch_client.figures import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["Panel", "draw"]

_IMAGE_COLUMNS, _BAR_COLUMNS = 8, 4
_BARS = 5
_DPI = 110
# Inches: above the first panel, above a panel's first row, above a tile, a page that holds a heading.
_HEADING, _TITLE, _CAPTION, _NARROWEST = 0.55, 0.32, 0.5, 5.0
_SMALLEST_IMAGE = 8
# Blue and vermillion of Okabe and Ito's palette, https://jfly.uni-koeln.de/color/
_RIGHT, _WRONG, _PLAIN, _QUIET = "#0072B2", "#D55E00", "#333333", "#777777"


@dataclass(frozen=True)
class Panel:
    """One titled group of records: `records` (n, …), `scores` (n, k), and `labels` (n,) where they are known.

    Records that are images, (n, H, W), (n, H, W, 3), (n, H, W, 1), (n, 1, H, W) or (n, 3, H, W), uint8 or another
    dtype, are drawn as such; of any other shape the highest scores are drawn as bars. `numbers` (n,) are the records'
    places in the source, written above each.
    """

    title: str
    records: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None
    numbers: Sequence[int]


def draw(heading: str, panels: Sequence[Panel]) -> bytes:
    """PNG of several panels, each of a record or more, under one heading: each record with the predicted class and its
    score, and with labels which are right.

    Raises UsageError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError('pictures need matplotlib: pip install "batch-client[demo]"') from error
    layout = _layout(panels)
    heights = [layout.height(panel) for panel in panels]
    figure = Figure(figsize=(layout.width, _HEADING + sum(heights)), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.3 / figure.get_figheight(), heading, ha="center", va="center", fontsize=14,
                parse_math=False)
    parts = figure.subfigures(len(panels) + 1, 1, height_ratios=[_HEADING, *heights], squeeze=False)[1:, 0]
    for part, panel in zip(parts, panels, strict=True):
        _draw_panel(part, panel, layout)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


@dataclass(frozen=True)
class _Layout:
    """Sizes in inches; `limits` is the one scale that all bars share, None for images."""

    columns: int
    tile_width: float
    tile_height: float
    between: float
    left: float
    limits: tuple[float, float] | None

    @property
    def width(self) -> float:
        return max(_NARROWEST, self.left + self.columns * self.tile_width + (self.columns - 1) * self.between + 0.2)

    def rows(self, panel: Panel) -> int:
        return -(-len(panel.records) // self.columns)

    def height(self, panel: Panel) -> float:
        return _TITLE * bool(panel.title) + self.rows(panel) * (_CAPTION + self.tile_height) + 0.1


def _layout(panels: Sequence[Panel]) -> _Layout:
    most = max(len(panel.records) for panel in panels)
    images = _as_images(panels[0].records)
    if images is not None:
        width = 1.15
        aspect = min(max(images.shape[1] / images.shape[2], 0.4), 2.0)
        return _Layout(min(most, _IMAGE_COLUMNS), width, width * aspect, 0.16, 0.2, None)
    scores = np.concatenate([panel.scores.ravel() for panel in panels])
    scores = scores[np.isfinite(scores)]
    low, high = min(0.0, scores.min(initial=0.0)), max(0.0, scores.max(initial=0.0))
    likely = low == 0 and high <= 1
    margin = 0.0 if likely else (high - low) * 0.03
    limits = (low - margin * (low < 0), 1.0 if likely else high + margin)
    classes = panels[0].scores.shape[1]
    between, left = (0.3, 0.2) if classes == 1 else (1.15, 1.15)
    return _Layout(min(most, _BAR_COLUMNS), 1.5, 0.1 + 0.2 * min(classes, _BARS), between, left, limits)


def _draw_panel(part: SubFigure, panel: Panel, layout: _Layout) -> None:
    height, rows, columns = layout.height(panel), layout.rows(panel), layout.columns
    part.set_facecolor("white")
    grid = part.subplots(rows, columns, squeeze=False)
    right_edge = layout.left + columns * layout.tile_width + (columns - 1) * layout.between
    part.subplots_adjust(
        left=layout.left / layout.width,
        right=right_edge / layout.width,
        bottom=0.1 / height,
        top=1 - (_TITLE * bool(panel.title) + _CAPTION) / height,
        wspace=layout.between / layout.tile_width,
        hspace=_CAPTION / layout.tile_height,
    )
    if panel.title:
        part.text(0.2 / layout.width, 1 - 0.2 / height, panel.title, ha="left", va="center", fontsize=11,
                  parse_math=False)
    images, right = _as_images(panel.records), _right(panel)
    for i, axes in enumerate(grid.flat):
        if i >= len(panel.records):
            axes.set_axis_off()
            continue
        colour = _PLAIN if right is None else (_RIGHT if right[i] else _WRONG)
        if layout.limits is not None:
            _bars(axes, panel.scores[i], colour, layout.limits)
        elif images is not None:
            axes.imshow(images[i], cmap="gray", interpolation="nearest" if images.shape[1] < 64 else None)
            axes.set_yticks([])
        _frame(axes, colour, wide=right is not None and not right[i])
        _caption(axes, _lines(panel, i, right), colour)


def _frame(axes: Axes, colour: str, *, wide: bool) -> None:
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(3.0 if wide else 1.0)


def _lines(panel: Panel, i: int, right: np.ndarray | None) -> tuple[str, str]:
    """What is written above a tile, the prediction first."""
    scores = panel.scores[i]
    sign = "" if right is None else ("✓ " if right[i] else "✗ ")
    truth = f"   is {int(panel.labels[i])}" if panel.labels is not None and right is not None and not right[i] else ""
    if not np.isfinite(scores).all():
        said = "no score"
    elif len(scores) == 1:
        said = f"{scores[0]:.4g}"
    else:
        best = int(scores.argmax())
        said = f"{best}  {percent(scores[best]) if _is_probability(scores) else f'{scores[best]:.3g}'}"
    return sign + said, f"#{panel.numbers[i]}{truth}"


def _caption(axes: Axes, lines: Sequence[str], colour: str) -> None:
    bold = colour == _WRONG
    for line, text in enumerate(lines):
        axes.annotate(
            text,
            (0.5, 1),
            xytext=(0, 15 if line == 0 else 4),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10.5 if line == 0 else 8,
            color=colour if line == 0 or bold else _QUIET,
            fontweight="bold" if bold and line == 0 else "normal",
        )


def _bars(axes: Axes, scores: np.ndarray, colour: str, limits: tuple[float, float]) -> None:
    values = np.nan_to_num(scores.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    order = np.argsort(-values, kind="stable")[:_BARS]
    axes.barh(range(len(order)), values[order], height=0.7, color=colour)
    axes.axvline(0, color=_QUIET, linewidth=0.8)
    named = len(scores) > 1 and bool(np.isfinite(scores).all())
    axes.set_yticks(range(len(order)), [str(k) if named else "" for k in order])
    axes.tick_params(length=0, labelsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(*(limits if limits[0] < limits[1] else (0.0, 1.0)))


def _right(panel: Panel) -> np.ndarray | None:
    """Which predictions are the label's class, bool (n,); None without labels or without classes."""
    if panel.labels is None or panel.scores.shape[1] < 2:
        return None
    finite = np.isfinite(panel.scores).all(axis=1)
    return np.asarray(finite & (np.where(finite[:, None], panel.scores, 0).argmax(axis=1) == panel.labels))


def _as_images(records: np.ndarray) -> np.ndarray | None:
    """(n, H, W) or (n, H, W, 3 or 4) for imshow, each picture over its full range; None if these are none."""
    if records.ndim == 4 and records.shape[1] in (1, 3) and records.shape[3] not in (1, 3, 4):
        records = np.moveaxis(records, 1, -1)
    if records.ndim == 4 and records.shape[3] == 1:
        records = records[..., 0]
    colours = records.ndim == 4 and records.shape[3] in (3, 4)
    if not (records.ndim == 3 or colours) or min(records.shape[1:3]) < _SMALLEST_IMAGE:
        return None
    if records.dtype == np.uint8:
        return records
    values = np.nan_to_num(records.astype(np.float64))
    axes = tuple(range(1, values.ndim))
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    return np.asarray((values - low) / np.where(high > low, high - low, 1.0))


def _is_probability(scores: np.ndarray) -> bool:
    return bool((scores >= 0).all() and (scores <= 1).all() and abs(float(scores.sum()) - 1) < 1e-2)
