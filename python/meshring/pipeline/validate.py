"""Proves that a schedule is complete, in order, matched and free of deadlocks, or says why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind
from meshring.pipeline.deadlock import find_deadlock
from meshring.pipeline.flow import Edges, Ints
from meshring.pipeline.operations import op_of
from meshring.pipeline.program import Program
from meshring.pipeline.semantics import ALL, Semantics, semantics_of
from meshring.pipeline.simulate import peak_activations
from meshring.pipeline.transfers import Message, messages

SHOWN = 8  # problems that a message lists


@dataclass(frozen=True, slots=True)
class Report:
    """What `validate` found.

    problems: sentences, none if all is well. deadlocks: for each semantics that was looked at, the
    cycle of waiting operations, or "" if there is none. peak_activations: per rank.
    """

    problems: tuple[str, ...]
    deadlocks: dict[str, str]
    peak_activations: Ints

    @property
    def ok(self) -> bool:
        """Whether it is complete, in order and matched, and runs under some semantics."""
        return not self.problems and not all(self.deadlocks.values())

    def __str__(self) -> str:
        lines = list(self.problems[:SHOWN])
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} more")
        shown: dict[str, list[str]] = {}
        for name, cycle in self.deadlocks.items():
            shown.setdefault(cycle, []).append(name)
        for cycle, names in shown.items():
            where = ", ".join(n for n in names if n)
            under = f" under {where}" if where else ""
            lines.append(f"deadlock{under}:\n{cycle}" if cycle else f"runs{under}")
        lines.append(f"live activations at most, per rank: {self.peak_activations.tolist()}")
        return "\n".join(lines)


def validate(program: Program, semantics: str | Semantics | None = None) -> Report:
    """Check a program; under its own semantics, under `semantics`, or under all if it has none.

    Errors: UsageError that lists what is wrong: operations that are missing, twice or out of order,
    sends and receives that do not match in order, the cycle of a deadlock.
    """
    given = semantics or program.semantics
    problems = list(_count_problems(program))
    problems += _order_problems(program)
    if program.is_lowered:
        problems += _match_problems(program)
        looked_at = ALL if given is None else (semantics_of(given),)
        deadlocks = {str(how): find_deadlock(program, how) for how in looked_at}
    else:
        deadlocks = {"": find_deadlock(program, None)}
    report = Report(tuple(problems), deadlocks, peak_activations(program))
    if not report.ok:
        raise UsageError(f"PipelineSchedule.validate: {report}")
    return report


def _flat(program: Program) -> tuple[NDArray[np.int64], ...]:
    """Rank, place, kind, stage and microbatch of all operations; overlapped pairs as two."""
    columns: list[list[Ints]] = [[], [], [], [], []]
    for rank, rows in enumerate(program.rows):
        place = np.arange(len(rows))
        paired = rows["kind"] == OpKind.OVERLAP_F_B
        kind = np.where(paired, OpKind.FORWARD, rows["kind"])
        second = (place[paired], np.full(paired.sum(), OpKind.BACKWARD))
        for column, first, more in (
            (1, place, second[0]),
            (2, kind, second[1]),
            (3, rows["stage"], rows["peer"][paired]),
            (4, rows["microbatch"], rows["pair"][paired]),
        ):
            columns[column] += [first, more]
        columns[0].append(np.full(len(rows) + paired.sum(), rank))
    return tuple(np.concatenate(column).astype(np.int64) for column in columns)


def _tables(program: Program) -> dict[int, tuple[Ints, Ints]]:
    """For each kind that belongs to a microbatch: how often, and at which place, per stage."""
    _, place, kind, stage, batch = _flat(program)
    shape = (len(program.placement), program.num_microbatches)
    found = {}
    for what in (
        OpKind.FORWARD,
        OpKind.BACKWARD,
        OpKind.BACKWARD_INPUT,
        OpKind.BACKWARD_WEIGHT,
        OpKind.RECOMPUTE,
    ):
        mine = kind == what
        index = stage[mine] * shape[1] + batch[mine]
        times = np.bincount(index, minlength=shape[0] * shape[1]).reshape(shape)
        places = np.full(shape[0] * shape[1], -1)
        places[index] = place[mine]
        found[int(what)] = (times, places.reshape(shape))
    return found


def _count_problems(program: Program) -> Iterator[str]:
    tables = _tables(program)
    copies = (program.replicas, program.num_stages, program.num_microbatches)
    forward, whole, inputs, weights, again = (tables[k][0] for k in sorted(tables))
    in_copy = forward.reshape(copies)
    for stage, batch in np.argwhere(in_copy.sum(0) != 1).tolist():
        yield f"stage {stage}, microbatch {batch}: {int(in_copy[:, stage, batch].sum())} forwards"
    home = in_copy[:, 0].argmax(0)
    for stage, batch in np.argwhere(in_copy.argmax(0) != home).tolist():
        yield f"stage {stage}, microbatch {batch}: not in the copy of the model of its first stage"
    trained = (whole + inputs + weights).any()
    split_wrong = (whole + inputs != forward) | (whole + weights != forward)
    for stage, batch in np.argwhere(split_wrong).tolist() if trained else ():
        counts = [int(t[stage, batch]) for t in (whole, inputs, weights)]
        yield (
            f"stage {stage}, microbatch {batch}: {counts[0]} B, {counts[1]} I, {counts[2]} W for "
            f"{int(forward[stage, batch])} F; one B, or one I and one W, is needed for each F"
        )
    for stage, batch in np.argwhere(again > forward).tolist():
        yield f"stage {stage}, microbatch {batch}: {int(again[stage, batch])} recomputations"


def _order_problems(program: Program) -> Iterator[str]:
    tables = {OpKind(kind): places for kind, (_, places) in _tables(program).items()}
    back = np.maximum(tables[OpKind.BACKWARD], tables[OpKind.BACKWARD_INPUT])
    for early, late, first, second in (
        ("F", "its backward", tables[OpKind.FORWARD], back),
        ("F", "R", tables[OpKind.FORWARD], tables[OpKind.RECOMPUTE]),
        ("R", "its backward", tables[OpKind.RECOMPUTE], back),
        ("I", "W", tables[OpKind.BACKWARD_INPUT], tables[OpKind.BACKWARD_WEIGHT]),
    ):
        wrong = (first >= 0) & (second >= 0) & (first >= second)
        for stage, batch in np.argwhere(wrong).tolist():
            yield f"stage {stage}, microbatch {batch}: {early} does not stand before {late}"
    ends = np.maximum(tables[OpKind.BACKWARD], tables[OpKind.BACKWARD_WEIGHT]).max(1)
    reduced = np.zeros(len(program.placement), np.int64)
    for rank, rows in enumerate(program.rows):
        for place in np.flatnonzero(rows["kind"] == OpKind.REDUCE_GRAD).tolist():
            stage = int(rows["stage"][place])
            reduced[stage] += 1
            if place < ends[stage]:
                yield f"rank {rank}: {stage}REDUCE_GRAD stands before the stage's last backward"
    for stage in np.flatnonzero(reduced > 1).tolist():
        yield f"stage {stage}: {int(reduced[stage])} REDUCE_GRAD; one is enough"
    yield from _shard_problems(program)


def _shard_problems(program: Program) -> Iterator[str]:
    """A stage that is resharded computes only after it was unsharded."""
    for rank, rows in enumerate(program.rows):
        kinds = rows["kind"]
        if not np.isin(kinds, (OpKind.UNSHARD, OpKind.RESHARD)).any():
            continue
        whole: dict[int, bool] = {}
        for stage in rows["stage"][kinds == OpKind.UNSHARD].tolist():
            whole[stage] = False
        for row in rows.tolist():
            kind, stage = OpKind(row[0]), row[1]
            if kind in (OpKind.UNSHARD, OpKind.RESHARD):
                if whole.get(stage) == (kind is OpKind.UNSHARD):
                    yield f"rank {rank}: {op_of(row)} changes nothing; the stage is so already"
                whole[stage] = kind is OpKind.UNSHARD
                continue
            free = kind.is_communication or kind is OpKind.REDUCE_GRAD
            if not free and whole.get(stage) is False:
                yield f"rank {rank}: {op_of(row)} stands where its stage is sharded"


def _match_problems(program: Program) -> Iterator[str]:
    edges = Edges(program)
    found = messages(program, edges)
    sides: dict[tuple[int, int], tuple[list[Message], list[Message]]] = {}
    counts = np.zeros((2, len(edges.all) + 1, program.num_microbatches), np.int64)
    for mine in found:
        for message in mine:
            sides.setdefault(message.channel, ([], []))[0 if message.send else 1].append(message)
            counts[0 if message.send else 1, message.edge, message.batch] += 1
    yield from _missing_transfers(program, edges, counts)
    for (source, target), (sends, receives) in sorted(sides.items()):
        for number, (send, receive) in enumerate(zip(sends, receives, strict=False)):
            if (send.edge, send.batch) != (receive.edge, receive.batch):
                texts = [_text(program, message) for message in (send, receive)]
                yield (
                    f"rank {source} to rank {target}: message {number} is sent by {texts[0]} and "
                    f"received by {texts[1]}; give both ends the same order"
                )
                break


def _missing_transfers(program: Program, edges: Edges, counts: Ints) -> Iterator[str]:
    ran = _tables(program)
    for edge in edges.all:
        if edges.local[edge.number]:
            continue
        if edge.gradient:
            needed = ran[int(OpKind.BACKWARD)][0] + ran[int(OpKind.BACKWARD_INPUT)][0]
        else:
            needed = ran[int(OpKind.FORWARD)][0]
        for side, name in enumerate(("sends", "receives")):
            wrong = counts[side, edge.number] != needed[edge.source]
            for batch in np.flatnonzero(wrong).tolist():
                what = "gradient" if edge.gradient else "activation"
                yield (
                    f"{what} of microbatch {batch} from stage {edge.source} to stage "
                    f"{edge.target}: {int(counts[side, edge.number, batch])} {name}, "
                    f"{int(needed[edge.source, batch])} needed"
                )


def _text(program: Program, message: Message) -> str:
    return str(op_of(program.rows[message.rank][message.row].tolist()))
