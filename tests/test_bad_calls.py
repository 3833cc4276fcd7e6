"""Bad timeouts, forms and signatures, and calls out of place: more of test_bad_input.py."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import meshring as mr
from procs import run_ranks, wait_until
from test_bad_input import (
    LIMIT,
    TAKE_ARRAYS,
    Call,
    bad_on_one_rank,
    raised,
    refused,
    still_works,
    x4,
)

# ---- timeouts, forms of messages, split -----------------------------------------------------

TAKE_TIMEOUT: dict[str, Callable[[mr.Communicator, Any], Any]] = {
    "all_reduce": lambda c, t: c.all_reduce(x4(), timeout=t),
    "broadcast": lambda c, t: c.broadcast(x4(), timeout=t),
    "reduce": lambda c, t: c.reduce(x4(), timeout=t),
    "barrier": lambda c, t: c.barrier(timeout=t),
    "all_gather": lambda c, t: c.all_gather(x4(), sizes="auto", timeout=t),
    "gather": lambda c, t: c.gather(x4(), timeout=t),
    "reduce_scatter": lambda c, t: c.reduce_scatter(x4(), timeout=t),
    "scatter": lambda c, t: c.scatter(x4(), timeout=t),
    "all_to_all": lambda c, t: c.all_to_all(x4(), timeout=t, async_op=True),
    "send": lambda c, t: c.send(x4(), 1, timeout=t),
    "recv": lambda c, t: c.recv(x4(), 1, timeout=t),
    "sendrecv": lambda c, t: c.sendrecv(x4(), 1, 1, timeout=t),
    "split": lambda c, t: c.split(0, timeout=t),
}


@pytest.mark.parametrize("timeout", [-1, float("nan"), "soon", [1]], ids=repr)
@pytest.mark.parametrize("operation", TAKE_TIMEOUT)
def test_bad_timeout(operation: str, timeout: Any) -> None:
    said = ["argument 'timeout'", repr(timeout), "give seconds"]
    bad_on_one_rank(operation, lambda c: TAKE_TIMEOUT[operation](c, timeout), *said)


def test_bad_timeout_of_work() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        work = comm.barrier(async_op=True)
        text = str(raised(mr.UsageError, lambda: work.wait(-1)))
        assert "barrier" in text
        assert f"rank {comm.rank}/2" in text
        assert "argument 'timeout' is -1" in text
        work.wait(LIMIT)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


FORMS: dict[str, tuple[Any, Any, list[str]]] = {
    "no dtype": ((2, 3), None, ["argument 'x'", "dtype='float32'"]),
    "negative": ((2, -3), "f4", ["argument 'x'", "negative"]),
    "float": ((2, 3.0), "f4", ["argument 'x'", "3.0", "integer"]),
    "unknown dtype": ((2,), "float31", ["argument 'dtype'", "float31"]),
    "no dtype at all": ((2,), object(), ["argument 'dtype'", "object"]),
    "dtype that cannot be sent": ((2,), "M8[s]", ["argument 'dtype'", "datetime64[s]"]),
    "other dtype than x": (np.zeros(2, "f4"), "f8", ["argument 'dtype'", "float32"]),
    "dimensions": ((1,) * 70, "f4", ["argument 'x'", "dimensions"]),
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("operation", ["recv", "irecv"])
def test_bad_form_of_what_is_received(operation: str, kind: str) -> None:
    shape, dtype, said = FORMS[kind]
    bad_on_one_rank(operation, lambda c: getattr(c, operation)(shape, 1, dtype), *said)


@pytest.mark.parametrize("color", [-1, 0.5, "a", 1 << 70], ids=repr)
def test_bad_color(color: Any) -> None:
    bad_on_one_rank("split", lambda c: c.split(color), f"argument 'color' is {color!r}")


@pytest.mark.parametrize("key", [0.5, "a", None, 1 << 70], ids=repr)
def test_bad_key(key: Any) -> None:
    bad_on_one_rank("split", lambda c: c.split(0, key), f"argument 'key' is {key!r}")


@pytest.mark.parametrize("rank", [2, -1, "a", 0.0], ids=repr)
def test_bad_rank_of_trace(rank: Any) -> None:
    said = ["argument 'rank'", repr(rank)]
    bad_on_one_rank("trace", lambda c: c.trace(rank), *said)


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None], ids=repr)
def test_bad_size_of_run_local(size: Any) -> None:
    text = str(raised(mr.UsageError, lambda: mr.run_local(lambda comm: None, size)))
    assert text.startswith(f"run_local: argument 'size' is {size!r}")


# ---- signatures -----------------------------------------------------------------------------

POSITIONAL = {
    "all_reduce": 3, "broadcast": 3, "reduce": 4, "barrier": 0, "all_gather": 4, "gather": 5,
    "reduce_scatter": 5, "scatter": 5, "all_to_all": 4, "send": 2, "recv": 3, "sendrecv": 4,
    "isend": 2, "irecv": 3, "split": 2, "trace": 1, "close": 0, "group": 0,
}  # fmt: skip


@pytest.mark.parametrize("operation", POSITIONAL)
def test_wrong_signature(operation: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        method = getattr(comm, operation)
        most = POSITIONAL[operation]
        error = raised(TypeError, lambda: method(*[x4()] * (most + 1)))
        assert f"{operation}() takes" in str(error)
        error = raised(TypeError, lambda: method(*[x4()] * most, dim=1))
        assert f"{operation}() got an unexpected keyword argument 'dim'" in str(error)
        if most and operation != "trace":
            assert f"{operation}() missing" in str(raised(TypeError, method))
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_argument_given_twice() -> None:
    def rank_main(comm: mr.Communicator) -> None:
        error = raised(TypeError, lambda: comm.all_reduce(x4(), "sum", op="max"))
        assert "all_reduce() got multiple values for argument 'op'" in str(error)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


# ---- calls out of place ---------------------------------------------------------------------

GOOD: dict[str, Call] = {
    **{name: lambda c, f=f: f(c, x4()) for name, f in TAKE_ARRAYS.items()},
    "scatter": lambda c: c.scatter(x4()),
    "barrier": lambda c: c.barrier(),
    "split": lambda c: c.split(0),
    "group": lambda c: c.group().__enter__(),
}


@pytest.mark.parametrize("operation", GOOD)
def test_closed(operation: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        part = comm.split(0)
        part.close()
        part.close()
        refused(part, operation, GOOD[operation], "closed", "make a new one")
        assert part.closed
        assert "closed" in repr(part)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_two_threads_in_one_communicator() -> None:
    go = threading.Event()

    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 1:
            assert go.wait(LIMIT)
            comm.barrier()
        else:
            thread = threading.Thread(target=comm.barrier)
            thread.start()
            try:
                wait_until(lambda: [r["state"] for r in comm.trace()] == ["running"])
                for operation, call in GOOD.items():
                    if operation != "group":
                        refused(comm, operation, call, "another thread is inside", "split()")
            finally:
                go.set()
                thread.join()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def test_close_while_another_thread_is_inside() -> None:
    script = """
import threading, numpy as np, meshring as mr
go = threading.Event()
def rank_main(comm):
    if comm.rank == 1:
        return go.wait(20) and comm.barrier()
    thread = threading.Thread(target=comm.barrier)
    thread.start()
    while [r["state"] for r in comm.trace()] != ["running"]:
        pass
    try:
        comm.close()
    except mr.UsageError as error:
        print(error)
    go.set()
    thread.join()
mr.run_local(rank_main, 2, timeout=20)
"""
    result = run_ranks(script, 1, timeout=60)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "close (rank 0/2): another thread is inside" in result.stdout


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_no_copies(way: Callable[[Any], Any]) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        assert "cannot be pickled" in str(raised(mr.UsageError, lambda: way(comm)))
        work = comm.barrier(async_op=True)
        raised(TypeError, lambda: way(work))
        work.wait()
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


@pytest.mark.parametrize("source", [None, 3, "world"])
def test_not_made_directly(source: Any) -> None:
    assert "meshring.init()" in str(raised(mr.UsageError, lambda: mr.Communicator(source)))


# ---- a refusal in the middle of a call of several parts --------------------------------------


@pytest.mark.parametrize("operation", ["all_gather", "gather", "all_to_all", "scatter"])
def test_bad_out_after_lengths_were_exchanged(operation: str) -> None:
    """After it a good call of all ranks works, whether the others heard of the refusal or not."""

    def rank_main(comm: mr.Communicator) -> None:
        named: dict[str, Any] = {"sizes": "auto"}
        x = x4() if operation != "scatter" or comm.rank == 1 else None
        if operation in ("gather", "scatter"):
            named["root"] = 1 if operation == "scatter" else 0
        call = getattr(comm, operation)
        if comm.rank == 0:
            bad = np.zeros(17, "f4")
            refused(comm, operation, lambda c: call(x, **named, out=bad), "argument 'out'", "17")
            call(x, **named)
        else:
            try:
                call(x, **named)
            except mr.UsageError as error:
                assert "rank 0" in str(error)
                call(x, **named)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)
