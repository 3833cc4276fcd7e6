"""What users hold: init(), Communicator and its parts that are not hot."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from meshring import _core, device, nccl
from meshring.backends import require
from meshring.environment import detect
from meshring.errors import DeadlineError, MeshringError, PeerLostError, UsageError

_DEFAULT_TIMEOUT = 300.0


class Communicator(_core.Communicator):
    """A group of ranks and the collectives between them.

    Made by init(), run_local() and split(), never directly. Use it from one thread at a time;
    close it with close() or `with`.
    """

    def __init__(self, source: Any, *, timeout: float | None = None) -> None:
        if isinstance(source, _core.World):
            super().__init__(source, timeout=_DEFAULT_TIMEOUT if timeout is None else timeout)
        elif type(source) is _core.Communicator:  # a part that split() made
            super().__init__(source)
        else:
            raise UsageError(
                "Communicator: call meshring.init() to join a job, or comm.split() for a part"
            )
        self._registered: set[nccl.Registration] = set()
        self._number = next(_numbers)
        self._name = "world" if isinstance(source, _core.World) else "a split"
        self._parts: list[Communicator] = []  # of meshes: closed with this one
        self._adopted = False
        _open.add(self)

    def _adopt(self, part: Communicator) -> None:
        """Close `part` with this communicator, and say nothing of it at exit."""
        self._parts = [p for p in self._parts if not p.closed] + [part]
        part._adopted = True

    def split(
        self, color: int | None, key: int = 0, *, timeout: float | None = None
    ) -> Communicator | None:
        """Make a communicator of the ranks that give the same color, ordered by (key, rank).

        Collective: every rank calls it. color None joins no group and gets None.
        Units: timeout in seconds. Errors: UsageError, MismatchError, DeadlineError, PeerLostError.
        Source: MPI_Comm_split, ncclCommSplit.
        """
        part = self._split(color, key, timeout)
        return None if part is None else type(self)(part)

    def shrink(self, exclude: Sequence[int], *, timeout: float | None = None) -> Communicator:
        """Make a communicator of the ranks that `exclude` does not name, in their order.

        Those ranks call it, all with the same list; it works after a PeerLostError or
        DeadlineError, for example with the ranks that the error names. The old communicator is
        still to be closed. On a GPU NCCL's communicator shrinks where it lives, else it is made
        anew. Units: timeout in seconds.
        Errors: UsageError, DeadlineError and PeerLostError when a survivor does not come.
        Source: MPIX_Comm_shrink, ncclCommShrink.
        """
        return type(self)(self._shrink(exclude, timeout))

    @contextmanager
    def group(self, *, timeout: float | None = None) -> Iterator[None]:
        """Let sends and receives of the `with` block go on together; wait for all at its end.

        Inside, send, recv and sendrecv return at once and arrays are filled at the end of the
        block, so that an exchange between ranks cannot deadlock. Collectives run as always.
        Units: timeout in seconds. Errors: those of the sends and receives, at the end of the block.
        Source: ncclGroupStart, ncclGroupEnd.
        """
        self._begin_group()
        try:
            yield
        except BaseException:
            self._end_group(timeout, True)
            raise
        self._end_group(timeout, False)

    def trace(self, rank: int | None = None) -> list[dict[str, Any]]:
        """Return the last calls (up to 32) of one rank, this one by default, oldest first.

        Shapes: a list of dicts. Units: seconds. Errors: UsageError for a rank that is none.
        Source: the status board, in shared memory; it works while other ranks hang.
        """
        return self._trace(self.rank if rank is None else rank)

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything that this rank started on the communicator is done.

        On a GPU that is what was enqueued, on whichever stream; unlike a stream's own synchronize()
        it has a deadline, and raises what went wrong on the device.
        Units: timeout in seconds. Errors: DeadlineError (the work goes on), and those of the calls
        themselves. Source: cuEventQuery, ncclCommGetAsyncError.
        """
        self._synchronize(timeout)

    def register(
        self, x: Any, *, window: bool = False, timeout: float | None = None
    ) -> nccl.Registration:
        """Register the memory of x, an array on the GPU, with NCCL, which then avoids copies.

        window=True is collective, and needs memory of nccl.allocator() and the same offset on all
        ranks. Shapes: any, contiguous. Units: timeout in seconds. Errors: UsageError, BackendError.
        Source: ncclCommRegister (2.19.1), ncclCommWindowRegister (2.27.3).
        """
        made = nccl.Registration(self, x, window, self._register(x, window, timeout))
        self._registered.add(made)  # NCCL knows the address: x must live even if `made` is dropped
        return made

    @property
    def device(self) -> int | None:
        """The GPU of this rank, or None where NCCL is off; nccl_off then says why."""
        return None if self._device < 0 else self._device

    @property
    def nccl_off(self) -> str | None:
        """Why arrays on a GPU cannot be sent, in a sentence; None where they can."""
        return self._why_off if self._device < 0 else None

    def abort(self) -> None:
        """Give the communicator up: peers that wait for this rank learn it, GPU work is ended.

        Only close() and trace() work afterwards. Errors: none. Source: ncclCommAbort, MPI_Abort.
        """
        if not self.closed:
            self._abort()

    def close(self) -> None:
        """Leave the communicator; safe to call twice. Peers that still wait for this rank learn it.

        Units: none. Errors: none. Source: MPI_Comm_free, ncclCommDestroy.
        """
        for part in self._parts:
            part.close()
        if not self.closed:
            self._close()
        self._registered.clear()
        _open.discard(self)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "poisoned" if self.poisoned else self.transport
        return f"<meshring.Communicator rank {self.rank}/{self.size}, {self.backend}, {state}>"

    def __reduce__(self) -> Any:
        raise UsageError("a Communicator cannot be pickled; every rank makes its own, by init()")


_numbers = itertools.count()  # in the order of making, which is the same on all ranks
_open: weakref.WeakSet[Communicator] = weakref.WeakSet()
_lock = threading.Lock()
_world: Communicator | None = None
_job: tuple[_core.Segment, int] | None = None  # of this process, for its last words


def init(
    backend: str = "auto",
    *,
    timeout: float | None = None,
    check: bool | None = None,
    nccl: nccl.Config | None = None,
) -> Communicator:
    """Join the job that this process was started in, and return the communicator of all ranks.

    Under `meshring run` that is the job of the launcher; a process that no launcher started is a
    job of one rank. A second call returns the same communicator until it is closed.
    backend: "host" for arrays in memory only; "nccl" for arrays on GPUs too; "auto" is "nccl" where
    CuPy and NCCL are installed and every rank has a GPU of its own, else "host" (comm.nccl_off says
    why). With "nccl" the NCCL communicator is made now, with "auto" by the first collective on a
    GPU. check: compare the ranks' calls before each launch on a GPU (default MESHRING_CHECK=1, else
    off; calls on the host are always compared). nccl: settings of NCCL.
    Units: timeout in seconds, for this call and the default for all others (300, or
    MESHRING_TIMEOUT); float("inf") waits for ever.
    Errors: UsageError for bad arguments, a launcher that cannot be used or a backend that a rank
    does not have; DeadlineError and PeerLostError when ranks do not come; BackendError when NCCL
    fails. Source: MPI_Init, ncclCommInitRankConfig.
    """
    global _world, _job
    require(backend)
    seconds = _timeout(timeout)
    config = _nccl_settings(nccl)
    with _lock:
        if _world is not None and not _world.closed:
            return _world
        if _job is not None:
            raise UsageError(
                "init: this process has left its job by close(); a rank joins once, so keep the "
                "communicator open until the end"
            )
        here = detect()
        if here.launcher == "meshring run":
            segment = _attach(here.rank, here.size)
        elif here.size == 1:
            segment = _core.Segment.create(1)
        else:
            raise UsageError(
                f"init: {here.launcher} started this process as rank {here.rank} of {here.size}, "
                "and this version of meshring joins ranks that its own launcher started: "
                f"meshring run -n {here.size} {' '.join(sys.argv) or 'script.py'}"
            )
        try:
            world = _core.World(segment, here.rank, threads=False, timeout=seconds)
        except (DeadlineError, PeerLostError, UsageError) as error:
            raise type(error)(f"init (rank {here.rank}/{here.size}): {error}") from None
        if here.launcher == "meshring run":
            _remember_last_words(segment, here.rank)
            _job = (segment, here.rank)
        comm = Communicator(world, timeout=seconds)
        try:
            device.choose(
                comm,
                backend,
                here.local_rank,
                check=os.environ.get("MESHRING_CHECK") == "1" if check is None else check,
                config=config,
                timeout=seconds,
            )
        except UsageError as error:
            comm.close()
            raise UsageError(f"init (rank {here.rank}/{here.size}): {error}") from None
        except BaseException:
            comm.close()
            raise
        _world = comm
        return _world


def _nccl_settings(given: Any) -> nccl.Config:
    if given is None:
        return nccl.Config()
    if not isinstance(given, nccl.Config):
        raise UsageError(f"init: argument 'nccl' is {given!r}; give a meshring.nccl.Config")
    return given


def _timeout(timeout: float | None) -> float:
    given = timeout if timeout is not None else os.environ.get("MESHRING_TIMEOUT", _DEFAULT_TIMEOUT)
    name = "argument 'timeout'" if timeout is not None else "MESHRING_TIMEOUT"
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not seconds >= 0:
        raise UsageError(f"init: {name} is {given!r}; give seconds >= 0, or inf")
    return seconds


def _attach(rank: int, size: int) -> _core.Segment:
    text = os.environ.get("MESHRING_SEGMENT_FD", "")
    try:
        segment = _core.Segment.attach(int(text))
    except (ValueError, MeshringError):
        raise UsageError(
            f"init: this process has the variables of rank {rank} of `meshring run`, but not its "
            "shared memory; only the process that the launcher started is a rank. In a helper "
            "process, unset MESHRING_RANK before init()"
        ) from None
    if segment.size != size:
        raise UsageError(f"init: MESHRING_SIZE is {size}, and the job has {segment.size} ranks")
    os.set_inheritable(int(text), False)
    return segment


def _remember_last_words(segment: _core.Segment, rank: int) -> None:
    """Write to the board how this process ends: its peers read it there."""
    before = sys.excepthook

    def last_words(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        line = "".join(traceback.format_exception_only(kind, error)).strip().splitlines()[0]
        segment.set_ended(rank, True, line)
        before(kind, error, where)

    sys.excepthook = last_words


def _at_exit() -> None:
    """Say what was left open, and close it."""
    if _forked:
        return
    left = sorted(
        (c for c in _open if not c.closed and c is not _world),
        key=lambda c: c._number,
        reverse=True,
    )
    forgotten = [c for c in left if not c._adopted]
    if forgotten:
        names = ", ".join(repr(c) for c in forgotten)
        print(f"meshring: left open at exit: {names}; use close() or `with`", file=sys.stderr)
    if _world is not None and not _world.closed:
        left.append(_world)
    running = any(c.unfinished for c in left)
    if running:
        print(
            "meshring: operations started with async_op, isend or irecv were still running at "
            "exit; keep their Work and wait() for it",
            file=sys.stderr,
        )
    if _job is not None and not running:  # peers then hear of the exit, not of a close()
        _job[0].set_ended(_job[1], False, "")
    for comm in left:
        with suppress(UsageError):  # a daemon thread is still inside
            comm._close()
    if _job is not None:
        _job[0].set_ended(_job[1], False, "")


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
