"""The Timeline: what a simulated or a measured run of a schedule looks like."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from meshring.errors import UsageError
from meshring.pipeline.picture import draw
from meshring.pipeline.picture_files import save_with_matplotlib, svg
from meshring.pipeline.timeline_base import COMPUTE, EVENT, RECV, SEND, TimelineBase
from meshring.pipeline.timeline_text import lines_of
from meshring.pipeline.trace import write_trace

__all__ = ["COMPUTE", "EVENT", "RECV", "SEND", "Timeline", "save_timelines"]

_SUFFIXES = {
    ".svg": "svg",
    ".png": "matplotlib",
    ".pdf": "matplotlib",
    ".json": "trace",
    ".trace": "trace",
    ".txt": "text",
}


class Timeline(TimelineBase):
    """What ran when on which rank: figures, pictures and traces of one pipeline run.

    Shapes: events is a one-dimensional array of dtype EVENT, in any order. Units: those of the
    durations that were given; seconds where it was measured. Errors: UsageError for events that
    are none.
    """

    def save(
        self, path: str | PathLike[str], *, beside: Sequence[TimelineBase] = (), width: float = 1200
    ) -> Path:
        """Write the timeline to a file, in the format of its suffix; return the path.

        .svg: a picture; .png, .pdf: the same through matplotlib (`meshring[plot]`); .json, .trace:
        trace events for ui.perfetto.dev and chrome://tracing; .txt: text. Timelines given as
        `beside` are drawn below this one, with the same colours, and with the same scale where all
        have one unit. Units: width in pixels. Errors: UsageError for any other suffix.
        """
        return save_timelines([self, *beside], path, width=width)

    def text(self, width: int = 100, *, colour: bool = False) -> str:
        """The timeline as lines of at most `width` letters, one for each rank.

        F, B, I, W, R, G: forward, backward, backward of the input, of the weights, recompute,
        gradient reduction, then the microbatch; small letters for every second stage of a rank;
        dots where the rank is idle. colour: with ANSI escape codes.
        """
        return lines_of(self, width, colour=colour)

    def _repr_svg_(self) -> str:
        return svg(draw([self]))

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"<Timeline {self.title or 'of'} {self.num_ranks} ranks, {self.events.size} events, "
            f"makespan {self.makespan:.6g}{unit}>"
        )


def save_timelines(
    timelines: Sequence[TimelineBase], path: str | PathLike[str], *, width: float = 1200
) -> Path:
    """Write timelines to one file, in the format of its suffix (see Timeline.save)."""
    file = Path(path)
    kind = _SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise UsageError(
            f"Timeline.save: argument 'path' is {str(path)!r}; its suffix must be one of "
            f"{', '.join(_SUFFIXES)}"
        )
    if not 400 <= width <= 20000:
        raise UsageError(f"Timeline.save: argument 'width' is {width!r}; give 400 to 20000 pixels")
    if not file.absolute().parent.is_dir():
        raise UsageError(
            f"Timeline.save: argument 'path' is {str(path)!r}, and {file.parent} is no directory; "
            "create it first"
        )
    if not timelines:
        raise UsageError("Timeline.save: there is no timeline; give at least one")
    if kind == "svg":
        file.write_text(svg(draw(timelines, width)), encoding="utf-8")
    elif kind == "matplotlib":
        save_with_matplotlib(draw(timelines, width), file)
    elif kind == "trace":
        with file.open("w", encoding="utf-8") as out:
            write_trace(timelines, out)
    else:
        texts = [f"{t.title}\n{lines_of(t)}\n" for t in timelines]
        file.write_text("\n".join(texts), encoding="utf-8")
    return file
