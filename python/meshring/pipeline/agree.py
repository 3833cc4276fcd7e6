"""How the ranks of a pipeline learn that one of them failed, and stop together."""

from __future__ import annotations

import traceback
import zlib
from typing import NoReturn

import numpy as np

from meshring.communicator import Communicator
from meshring.errors import (
    DeadlineError,
    MeshringError,
    MismatchError,
    PeerLostError,
    StageError,
    UsageError,
)
from meshring.pipeline.action import PipelineOp
from meshring.pipeline.program import Program

_FINE, _CONSEQUENCE, _CAUSE = 0, 1, 2


def agree_on_arguments(where: str, comm: Communicator, failure: Exception | None) -> None:
    """Raise on all ranks when one of them was given something wrong. Collective."""
    texts = _exchange(comm, failure, "" if failure is None else str(failure), None)
    if failure is not None:
        raise failure
    for rank, text in texts.items():
        error = UsageError(f"{where} (rank {comm.rank}/{comm.size}): rank {rank} refused: {text}")
        error.ranks = (rank,)
        raise error


def agree_on_end(
    comm: Communicator, failure: Exception | None, action: str, timeout: float | None
) -> None:
    """Raise on all ranks when an operation of one of them failed. Collective."""
    text = "" if failure is None else _story(failure, action)
    try:
        texts = _exchange(comm, failure, text, timeout)
    except MeshringError as error:
        if failure is None or isinstance(failure, (PeerLostError, DeadlineError)):
            raise error from failure
        _raise(comm, comm.rank, text, action, failure)
    if not texts:
        return
    if failure is not None and comm.rank not in texts:
        rank = next(iter(texts))
        _raise(comm, rank, texts[rank], "", failure)
    if failure is not None:
        if isinstance(failure, (PeerLostError, DeadlineError)):
            raise failure
        _raise(comm, comm.rank, text, action, failure)
    rank = next(iter(texts))
    _raise(comm, rank, texts[rank], "", None)


def _raise(
    comm: Communicator, rank: int, text: str, action: str, failure: Exception | None
) -> NoReturn:
    head, _, trace = text.partition("\n")
    who = "" if rank == comm.rank else f"rank {rank}: "
    message = (
        f"Pipeline.run (rank {comm.rank}/{comm.size}): {who}{head}\n"
        f"{_in_words(head.partition(' ')[0])}All ranks stop; this pipeline is closed, the "
        "communicator it was made from is not."
    )
    if rank != comm.rank:
        message += f"\nTraceback of rank {rank}:\n{trace}"
    error = StageError(message)
    error.ranks = (rank,)
    error.action = action or head.partition(" ")[0]
    raise error from (failure if rank == comm.rank else None)


def _in_words(action: str) -> str:
    """What an operation's text means."""
    try:
        op = PipelineOp.parse(action)
    except UsageError:
        return ""  # "the", of the end of the schedule
    if op.parts:
        return "".join(_in_words(part.text) for part in op.parts)
    of = f" of microbatch {op.microbatch}" if op.kind.has_microbatch else ""
    return f"{action} is: {op.kind.name.lower().replace('_', ' ')}{of} on stage {op.stage}. "


def _story(failure: Exception, action: str) -> str:
    """One line that says what failed, then its traceback."""
    first = "".join(traceback.format_exception_only(type(failure), failure)).strip()
    lines = traceback.format_exception(type(failure), failure, failure.__traceback__)
    return f"{action} failed with {' '.join(first.split())}\n{''.join(lines)}"


def _exchange(
    comm: Communicator, failure: Exception | None, text: str, timeout: float | None
) -> dict[int, str]:
    """The texts of the ranks that failed by themselves; of all that failed where none did."""
    late = isinstance(failure, (PeerLostError, DeadlineError))
    kind = _FINE if failure is None else _CONSEQUENCE if late else _CAUSE
    data = np.frombuffer(text.encode(), np.uint8)
    mine = np.array([[kind, data.size]], np.int64)
    all_ = comm.all_gather(mine, timeout=timeout)
    if not all_.any():
        return {}
    joined = comm.all_gather(data.copy(), sizes=all_[:, 1].tolist(), timeout=timeout).tobytes()
    ends = np.cumsum(all_[:, 1]).tolist()
    worst = int(all_[:, 0].max())
    return {
        rank: joined[end - int(all_[rank, 1]) : end].decode()
        for rank, end in enumerate(ends)
        if all_[rank, 0] == worst
    }


def same_everywhere(schedule: Program, options: tuple[object, ...], comm: Communicator) -> None:
    """Raise MismatchError on all ranks where schedules or options differ. Collective."""
    head = (schedule.placement, schedule.skips, schedule.num_stages, options)
    mine = zlib.crc32(repr(head).encode())
    for rows in schedule.rows:
        mine = zlib.crc32(rows.tobytes(), mine)
    found = comm.all_gather(np.array([mine], np.int64))
    other = np.flatnonzero(found != found[0]).tolist()
    if other:
        error = MismatchError(
            f"Pipeline (rank {comm.rank}/{comm.size}): the ranks have different schedules or "
            f"options: {'rank' if len(other) == 1 else 'ranks'} {', '.join(map(str, other))} "
            "others than rank 0; give the same arguments on every rank"
        )
        error.ranks = tuple(other)
        raise error
