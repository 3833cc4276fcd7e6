"""Drawings as SVG, without any library, and as PNG or PDF, through matplotlib."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.picture import Drawing, Word
from meshring.pipeline.timeline_base import Floats

_FONT = "font-family='Helvetica,Arial,sans-serif'"
_DPI = 100


def svg(drawing: Drawing) -> str:
    """The drawing as an SVG document."""
    size = f"{drawing.width:g} {drawing.height:g}"
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {size}' width='{drawing.width:g}' "
        f"height='{drawing.height:g}' {_FONT}>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
    ]
    for colour, boxes in _merged(drawing.boxes):
        out += _svg_rows(colour, boxes)
    for colour, lines in drawing.lines:
        path = "".join(f"M{a:g} {b:g}L{c:g} {d:g}" for a, b, c, d in lines.round(2).tolist())
        out.append(f"<path stroke='{colour}' fill='none' d='{path}'/>")
    out += [_svg_word(word) for word in drawing.words]
    return "\n".join([*out, "</svg>\n"])


def _svg_rows(colour: str, boxes: Floats) -> list[str]:
    """Boxes of one colour, those of one row and height as pieces of one thick line."""
    found = []
    boxes = boxes[np.lexsort((boxes[:, 0], boxes[:, 3], boxes[:, 1]))]
    change = np.flatnonzero((boxes[1:, 1] != boxes[:-1, 1]) | (boxes[1:, 3] != boxes[:-1, 3]))
    for row in np.split(boxes, change + 1):
        y, height = row[0, 1], row[0, 3]
        start, end = row[:, 0].round(2), (row[:, 0] + row[:, 2]).round(2)
        skip = (start - np.concatenate([[0.0], end[:-1]])).round(2).tolist()
        width = (end - start).round(2).tolist()
        pieces = "".join(f"m{a:g} 0h{w:g}" for a, w in zip(skip, width, strict=True))
        found.append(
            f"<path stroke='{colour}' stroke-width='{height:.4g}' d='M0 {y + height / 2:.6g}"
            f"{pieces}'/>"
        )
    return found


def _svg_word(word: Word) -> str:
    anchor = "" if word.anchor == "start" else f" text-anchor='{word.anchor}'"
    bold = " font-weight='bold'" if word.bold else ""
    return (
        f"<text x='{word.x:.1f}' y='{word.y:.1f}' font-size='{word.size:.3g}' "
        f"fill='{word.colour}'{anchor}{bold}>{escape(word.text)}</text>"
    )


def _merged(boxes: list[tuple[str, Floats]]) -> list[tuple[str, Floats]]:
    """One entry per colour, in the order of first use: boxes never cover those of other rows."""
    by_colour: dict[str, list[Floats]] = {}
    for colour, some in boxes:
        by_colour.setdefault(colour, []).append(some)
    return [(colour, np.concatenate(parts)) for colour, parts in by_colour.items()]


def save_with_matplotlib(drawing: Drawing, path: Path) -> None:
    """Write the drawing to a file of a format that matplotlib knows.

    Errors: UsageError where matplotlib is not installed.
    """
    try:
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            f"Timeline.save: {path.name} needs matplotlib: pip install 'meshring[plot]'; "
            "an .svg needs nothing"
        ) from None
    figure = Figure(figsize=(drawing.width / _DPI, drawing.height / _DPI), dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    for colour, boxes in _merged(drawing.boxes):
        x, y, w, h = boxes.T
        corners = np.stack([x, y, x + w, y, x + w, y + h, x, y + h], axis=1).reshape(-1, 4, 2)
        axes.add_collection(PolyCollection(list(corners), facecolors=colour, linewidths=0))
    for colour, lines in drawing.lines:
        axes.add_collection(
            LineCollection(list(lines.reshape(-1, 2, 2)), colors=colour, linewidths=0.8)
        )
    places = {"start": "left", "middle": "center", "end": "right"}
    for word in drawing.words:
        axes.text(
            word.x,
            word.y,
            word.text,
            fontsize=word.size * 72 / _DPI,
            color=word.colour,
            ha=places[word.anchor],
            va="baseline",
            fontweight="bold" if word.bold else "normal",
        )
    figure.savefig(path, dpi=2 * _DPI, facecolor="white")
