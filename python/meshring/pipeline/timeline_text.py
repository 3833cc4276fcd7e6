"""Timelines as text: one line per rank, for terminals."""

from __future__ import annotations

import numpy as np

from meshring.pipeline.action import OpKind
from meshring.pipeline.picture import COLOURS, chunks_of, shade
from meshring.pipeline.timeline_base import TimelineBase

LETTERS = {
    OpKind.FORWARD: "F",
    OpKind.BACKWARD: "B",
    OpKind.BACKWARD_INPUT: "I",
    OpKind.BACKWARD_WEIGHT: "W",
    OpKind.RECOMPUTE: "R",
    OpKind.REDUCE_GRAD: "G",
    OpKind.UNSHARD: "U",
    OpKind.RESHARD: "V",
    OpKind.OVERLAP_F_B: "X",
}
MOST_ROWS = 64


def lines_of(timeline: TimelineBase, width: int = 100, *, colour: bool = False) -> str:
    """One line per rank: letter and microbatch of each operation, dots where the rank is idle.

    A letter is small for every second stage of a rank. With colour, ANSI escape codes.
    """
    step = -(-timeline.num_ranks // MOST_ROWS)
    ranks = range(0, timeline.num_ranks, step)
    margin = len(f"rank {timeline.num_ranks - 1} ")
    cells = max(width - margin, 10)
    lines = [
        f"{f'rank {rank}':<{margin}}{_row(timeline, rank, cells, colour)}".rstrip()
        for rank in ranks
    ]
    if step > 1:
        lines.append(f"(every {step}th of {timeline.num_ranks} ranks)")
    unit = f" {timeline.unit}" if timeline.unit else ""
    lines.append(
        f"makespan {timeline.makespan:.6g}{unit}; bubble by makespan "
        f"{timeline.bubble_makespan:.6g}{unit} ({timeline.bubble_rate_makespan:.1%}), by span "
        f"{timeline.bubble_span:.6g}{unit} ({timeline.bubble_rate_span:.1%}); live activations "
        f"at most {int(timeline.peak_activations.max())}"
    )
    return "\n".join(lines)


def _row(timeline: TimelineBase, rank: int, cells: int, colour: bool) -> str:
    rows = timeline.compute(rank)
    line, paint = ["."] * cells, [""] * cells
    if not rows.size or not timeline.makespan:
        return "".join(line)
    scale = cells / timeline.makespan
    first = np.round((rows["start"] - timeline.start) * scale).astype(int)
    last = np.round((rows["end"] - timeline.start) * scale).astype(int)
    if np.median(last - first) < 1:
        return _dense(timeline, rank, cells)
    chunk = chunks_of(rows)
    for i in range(rows.size):
        a, b = int(first[i]), max(int(last[i]), int(first[i]) + 1)
        kind = OpKind(int(rows["kind"][i]))
        letter = LETTERS[kind].lower() if chunk[i] % 2 else LETTERS[kind]
        label = letter + (str(rows["microbatch"][i]) if kind.has_microbatch else "")
        fits = len(label) <= b - a - (0 if colour else 1) or (
            len(label) == b - a and len(label) > 1
        )
        fill = label.ljust(b - a, " " if colour else "-") if fits else letter * (b - a)
        line[a : min(b, cells)] = fill[: max(min(b, cells) - a, 0)]
        paint[a : min(b, cells)] = [shade(COLOURS[kind], int(chunk[i]))] * max(min(b, cells) - a, 0)
    return _painted(line, paint) if colour else "".join(line)


def _dense(timeline: TimelineBase, rank: int, cells: int) -> str:
    """Where operations are finer than letters: the digit of how many tenths the rank computes."""
    rows = timeline.compute(rank)
    ends = np.maximum.accumulate(rows["end"])
    knots = np.stack([rows["start"], ends], axis=1).ravel()
    total = np.repeat(np.cumsum(ends - rows["start"]), 2)
    total[0::2] -= ends - rows["start"]
    edges = timeline.start + np.linspace(0, timeline.makespan, cells + 1)
    part = np.diff(np.interp(edges, knots, total)) * cells / timeline.makespan
    marks = np.array(list(" .:-=+*#%@"))
    return "".join(marks[np.clip((part * 10).astype(int), 0, 9)])


def _painted(line: list[str], paint: list[str]) -> str:
    out, current = [], ""
    for letter, colour in zip(line, paint, strict=True):
        if colour != current:
            r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5)) if colour else (0, 0, 0)
            dark = 0.3 * r + 0.6 * g + 0.1 * b < 128
            ink = "97" if dark else "30"
            out.append(f"\x1b[0m\x1b[48;2;{r};{g};{b};{ink}m" if colour else "\x1b[0m")
            current = colour
        out.append(letter)
    return "".join(out) + "\x1b[0m"
