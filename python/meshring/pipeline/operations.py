"""The operations of one rank, stored as an array and seen as PipelineOps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind, PipelineOp

OP = np.dtype(
    [
        ("kind", "i1"),
        ("stage", "i4"),
        ("microbatch", "i4"),  # -1 where the kind has none
        ("peer", "i4"),  # communication: the other stage; OVERLAP_F_B: the backward's stage
        (
            "pair",
            "i4",
        ),  # communication: its group; OVERLAP_F_B: the backward's microbatch
    ]
)
Rows = NDArray[Any]


def rows_of(ops: Iterable[PipelineOp | str]) -> Rows:
    """The rows of these operations, or of their texts."""
    rows: list[tuple[int, ...]] = []
    groups = 0
    for op in ops:
        if isinstance(op, str):
            op = PipelineOp.parse(op)
        elif not isinstance(op, PipelineOp):
            raise UsageError(
                f"pipeline schedule: {op!r} is no operation; give a PipelineOp or its text"
            )
        else:
            _ = op.text  # refuses what is incomplete
        if op.kind is OpKind.GROUP:
            rows += [_row(part, groups) for part in op.parts]
            groups += 1
        elif op.kind is OpKind.OVERLAP_F_B:
            forward, backward = op.parts
            head = _row(forward, -1)[:3]
            rows.append((op.kind, *head[1:], *_row(backward, -1)[1:3]))
        else:
            rows.append(_row(op, -1))
    return np.array(rows, OP) if rows else np.empty(0, OP)


def _row(op: PipelineOp, pair: int) -> tuple[int, ...]:
    numbers = (-1 if n is None else n for n in (op.stage, op.microbatch, op.peer))
    return (int(op.kind), *numbers, pair)


def op_of(row: Any) -> PipelineOp:
    """The operation of one row."""
    kind, stage, microbatch, peer, pair = row
    if kind == OpKind.OVERLAP_F_B:
        forward = PipelineOp(OpKind.FORWARD, stage, microbatch)
        return PipelineOp.OverlapForwardBackward(forward, PipelineOp(OpKind.BACKWARD, peer, pair))
    kind = OpKind(kind)
    return PipelineOp(
        kind,
        stage,
        microbatch if kind.has_microbatch else None,
        peer if kind.is_communication else None,
    )


def communicates(kinds: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which of these kinds are sends or receives."""
    found: NDArray[np.bool_] = (kinds >= OpKind.SEND_ACTIVATION) & (kinds <= OpKind.RECV_GRADIENT)
    return found


def first_rows(rows: Rows) -> NDArray[np.int64]:
    """The row at which each operation begins; a group is one operation of several rows."""
    if not rows.size:
        return np.empty(0, np.int64)
    grouped = communicates(rows["kind"]) & (rows["pair"] >= 0)
    follows = grouped[1:] & grouped[:-1] & (rows["pair"][1:] == rows["pair"][:-1])
    return np.flatnonzero(np.concatenate([[True], ~follows]))


class Operations(Sequence[PipelineOp]):
    """The ordered operations of one rank; PipelineOps are made when they are looked at."""

    __slots__ = ("_first", "array")

    def __init__(self, array: Rows) -> None:
        self.array = array
        """One row per operation, dtype meshring.pipeline.OP; a group has a row per part."""
        self._first: NDArray[np.int64] | None = None

    def _firsts(self) -> NDArray[np.int64]:
        if self._first is None:
            self._first = first_rows(self.array)
        return self._first

    def __len__(self) -> int:
        return len(self._firsts())

    @overload
    def __getitem__(self, index: int) -> PipelineOp: ...
    @overload
    def __getitem__(self, index: slice) -> list[PipelineOp]: ...
    def __getitem__(self, index: int | slice) -> PipelineOp | list[PipelineOp]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self._firsts()
        place = range(len(first))[index]
        end = int(first[place + 1]) if place + 1 < len(first) else len(self.array)
        rows = self.array[int(first[place]) : end].tolist()
        if rows[0][4] >= 0 and OpKind(rows[0][0]).is_communication:
            return PipelineOp.Group([op_of(row) for row in rows])
        return op_of(rows[0])

    def __iter__(self) -> Iterator[PipelineOp]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Operations):
            return list(self.texts()) == list(other.texts())
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def text_of(self, row: int) -> str:
        """The text form of the operation, or part of a group, in this row of the array."""
        return str(op_of(self.array[row].tolist()))

    def texts(self) -> Iterator[str]:
        """The text forms in order."""
        return (str(op) for op in self)

    def __repr__(self) -> str:
        shown = " ".join(str(op) for op in self[:8])
        return f"<{len(self)} operations: {shown}{' …' if len(self) > 8 else ''}>"
