"""Ranks as threads of this process: for notebooks, tests and debuggers."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from meshring import _core
from meshring.communicator import Communicator, _timeout
from meshring.errors import DeadlineError, PeerLostError, StageError, UsageError

T = TypeVar("T")


def run_local(
    fn: Callable[[Communicator], T], size: int, *, timeout: float | None = None
) -> list[T]:
    """Call fn(comm) once per rank, each in a thread of its own, and return the results by rank.

    Shapes: whatever fn returns. Units: timeout in seconds, as in init().
    Errors: the first rank's exception that is not a consequence of another's is raised, with the
    others in its notes; UsageError for a bad size. Source: none, the host backend between threads.
    """
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"run_local: argument 'size' is {size!r}; give a number of ranks >= 1")
    seconds = _timeout(timeout)
    segment = _core.Segment.create(size)
    results: list[T | None] = [None] * size
    failures: dict[int, BaseException] = {}

    def rank_main(rank: int) -> None:
        raised, text = False, ""
        try:
            world = _core.World(segment, rank, threads=True, timeout=seconds)
            with Communicator(world, timeout=seconds) as comm:
                try:
                    results[rank] = fn(comm)
                except BaseException as error:
                    raised = True
                    text = traceback.format_exception_only(type(error), error)[-1].strip()
                    segment.set_ended(rank, True, text.splitlines()[0])
                    raise
        except BaseException as error:
            failures[rank] = error
        finally:
            if not raised:
                segment.set_ended(rank, False, "")

    threads = [
        threading.Thread(target=rank_main, args=(r,), name=f"meshring rank {r}", daemon=True)
        for r in range(size)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: tell the ranks, which then end by themselves
        for rank in range(size):
            segment.set_ended(rank, True, repr(error))
        for thread in threads:
            thread.join(2)
        raise
    segment.close()  # now, even where a traceback keeps this frame alive
    if failures:
        raise _first_cause(failures)
    return results  # type: ignore[return-value]


def _first_cause(failures: dict[int, BaseException]) -> BaseException:
    ranks = sorted(failures, key=lambda r: (_is_consequence(failures[r]), r))
    error = failures[ranks[0]]
    notes = [f"meshring.run_local: this was raised on rank {ranks[0]}"]
    notes += [f"rank {r}: {type(failures[r]).__name__}: {failures[r]}" for r in ranks[1:]]
    if hasattr(error, "add_note"):
        error.add_note("\n".join(notes))
    return error


def _is_consequence(error: BaseException) -> bool:
    """Whether it tells of another rank's trouble; a StageError has a cause where it happened."""
    if isinstance(error, StageError):
        return error.__cause__ is None
    return isinstance(error, (PeerLostError, DeadlineError))
