"""The layout of a Timeline's picture: boxes, lines and words, for any renderer to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshring.pipeline.action import OpKind
from meshring.pipeline.timeline_base import COMPUTE, RECV, SEND, Events, Floats, TimelineBase

COLOURS = {
    OpKind.FORWARD: "#3b75af",
    OpKind.BACKWARD: "#ef8536",
    OpKind.BACKWARD_INPUT: "#f6c85f",
    OpKind.BACKWARD_WEIGHT: "#519e3e",
    OpKind.RECOMPUTE: "#8d69b8",
    OpKind.REDUCE_GRAD: "#84584e",
    OpKind.UNSHARD: "#7f7f7f",
    OpKind.RESHARD: "#a8a8a8",
    OpKind.OVERLAP_F_B: "#c44e52",
    OpKind.SEND_ACTIVATION: "#17a2b8",
    OpKind.RECV_ACTIVATION: "#8fd3de",
    OpKind.SEND_GRADIENT: "#d6478f",
    OpKind.RECV_GRADIENT: "#f0b3d1",
}
NAMES = {
    OpKind.FORWARD: "forward",
    OpKind.BACKWARD: "backward",
    OpKind.BACKWARD_INPUT: "backward: input",
    OpKind.BACKWARD_WEIGHT: "backward: weight",
    OpKind.RECOMPUTE: "recompute",
    OpKind.REDUCE_GRAD: "reduce gradients",
    OpKind.UNSHARD: "unshard",
    OpKind.RESHARD: "reshard",
    OpKind.OVERLAP_F_B: "forward and backward",
    OpKind.SEND_ACTIVATION: "send activation",
    OpKind.RECV_ACTIVATION: "receive activation",
    OpKind.SEND_GRADIENT: "send gradient",
    OpKind.RECV_GRADIENT: "receive gradient",
}
IDLE, INK, PALE = "#f1f1f1", "#222222", "#777777"
_DARK = {OpKind.FORWARD, OpKind.BACKWARD_WEIGHT, OpKind.RECOMPUTE, OpKind.REDUCE_GRAD}

LEFT, RIGHT, HEAD, FOOT = 64.0, 128.0, 44.0, 26.0
MOST_ROWS = 256  # above, the picture shows every k-th rank


@dataclass
class Word:
    """A piece of text; anchor is start, middle or end."""

    x: float
    y: float
    size: float
    text: str
    anchor: str = "start"
    colour: str = INK
    bold: bool = False


@dataclass
class Drawing:
    """What a renderer draws, in pixels from the upper left corner."""

    width: float
    height: float = 0.0
    boxes: list[tuple[str, Floats]] = field(default_factory=list)  # colour, rows of x y w h
    lines: list[tuple[str, Floats]] = field(default_factory=list)  # colour, rows of x y x2 y2
    words: list[Word] = field(default_factory=list)

    def box(self, colour: str, x: float, y: float, w: float, h: float) -> None:
        """Add one box."""
        self.boxes.append((colour, np.array([[x, y, w, h]])))


def draw(timelines: Sequence[TimelineBase], width: float = 1200.0) -> Drawing:
    """Lay the timelines out below one another; those with one unit share the scale of time."""
    drawing = Drawing(width)
    units = {t.unit for t in timelines}
    longest = max((t.makespan for t in timelines), default=0.0)
    y = 0.0
    for timeline in timelines:
        y = _panel(drawing, timeline, y, longest if len(units) == 1 else timeline.makespan)
    drawing.height = _legend(drawing, timelines, y)
    return drawing


def row_height(ranks: int) -> float:
    """Pixels of one rank's row."""
    return float(np.clip(640 / max(ranks, 1), 3.0, 30.0))


def _panel(drawing: Drawing, timeline: TimelineBase, top: float, time: float) -> float:
    step = -(-timeline.num_ranks // MOST_ROWS)
    ranks = range(0, timeline.num_ranks, step)
    height = row_height(len(ranks))
    plot = drawing.width - LEFT - RIGHT
    scale = plot / time if time > 0 else 0.0
    y = top + HEAD
    mixed = [_row(drawing, timeline, r, y + i * height, height, scale) for i, r in enumerate(ranks)]
    _headline(drawing, timeline, top, step, any(mixed))
    bottom = y + len(ranks) * height
    _row_words(drawing, timeline, list(ranks), y, height)
    _axis(drawing, timeline, time, bottom, scale)
    return bottom + FOOT


def _headline(drawing: Drawing, timeline: TimelineBase, top: float, step: int, mixed: bool) -> None:
    unit = f" {timeline.unit}" if timeline.unit else ""
    some = f", every {step}th shown" if step > 1 else ""
    fine = " · operations finer than a pixel: mixed colours" if mixed else ""
    drawing.words += [
        Word(LEFT, top + 17, 14, timeline.title or "pipeline", bold=True),
        Word(
            LEFT,
            top + 34,
            11,
            f"{timeline.num_ranks} ranks{some} · makespan {timeline.makespan:.6g}{unit} · "
            f"bubble (makespan) {timeline.bubble_makespan:.6g}{unit} = "
            f"{timeline.bubble_rate_makespan:.1%} · bubble (span) {timeline.bubble_span:.5g}{unit}"
            f" = {timeline.bubble_rate_span:.1%}{fine}",
            colour=PALE,
        ),
        Word(drawing.width - RIGHT + 38, top + 34, 10, "idle", "end", PALE),
        Word(drawing.width - 6, top + 34, 10, "live activations", "end", PALE),
    ]


def _row_words(
    drawing: Drawing, timeline: TimelineBase, ranks: list[int], top: float, height: float
) -> None:
    size = float(np.clip(height * 0.62, 7.5, 12))
    every = max(1, int(np.ceil((size + 1.5) / height)))
    idle = timeline.idle / timeline.makespan if timeline.makespan else timeline.idle
    for at in range(0, len(ranks), every):
        rank, y = ranks[at], top + (at + 0.5) * height + size * 0.36
        drawing.words += [
            Word(LEFT - 6, y, size, f"rank {rank}", "end"),
            Word(drawing.width - RIGHT + 38, y, size, f"{idle[rank]:.0%}", "end"),
            Word(drawing.width - 6, y, size, f"{timeline.peak_activations[rank]}", "end"),
        ]


def _row(
    drawing: Drawing, timeline: TimelineBase, rank: int, y: float, height: float, scale: float
) -> bool:
    """Draw one rank; whether its operations were too fine to be drawn one by one."""
    gap = 1.0 if height >= 8 else 0.0
    rows = timeline.compute(rank)
    drawing.box(IDLE, LEFT, y, timeline.makespan * scale, height - gap)
    if not rows.size:
        return False
    transfers = _transfers(timeline, rank) if height >= 14 else rows[:0]
    strip = height * 0.24 if transfers.size else 0.0
    tall = height - gap - strip
    x = LEFT + (rows["start"] - timeline.start) * scale
    w = (rows["end"] - rows["start"]) * scale
    fine = bool(np.median(w) < 0.8)
    if fine:
        _blend(drawing, timeline, rank, y, tall, scale)
    else:
        _boxes(drawing, timeline, rank, x, w, y, tall)
    for lane, place in ((SEND, 0), (RECV, 1)):
        part = transfers[transfers["lane"] == lane]
        _strip(drawing, timeline, part, y + tall, strip, scale, place)
    return fine


def _boxes(
    drawing: Drawing,
    timeline: TimelineBase,
    rank: int,
    x: Floats,
    w: Floats,
    y: float,
    height: float,
) -> None:
    rows = timeline.compute(rank)
    chunk = chunks_of(rows)
    together = _pairs(rows)
    top = np.where(together == 2, y + height / 2, y)
    tall = np.where(together > 0, height / 2, height)
    hair = np.where(w >= 3, 0.6, 0.0)
    for kind in np.unique(rows["kind"]):
        for c in np.unique(chunk):
            mask = (rows["kind"] == kind) & (chunk == c)
            if mask.any():
                colour = shade(COLOURS[OpKind(kind)], int(c))
                shape = np.stack([x, top, w - hair, tall], axis=1)[mask]
                drawing.boxes.append((colour, shape))
    for i in np.flatnonzero(w >= 7):
        kind = OpKind(int(rows["kind"][i]))
        text = str(rows["microbatch"][i]) if kind.has_microbatch else ""
        size = min(float(tall[i]) * 0.72, float(w[i]) / (0.62 * max(len(text), 1)), 12.0)
        if text and size >= 6:
            colour = "#ffffff" if kind in _DARK and chunk[i] == 0 else INK
            at = float(top[i] + tall[i] / 2 + size * 0.35)
            drawing.words.append(Word(float(x[i] + w[i] / 2), at, size, text, "middle", colour))


def _blend(
    drawing: Drawing, timeline: TimelineBase, rank: int, y: float, height: float, scale: float
) -> None:
    """Where operations are finer than pixels, each pixel has the mean of its colours."""
    rows = timeline.compute(rank)
    pixels = int(np.ceil(timeline.makespan * scale))
    edges = timeline.start + np.arange(pixels + 1) / scale
    mix = np.zeros((pixels, 3))
    filled = np.zeros(pixels)
    for kind in np.unique(rows["kind"]):
        part = rows[rows["kind"] == kind]
        ends = np.maximum.accumulate(part["end"])
        knots = np.stack([part["start"], ends], axis=1).ravel()
        total = np.repeat(np.cumsum(ends - part["start"]), 2)
        total[0::2] -= ends - part["start"]
        cover = np.diff(np.interp(edges, knots, total)) * scale
        mix += cover[:, None] * np.array(_rgb(COLOURS[OpKind(kind)]))
        filled += cover
    rest = np.clip(1 - filled, 0, 1)
    mix = (mix + rest[:, None] * np.array(_rgb(IDLE))) / np.maximum(filled + rest, 1e-12)[:, None]
    codes = np.round(mix / 12).astype(np.int64) * 12
    change = np.flatnonzero(np.any(codes[1:] != codes[:-1], axis=1)) + 1
    first = np.concatenate([[0], change])
    last = np.concatenate([change, [pixels]])
    for a, b in zip(first, last, strict=True):
        colour = _hex(np.minimum(codes[a], 255))
        drawing.box(colour, LEFT + float(a), y, float(b - a), height)


def _strip(
    drawing: Drawing,
    timeline: TimelineBase,
    rows: Events,
    y: float,
    height: float,
    scale: float,
    place: int,
) -> None:
    for kind in np.unique(rows["kind"]):
        part = rows[rows["kind"] == kind]
        shape = np.empty((part.size, 4))
        shape[:, 0] = LEFT + (part["start"] - timeline.start) * scale
        shape[:, 1] = y + place * height / 2
        shape[:, 2] = np.maximum((part["end"] - part["start"]) * scale, 0.5)
        shape[:, 3] = height / 2
        drawing.boxes.append((COLOURS[OpKind(kind)], shape))


def _transfers(timeline: TimelineBase, rank: int) -> Events:
    rows = timeline.events
    moves = (rows["lane"] != COMPUTE) & (rows["end"] > rows["start"])
    found: Events = rows[moves & (rows["rank"] == rank)]
    return found


def _axis(drawing: Drawing, timeline: TimelineBase, time: float, y: float, scale: float) -> None:
    if time <= 0:
        return
    step = 10 ** np.floor(np.log10(time / 6))
    step *= min((f for f in (1, 2, 5, 10) if time / (step * f) <= 10), default=10)
    ticks = np.arange(0, time + step / 1e6, step)
    x = LEFT + ticks * scale
    lines = np.stack([x, np.full_like(x, y), x, np.full_like(x, y + 4)], axis=1)
    drawing.lines.append((PALE, lines))
    for at, tick in zip(x, ticks, strict=True):
        drawing.words.append(Word(float(at), y + 15, 10, f"{tick:.6g}", "middle", PALE))
    if timeline.unit:
        end = LEFT + time * scale
        drawing.words.append(Word(end + 24, y + 15, 10, timeline.unit, "start", PALE))


def _legend(drawing: Drawing, timelines: Sequence[TimelineBase], y: float) -> float:
    kinds: set[int] = set()
    for timeline in timelines:
        shown = timeline.events
        shown = shown[(shown["lane"] == COMPUTE) | (shown["end"] > shown["start"])]
        if row_height(min(timeline.num_ranks, MOST_ROWS)) < 14:
            shown = shown[shown["lane"] == COMPUTE]
        kinds |= set(np.unique(shown["kind"]).tolist())
    x = LEFT
    for kind in [k for k in COLOURS if int(k) in kinds]:
        wide = 26 + 6.2 * len(NAMES[kind])
        if x + wide > drawing.width - 6:
            x, y = LEFT, y + 18
        drawing.box(COLOURS[kind], x, y + 4, 12, 12)
        drawing.words.append(Word(x + 16, y + 14, 11, NAMES[kind]))
        x += wide
    return y + 24


def chunks_of(rows: Events) -> NDArray[np.int64]:
    """For each event of one rank, which of the rank's stages it belongs to, counted from 0."""
    return np.searchsorted(np.unique(rows["stage"]), rows["stage"]).astype(np.int64)


def _pairs(rows: Events) -> NDArray[np.int64]:
    """1 and 2 for the two halves of overlapped operations, 0 for all others."""
    half = np.zeros(rows.size, np.int64)
    same = (rows["start"][1:] == rows["start"][:-1]) & (rows["end"][1:] == rows["end"][:-1])
    same &= rows["end"][1:] > rows["start"][1:]
    for i in np.flatnonzero(same):
        half[i], half[i + 1] = 1, 2
    return half


def shade(colour: str, chunk: int) -> str:
    """The colour of a rank's chunk: paler for later ones."""
    part = min(0.36 * chunk, 0.72) if chunk < 2 else min(0.36 + 0.12 * (chunk - 1), 0.72)
    rgb = np.array(_rgb(colour))
    return _hex(np.round(rgb + (255 - rgb) * part).astype(np.int64))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hex(rgb: NDArray[np.int64]) -> str:
    return "#" + "".join(f"{int(v):02x}" for v in rgb)
