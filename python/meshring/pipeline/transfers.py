"""A lowered program as queues of steps, under each semantics of sends and receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.costs import Costs
from meshring.pipeline.engine import STEP, Steps
from meshring.pipeline.flow import Edges, Floats, compute_steps
from meshring.pipeline.operations import communicates
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import Semantics

SENDS = (OpKind.SEND_ACTIVATION, OpKind.SEND_GRADIENT)
GRADIENTS = (OpKind.SEND_GRADIENT, OpKind.RECV_GRADIENT)
Place = tuple[int, int]  # rank and row


@dataclass(frozen=True, slots=True)
class Message:
    """What a send or receive moves: over which channel, of which edge and microbatch."""

    rank: int
    row: int
    send: bool
    channel: tuple[int, int]
    edge: int
    batch: int
    group: int


@dataclass(slots=True)
class Queues:
    """The queues of a lowered program and what their tokens stand for."""

    steps: list[Steps] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # whose queue it is
    num_tokens: int = 0
    givers: dict[int, Place] = field(default_factory=dict)  # token of a message: who makes it
    sender_of: dict[Place, Place] = field(default_factory=dict)  # of each receive


def messages(program: Program, edges: Edges) -> list[list[Message]]:
    """The sends and receives of each rank. Errors: UsageError for one between no such stages."""
    placement, found = program.placement, []
    for rank, rows in enumerate(program.rows):
        mine = []
        chosen = np.flatnonzero(communicates(rows["kind"]))
        for row, values in zip(chosen.tolist(), rows[chosen].tolist(), strict=True):
            kind, stage, batch, peer, group = values
            send = kind in SENDS
            ends = (stage, peer) if send else (peer, stage)
            edge = edges.find.get((*ends, kind in GRADIENTS))
            if edge is None or placement[stage] == placement[peer]:
                what = "are on one rank" if edge is not None else "do not exchange that"
                raise UsageError(
                    f"pipeline schedule: rank {rank}, operation {row}: "
                    f"{program.ranks[rank].text_of(row)}: stages {stage} and {peer} {what}; remove "
                    "it, or name the pair in 'skips'"
                )
            channel = (placement[ends[0]], placement[ends[1]])
            mine.append(Message(rank, row, send, channel, edge, batch, group))
        found.append(mine)
    return found


class _Builder:
    """Puts the steps of sends and receives in their queues."""

    def __init__(self, program: Program, semantics: Semantics, costs: Costs | None) -> None:
        self.edges = Edges(program)
        self.semantics = semantics
        self.made = Queues(num_tokens=self.edges.num_tokens)
        self.queues: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        self.owner: dict[tuple[Any, ...], int] = {}
        self.messages = messages(program, self.edges)
        self.seen: dict[tuple[tuple[int, int], bool], int] = {}
        self.numbers: dict[tuple[tuple[int, int], int], int] = {}
        self.places: dict[tuple[tuple[int, int], int, bool], Place] = {}
        if costs is None:
            self.times = np.zeros((2, len(self.edges.all) + 1))
        else:
            self.times = np.stack(edge_times(program, self.edges, costs))

    def queue(self, message: Message) -> tuple[Any, ...]:
        if self.semantics.queues == "pair":
            key: tuple[Any, ...] = (message.rank, "pair", *message.channel)
        else:
            key = (message.rank, self.semantics.queues)
        self.owner[key] = message.rank
        return key

    def tokens(self, message: Message) -> tuple[int, int]:
        """The tokens for "the receive is posted" and "the message is there"."""
        side = (message.channel, message.send)
        index = self.seen.get(side, 0)
        self.seen[side] = index + 1
        name = (message.channel, index)
        if name not in self.numbers:
            self.numbers[name] = self.made.num_tokens
            self.made.num_tokens += 2
        posted = self.numbers[name]
        place = (message.rank, message.row)
        self.places[message.channel, index, message.send] = place
        self.made.givers[posted + 1 if message.send else posted] = place
        return posted, posted + 1

    def single(self, message: Message) -> None:
        """A send or receive that is in no group."""
        steps = self.queues.setdefault(self.queue(message), [])
        posted, there = self.tokens(message)
        m, row = self.edges.num_microbatches, message.row
        if not message.send:
            arrived = (message.edge + len(self.edges.all)) * m + message.batch
            if self.semantics.sends == "rendezvous":
                steps.append((-1, posted, 0.0, 0.0, row, False))
            steps.append((there, arrived, 0.0, 0.0, row, True))
            return
        made = message.edge * m + message.batch
        latency, wire = self.times[:, message.edge].tolist()
        if self.semantics.sends == "buffered":
            steps.append((made, there, wire, latency, row, True))
        else:
            steps.append((made, -1, 0.0, 0.0, row, False))
            steps.append((posted, there, latency + wire, 0.0, row, True))

    def group(self, parts: list[Message]) -> None:
        """Sends and receives that start together: each send runs in a queue of its own."""
        home = self.queues.setdefault(self.queue(parts[0]), [])
        m, ends = self.edges.num_microbatches, []
        rendezvous = self.semantics.sends == "rendezvous"
        for message in parts:
            posted, there = self.tokens(message)
            row = message.row
            if not message.send:
                if rendezvous:
                    home.append((-1, posted, 0.0, 0.0, row, False))
                arrived = (message.edge + len(self.edges.all)) * m + message.batch
                ends.append((there, arrived, 0.0, 0.0, row, True))
                continue
            go = self.made.num_tokens
            self.made.num_tokens += 2
            self.made.givers[go + 1] = (message.rank, row)
            self.made.givers[go] = (message.rank, parts[0].row)
            home.append((-1, go, 0.0, 0.0, row, False))
            ends.append((go + 1, -1, 0.0, 0.0, row, False))
            key = (message.rank, "group", row)
            self.owner[key] = message.rank
            latency, wire = self.times[:, message.edge].tolist()
            steps = [(go, -1, 0.0, 0.0, row, False)]
            steps.append((message.edge * m + message.batch, -1, 0.0, 0.0, row, False))
            if rendezvous:
                steps.append((posted, there, latency + wire, 0.0, row, True))
            else:
                steps.append((-1, there, wire, latency, row, True))
            steps.append((-1, go + 1, 0.0, 0.0, row, False))
            self.queues[key] = steps
        home += ends

    def places_of(self, rank: int, steps: list[tuple[Any, ...]]) -> list[int]:
        """Where steps of transfers stand among a rank's rows: those of a group at its first."""
        first = {
            message.row: group[0].row for group in _groups(self.messages[rank]) for message in group
        }
        return [first[step[4]] for step in steps]

    def build(self, program: Program, durations: list[Floats]) -> Queues:
        for mine in self.messages:
            for group in _groups(mine):
                by_queue: dict[tuple[Any, ...], list[Message]] = {}
                for message in group:
                    by_queue.setdefault(self.queue(message), []).append(message)
                for parts in by_queue.values():
                    if len(parts) > 1:
                        self.group(parts)
                    else:
                        self.single(parts[0])
        for rank, rows in enumerate(program.rows):
            chosen = np.flatnonzero(~communicates(rows["kind"]))
            steps = compute_steps(rows, chosen, durations[rank], self.edges, None)
            more = self.queues.pop((rank, "one"), None)
            if more:
                order = np.concatenate([steps["row"], self.places_of(rank, more)])
                steps = np.concatenate([steps, np.array(more, STEP)])
                steps = steps[np.argsort(order, kind="stable")]
            self.made.steps.append(steps)
            self.made.ranks.append(rank)
        for key, rest in self.queues.items():
            self.made.steps.append(np.array(rest, STEP))
            self.made.ranks.append(self.owner[key])
        for (channel, index, send), place in self.places.items():
            sender = self.places.get((channel, index, True))
            if not send and sender is not None:
                self.made.sender_of[place] = sender
        return self.made


def _groups(mine: list[Message]) -> Iterator[list[Message]]:
    """A rank's transfers, those that start together in one list."""
    group: list[Message] = []
    for message in mine:
        last = group[-1] if group else None
        if last and 0 <= message.group == last.group and message.row == last.row + 1:
            group.append(message)
            continue
        if group:
            yield group
        group = [message]
    if group:
        yield group


def lowered_queues(
    program: Program, semantics: Semantics, durations: list[Floats], costs: Costs | None = None
) -> Queues:
    """The queues of a lowered program; its transfers take no time without `costs`."""
    return _Builder(program, semantics, costs).build(program, durations)


def edge_times(program: Program, edges: Edges, costs: Costs) -> tuple[Floats, Floats]:
    """Per edge its latency and the time that its data are on the wire; 0 within a rank.

    Shapes: one more than there are edges; the last entry is for the edge -1 that is none.
    """
    latency, per_byte = costs.wire(program)
    sizes = costs.sizes(program, "message_bytes")
    times = np.zeros((2, len(edges.all) + 1))
    for edge in edges.all:
        link = (program.placement[edge.source], program.placement[edge.target])
        if not edges.local[edge.number]:
            size = sizes[edge.target if edge.gradient else edge.source]
            times[:, edge.number] = latency[link], size * per_byte[link]
    return times[0], times[1]
