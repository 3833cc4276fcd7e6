"""Timelines as trace-event JSON, which chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from meshring.pipeline.action import OpKind
from meshring.pipeline.timeline_base import COMPUTE, RECV, SEND, Events, TimelineBase

_LANES = {COMPUTE: "compute", SEND: "send", RECV: "receive"}
_ACTIVATIONS = (OpKind.SEND_ACTIVATION, OpKind.RECV_ACTIVATION)


def write_trace(timelines: Sequence[TimelineBase], file: TextIO) -> None:
    """Write the timelines, each as one process whose threads are the ranks' lanes.

    Units: microseconds of the timeline's seconds; a timeline without a unit gets 1 ms for 1.
    """
    file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    first = True
    for number, timeline in enumerate(timelines):
        for record in _records(number, timeline):
            file.write("" if first else ",\n")
            file.write(json.dumps(record, separators=(",", ":")))
            first = False
    file.write("\n]}\n")


def _records(number: int, timeline: TimelineBase) -> Iterator[dict[str, Any]]:
    scale = 1e6 if timeline.unit == "s" else 1e3
    name = timeline.title or "pipeline"
    yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
    lanes = np.unique(timeline.events["lane"]).tolist()
    for rank in range(timeline.num_ranks):
        for lane in lanes:
            where = {"pid": number, "tid": 3 * rank + lane}
            name = f"rank {rank} {_LANES[lane]}"
            yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                **where,
                "args": {"sort_index": 3 * rank + lane},
            }
    flows = _flows(timeline.events)
    for at, event in enumerate(timeline.events):
        rank, kind, stage, microbatch, peer, start, end, lane = event.item()
        op = OpKind(kind)
        where = {"pid": number, "tid": 3 * rank + lane}
        args = {"stage": stage, "rank": rank}
        if op.has_microbatch:
            args["microbatch"] = microbatch
        if peer >= 0:
            args["peer_stage"] = peer
        suffix = str(microbatch) if op.has_microbatch else ""
        begin = (start - timeline.start) * scale
        yield {
            "ph": "X",
            "name": f"{stage}{op.code}{suffix}",
            "cat": op.name.lower(),
            "ts": begin,
            "dur": (end - start) * scale,
            **where,
            "args": args,
        }
        if at in flows:
            yield {
                "ph": "s" if op.is_send else "f",
                **({} if op.is_send else {"bp": "e"}),
                "id": flows[at],
                "name": "transfer",
                "cat": "transfer",
                "ts": begin if op.is_send else (end - timeline.start) * scale,
                **where,
            }


def _flows(events: Events) -> dict[int, int]:
    """Event number to the number of its transfer, for sends and receives that both exist."""
    ends: dict[tuple[bool, int, int, int], list[int]] = {}
    for at in np.flatnonzero(events["lane"] != COMPUTE).tolist():
        event = events[at]
        op, stage, peer = OpKind(int(event["kind"])), int(event["stage"]), int(event["peer"])
        if op.is_communication:
            pair = (stage, peer) if op.is_send else (peer, stage)
            key = (op in _ACTIVATIONS, *pair, int(event["microbatch"]))
            ends.setdefault(key, []).append(at)
    both = [pair for pair in ends.values() if len(pair) == 2]
    return {at: number for number, pair in enumerate(both) for at in pair}
