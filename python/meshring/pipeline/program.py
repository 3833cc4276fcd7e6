"""The container of a schedule: stages, ranks, placement, and each rank's ordered operations."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from meshring.errors import UsageError
from meshring.pipeline.action import OpKind, PipelineOp
from meshring.pipeline.operations import Operations, Rows, communicates, rows_of

FORMAT = "meshring.pipeline/1"
P = TypeVar("P", bound="Program")


class Program:
    """Which rank holds which stage, and what each rank does in which order.

    Stages are numbered along the model. With `replicas` = 2 (DualPipe) stage num_stages + i is a
    second copy of stage i, and each microbatch goes through one copy of the model. `skips` are
    pairs (source, target): source's result also goes to that later stage, its gradient back.
    """

    def __init__(
        self,
        num_stages: int,
        num_microbatches: int,
        placement: Sequence[int],
        rows: Sequence[Rows],
        *,
        replicas: int = 1,
        skips: Iterable[tuple[int, int]] = (),
        schedule_type: str = "custom",
        semantics: str | None = None,
    ) -> None:
        self.num_stages = positive("num_stages", num_stages)
        self.num_microbatches = positive("num_microbatches", num_microbatches)
        self.replicas = positive("replicas", replicas)
        self.num_ranks = positive("num_ranks", len(rows))
        self.placement = tuple(int(rank) for rank in placement)
        self.schedule_type = schedule_type
        self.semantics = semantics
        """What the sends and receives were made for; None before `lower`."""
        self.skips = _checked_skips(skips, self.num_stages)
        self.rows = tuple(rows)
        self._check()

    def _check(self) -> None:
        needed = self.num_stages * self.replicas
        if len(self.placement) != needed or not all(
            0 <= rank < self.num_ranks for rank in self.placement
        ):
            raise UsageError(
                f"pipeline schedule: argument 'placement' is {list(self.placement)}; give the "
                f"rank, 0 to {self.num_ranks - 1}, of each of {needed} stages"
            )
        for rank, rows in enumerate(self.rows):
            if not rows.size:
                continue
            paired = rows["kind"] == OpKind.OVERLAP_F_B
            stages = np.concatenate([rows["stage"], rows["peer"][paired]])
            batches = np.concatenate([rows["microbatch"], rows["pair"][paired]])
            for name, numbers, limit in (
                ("stage", stages, needed),
                ("stage", rows["peer"][communicates(rows["kind"])], needed),
                ("microbatch", batches, self.num_microbatches),
            ):
                if numbers.size and numbers.max() >= limit:
                    raise UsageError(
                        f"pipeline schedule: rank {rank} has an operation of {name} "
                        f"{numbers.max()}; there are {limit}, 0 to {limit - 1}"
                    )
            ranks = np.asarray(self.placement)[stages]
            if (ranks != rank).any():
                stage = stages[ranks != rank][0]
                raise UsageError(
                    f"pipeline schedule: rank {rank} has an operation of stage {stage}, which "
                    f"'placement' gives to rank {self.placement[stage]}; move one of them"
                )

    # ------------------------------------------------------------ looking at it

    @property
    def ranks(self) -> tuple[Operations, ...]:
        """The ordered operations of each rank."""
        return tuple(Operations(rows) for rows in self.rows)

    @property
    def num_operations(self) -> int:
        """How many rows there are over all ranks."""
        return sum(len(rows) for rows in self.rows)

    @property
    def is_lowered(self) -> bool:
        """Whether sends and receives are part of it."""
        return any(communicates(rows["kind"]).any() for rows in self.rows)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds."""
        return [stage for stage, owner in enumerate(self.placement) if owner == rank]

    def get_stage_schedule(self, stage_id: int) -> list[PipelineOp]:
        """The operations of one stage in order; of what is compound, its parts of this stage.

        Errors: UsageError where there is no such stage.
        """
        if not _is_int(stage_id) or not 0 <= stage_id < len(self.placement):
            raise UsageError(
                f"PipelineSchedule.get_stage_schedule: argument 'stage_id' is {stage_id!r}; "
                f"give one of the stages 0 to {len(self.placement) - 1}"
            )
        found: list[PipelineOp] = []
        for op in Operations(self.rows[self.placement[stage_id]]):
            found += [part for part in op.parts or (op,) if part.stage == stage_id]
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return self._head() == other._head() and self.ranks == other.ranks

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lowered = f", lowered for {self.semantics}" if self.semantics else ""
        return (
            f"<{type(self).__name__} {self.schedule_type}: {self.num_stages} stages on "
            f"{self.num_ranks} ranks, {self.num_microbatches} microbatches, "
            f"{self.num_operations} operations{lowered}>"
        )

    # ------------------------------------------------------------ making another

    def replaced(self: P, rows: Sequence[Rows], **changes: Any) -> P:
        """The same schedule with these operations instead."""
        head: dict[str, Any] = {
            "replicas": self.replicas,
            "skips": self.skips,
            "schedule_type": self.schedule_type,
            "semantics": self.semantics,
            **changes,
        }
        return self._new(self.num_stages, self.num_microbatches, self.placement, rows, **head)

    @classmethod
    def _new(cls: type[P], *args: Any, **kwargs: Any) -> P:
        made = cls.__new__(cls)
        Program.__init__(made, *args, **kwargs)
        return made

    @classmethod
    def from_ops(
        cls: type[P],
        ranks: Sequence[Iterable[PipelineOp | str]],
        *,
        num_stages: int | None = None,
        num_microbatches: int | None = None,
        placement: Sequence[int] | None = None,
        skips: Iterable[tuple[int, int]] = (),
        replicas: int = 1,
    ) -> P:
        """A schedule written by hand: per rank its operations, as PipelineOps or texts.

        What is not given follows from the operations. Errors: UsageError for operations that are
        none, and for a stage on two ranks.
        """
        rows = [rows_of(ops) for ops in ranks]
        found = _placement_of(rows) if placement is None else tuple(placement)
        batches = 1 + max((int(r["microbatch"].max()) for r in rows if r.size), default=-1)
        return cls._new(
            len(found) // positive("replicas", replicas) if num_stages is None else num_stages,
            batches if num_microbatches is None else num_microbatches,
            found,
            rows,
            skips=skips,
            replicas=replicas,
        )

    # ------------------------------------------------------------ JSON and CSV

    def _head(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schedule_type": self.schedule_type,
            "semantics": self.semantics,
            "num_stages": self.num_stages,
            "num_ranks": self.num_ranks,
            "num_microbatches": self.num_microbatches,
            "replicas": self.replicas,
            "placement": list(self.placement),
            "skips": [list(pair) for pair in self.skips],
        }

    def to_json(self) -> str:
        """The schedule as JSON; `from_json` is its inverse.

        Each rank is a list of {"op", "stage", "microbatch", "peer"}; "op" is the kind's code
        (F, B, I, W, SEND_F, …), "peer" the other stage of a transfer. OVERLAP_F_B and GROUP have
        "parts" instead.
        """
        lines = [json.dumps(self._head())[:-1] + ', "ranks": [']
        for rank, ops in enumerate(self.ranks):
            text = ",\n ".join(json.dumps(_to_dict(op)) for op in ops)
            lines.append(f"[{text}]{',' if rank + 1 < self.num_ranks else ''}")
        return "\n".join([*lines, "]}"])

    @classmethod
    def from_json(cls: type[P], source: str | PathLike[str]) -> P:
        """The schedule of a JSON text or file (a pathlib.Path). Errors: UsageError."""
        try:
            data = json.loads(_text_of(source))
            if data["format"] != FORMAT:
                raise UsageError(
                    f"PipelineSchedule.from_json: format is {data['format']!r}; give {FORMAT!r}"
                )
            rows = [rows_of(_from_dict(op) for op in ops) for ops in data["ranks"]]
            return cls._new(
                data["num_stages"],
                data["num_microbatches"],
                data["placement"],
                rows,
                replicas=data.get("replicas", 1),
                skips=[tuple(pair) for pair in data.get("skips", ())],
                schedule_type=data.get("schedule_type", "custom"),
                semantics=data.get("semantics"),
            )
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"PipelineSchedule.from_json: argument 'source' is no schedule "
                f"({type(error).__name__}: {error}); give what to_json() writes"
            ) from error

    def to_csv(self) -> str:
        """One line per rank, one operation a cell; what torch writes and reads too.

        Source: torch.distributed.pipelining, `_dump_csv`.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for ops in self.ranks:
            writer.writerow(list(ops.texts()))
        return out.getvalue()

    @classmethod
    def from_csv(
        cls: type[P],
        source: str | PathLike[str],
        *,
        num_stages: int | None = None,
        num_microbatches: int | None = None,
        placement: Sequence[int] | None = None,
        skips: Iterable[tuple[int, int]] = (),
        replicas: int = 1,
    ) -> P:
        """The schedule of a CSV text or file (a pathlib.Path): line per rank, cell per operation.

        Empty cells are idle steps and are dropped. What is not given follows from the operations.
        Errors: UsageError that names line and cell. Source: torch.distributed.pipelining.
        """
        ranks: list[list[PipelineOp]] = []
        for number, cells in enumerate(csv.reader(io.StringIO(_text_of(source)))):
            ops = []
            for column, cell in enumerate(cells):
                try:
                    if cell.strip():
                        ops.append(PipelineOp.parse(cell.strip()))
                except UsageError as error:
                    raise UsageError(
                        f"PipelineSchedule.from_csv: line {number + 1}, cell {column + 1}: "
                        f"{error}; a file is given as pathlib.Path"
                    ) from error
            ranks.append(ops)
        return cls.from_ops(
            ranks,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            placement=placement,
            skips=skips,
            replicas=replicas,
        )


def positive(name: str, value: Any, least: int = 1) -> int:
    """That number as an int, or the sentence that refuses it."""
    if not _is_int(value) or value < least:
        raise UsageError(
            f"pipeline schedule: argument {name!r} is {value!r}; give a whole number >= {least}"
        )
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_skips(skips: Iterable[Any], num_stages: int) -> tuple[tuple[int, int], ...]:
    found = []
    if not isinstance(skips, Iterable):
        raise UsageError(
            f"pipeline schedule: argument 'skips' is {skips!r}; give pairs (source, target)"
        )
    for pair in skips:
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or not all(map(_is_int, pair))
            or not 0 <= pair[0] < pair[1] - 1 < num_stages - 1
        ):
            raise UsageError(
                f"pipeline schedule: argument 'skips' has {pair!r}; give pairs (source, target) of "
                f"stages with target >= source + 2 and target <= {num_stages - 1}"
            )
        found.append((int(pair[0]), int(pair[1])))
    return tuple(sorted(set(found)))


def _placement_of(rows: Sequence[Rows]) -> tuple[int, ...]:
    owner: dict[int, int] = {}
    for rank, ops in enumerate(rows):
        paired = ops["kind"] == OpKind.OVERLAP_F_B
        for stage in np.unique(np.concatenate([ops["stage"], ops["peer"][paired]])).tolist():
            if owner.setdefault(stage, rank) != rank:
                raise UsageError(
                    f"pipeline schedule: stage {stage} has operations on rank {owner[stage]} and "
                    f"on rank {rank}; a stage lives on one rank"
                )
    missing = set(range(len(owner))) - set(owner)
    if missing or not owner:
        raise UsageError(
            f"pipeline schedule: there is no operation of stage {min(missing, default=0)}; number "
            "the stages from 0 without gaps, or give 'placement'"
        )
    return tuple(owner[stage] for stage in range(len(owner)))


def _text_of(source: str | PathLike[str]) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, PathLike):
        return Path(source).read_text(encoding="utf-8")
    raise UsageError(
        f"pipeline schedule: argument 'source' is {source!r}; give a text or a pathlib.Path"
    )


def _to_dict(op: PipelineOp) -> dict[str, Any]:
    if op.parts:
        return {"op": op.kind.code, "parts": [_to_dict(part) for part in op.parts]}
    found = {"op": op.kind.code, "stage": op.stage, "microbatch": op.microbatch, "peer": op.peer}
    return {key: value for key, value in found.items() if value is not None}


def _from_dict(data: dict[str, Any]) -> PipelineOp:
    codes = {kind.code: kind for kind in OpKind}
    unknown = set(data) - {"op", "stage", "microbatch", "peer", "parts"}
    if unknown:
        raise UsageError(f"PipelineSchedule.from_json: an operation has {sorted(unknown)}: {data}")
    kind = codes[data["op"]]
    parts = tuple(_from_dict(part) for part in data.get("parts", ()))
    return PipelineOp(kind, data.get("stage"), data.get("microbatch"), data.get("peer"), parts)
