"""Every kind of bad argument to every public method: the sentence, and that nothing happened.

In each test rank 0 makes the bad call and then, with the other rank, a good one: that one fails if
the bad call sent anything, took a number or left the communicator unusable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import meshring as mr
import oracle

LIMIT = 20.0
Call = Callable[[mr.Communicator], Any]


def raised(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The error that the call raises, without the traceback that would keep all its frames."""
    try:
        result = call()
    except kind as error:
        return error.with_traceback(None)
    raise AssertionError(f"{kind.__name__} expected, and {result!r} came")


def refused(comm: mr.Communicator, operation: str, call: Call, *fragments: str) -> None:
    """The call raises a UsageError of the right form that holds all fragments."""
    text = str(raised(mr.UsageError, lambda: call(comm)))
    assert text.startswith(f"{operation} (rank {comm.rank}/{comm.size}): "), text
    assert text.count(f"(rank {comm.rank}/{comm.size})") == 1, text
    for fragment in fragments:
        assert fragment in text, f"no {fragment!r} in {text!r}"


def still_works(comm: mr.Communicator) -> None:
    """A good call right after, with all ranks."""
    n = comm.size
    x = np.full(3, comm.rank + 1.0)
    assert comm.all_reduce(x).tolist() == [n * (n + 1) / 2] * 3
    big = comm.all_gather(np.full(50_000, comm.rank, "i4"))
    assert big[::50_000].tolist() == list(range(n))


def bad_on_one_rank(operation: str, call: Call, *fragments: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 0:
            refused(comm, operation, call, *fragments)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


def x4() -> np.ndarray:
    return np.arange(4, dtype="f4")


# ---- what is not an array that can be sent --------------------------------------------------


class OnDevice:
    __cuda_array_interface__ = property(lambda self: {"shape": (4,), "typestr": "<f4"})


def masked() -> Any:
    return np.ma.masked_array(x4(), [0, 1, 0, 0])


NOT_ARRAYS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "None": (lambda: None, ["is None", "numpy.asarray"]),
    "list": (lambda: [1.0, 2.0], ["a list", "numpy.asarray"]),
    "tuple": (lambda: (1.0, 2.0), ["a tuple", "numpy.asarray"]),
    "str": (lambda: "abcd", ["a str", "numpy.asarray"]),
    "float": (lambda: 1.5, ["a float", "numpy.asarray"]),
    "NumPy scalar": (lambda: np.float32(1), ["a float32", "numpy.asarray"]),
    "dict": (dict, ["a dict", "buffer protocol"]),
    "object": (lambda: np.array([None, 1]), ["dtype object", ".astype()"]),
    "datetime": (lambda: np.zeros(2, "M8[s]"), ["datetime64[s]", ".astype()"]),
    "text": (lambda: np.array(["ab"]), ["<U2", ".astype()"]),
    "big-endian": (lambda: np.zeros(2, ">f4"), [">f4", "byte order"]),
    "structured": (lambda: np.zeros(2, [("a", "f4")]), ["('a', '<f4')", ".astype()"]),
    "longdouble": (lambda: np.zeros(2, np.longdouble), ["float128", ".astype()"]),
    "masked": (masked, ["masked array", ".filled("]),
    "device": (OnDevice, ["is on a GPU", "OnDevice", "CuPy is not imported"]),
}
TAKE_ARRAYS: dict[str, Callable[[mr.Communicator, Any], Any]] = {
    "all_reduce": lambda c, x: c.all_reduce(x),
    "broadcast": lambda c, x: c.broadcast(x, root=1),
    "reduce": lambda c, x: c.reduce(x, root=1),
    "all_gather": lambda c, x: c.all_gather(x),
    "gather": lambda c, x: c.gather(x, root=1),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x),
    "all_to_all": lambda c, x: c.all_to_all(x),
    "send": lambda c, x: c.send(x, 1),
    "isend": lambda c, x: c.isend(x, 1),
    "sendrecv": lambda c, x: c.sendrecv(x, 1, 1),
    "recv": lambda c, x: c.recv(x, 1),
    "irecv": lambda c, x: c.irecv(x, 1),
}


@pytest.mark.parametrize("kind", NOT_ARRAYS)
@pytest.mark.parametrize("operation", TAKE_ARRAYS)
def test_what_is_not_an_array(operation: str, kind: str) -> None:
    make, fragments = NOT_ARRAYS[kind]
    if operation in ("recv", "irecv") and kind in ("list", "tuple"):
        make, fragments = lambda: [2, 3], ["dtype"]  # a shape, which needs one
    call = TAKE_ARRAYS[operation]
    bad_on_one_rank(operation, lambda c: call(c, make()), "argument 'x'", *fragments)


@pytest.mark.parametrize("kind", NOT_ARRAYS)
def test_scatter_tells_every_rank_of_its_root(kind: str) -> None:
    """Only the root reads x: all others hear that it refused it."""
    make, fragments = NOT_ARRAYS[kind]

    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 1:
            refused(comm, "scatter", lambda c: c.scatter(make(), 1), "argument 'x'", *fragments)
        else:
            refused(
                comm, "scatter", lambda c: c.scatter(None, 1), "rank 1 refused", "nothing was sent"
            )
        still_works(comm)

    mr.run_local(rank_main, 3, timeout=LIMIT)


# ---- outputs --------------------------------------------------------------------------------


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


def strided(a: np.ndarray) -> np.ndarray:
    return np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2]


BAD_OUTPUTS: dict[str, tuple[Callable[[np.ndarray], Any], list[str]]] = {
    "read-only": (read_only, ["read-only", ".copy()"]),
    "bytes": (lambda a: bytes(a.nbytes), ["read-only", ".copy()"]),
    "strided": (strided, ["not C-contiguous", "numpy.ascontiguousarray"]),
    "list": (lambda a: a.tolist(), ["a list", "numpy.asarray"]),
    "str": (lambda a: "x", ["a str", "numpy.asarray"]),
}
BAD_FORMS: dict[str, tuple[Callable[[np.ndarray], Any], list[str]]] = {
    "longer": (lambda a: np.zeros(a.size + 1, a.dtype), ["({0},)", "is needed"]),
    "2-d": (lambda a: np.zeros((1, *a.shape), a.dtype), ["(1, {1},)", "is needed"]),
    "dtype": (lambda a: np.zeros(a.shape, "f8"), ["float64", "float32", "is needed"]),
    "masked": (lambda a: np.ma.zeros(a.shape, a.dtype), ["masked array"]),
}
# The call with out=, and what it fills for an x of 4 float32 on 2 ranks.
TAKE_OUT: dict[str, tuple[Callable[[mr.Communicator, Any, Any], Any], int]] = {
    "all_reduce": (lambda c, x, out: c.all_reduce(x, out=out), 4),
    "broadcast": (lambda c, x, out: c.broadcast(x, out=out), 4),
    "reduce": (lambda c, x, out: c.reduce(x, out=out), 4),
    "all_gather": (lambda c, x, out: c.all_gather(x, out=out), 8),
    "gather": (lambda c, x, out: c.gather(x, out=out), 8),
    "reduce_scatter": (lambda c, x, out: c.reduce_scatter(x, out=out), 2),
    "all_to_all": (lambda c, x, out: c.all_to_all(x, out=out), 4),
}


@pytest.mark.parametrize("kind", [*BAD_OUTPUTS, *BAD_FORMS])
@pytest.mark.parametrize("operation", TAKE_OUT)
def test_bad_out(operation: str, kind: str) -> None:
    call, count = TAKE_OUT[operation]
    make, fragments = {**BAD_OUTPUTS, **BAD_FORMS}[kind]
    fragments = [f.format(count + 1, count).replace(",)", ")", "(1" in f) for f in fragments]
    out = make(np.zeros(count, "f4"))
    before = bytes(out) if isinstance(out, (np.ndarray, bytes)) else None
    bad_on_one_rank(operation, lambda c: call(c, x4(), out), "argument 'out'", *fragments)
    assert before is None or bytes(out) == before


@pytest.mark.parametrize("kind", ["read-only", "bytes", "strided"])
@pytest.mark.parametrize("operation", ["all_reduce", "broadcast", "recv", "irecv"])
def test_bad_array_to_write_to(operation: str, kind: str) -> None:
    make, fragments = BAD_OUTPUTS[kind]
    call = TAKE_ARRAYS[operation]
    bad_on_one_rank(operation, lambda c: call(c, make(x4())), "argument 'x'", *fragments)


@pytest.mark.parametrize("kind", ["longer", "2-d", "dtype"])
def test_sendrecv_into_another_form_is_the_peers_business(kind: str) -> None:
    """The out of sendrecv is as the peer sends, so only the peer can tell that it is wrong."""
    out = BAD_FORMS[kind][0](x4())

    def rank_main(comm: mr.Communicator) -> None:
        comm.sendrecv(x4(), 1 - comm.rank, 1 - comm.rank, np.zeros(4, "f4"))
        if kind == "2-d":  # the same count: shapes of messages are not compared
            other = np.zeros((1, 4), "f4")
            assert comm.sendrecv(x4(), 1 - comm.rank, 1 - comm.rank, other) is other
            assert other.tolist() == [[0, 1, 2, 3]]
        else:
            peer = 1 - comm.rank
            error = raised(mr.MismatchError, lambda: comm.sendrecv(x4(), peer, peer, out.copy()))
            assert "float32" in str(error)
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


@pytest.mark.parametrize("operation", [*TAKE_OUT, "sendrecv"])
def test_out_that_overlaps_x(operation: str) -> None:
    memory = np.arange(16, dtype="f4")
    call, count = (lambda c, x, out: c.sendrecv(x, 1, 1, out), 4)
    if operation != "sendrecv":
        call, count = TAKE_OUT[operation]
    x, out = memory[:4], memory[1 : 1 + count]
    bad_on_one_rank(operation, lambda c: call(c, x, out), "argument 'out'", "overlaps 'x'")
    assert memory.tolist() == list(range(16))


# ---- numbers --------------------------------------------------------------------------------

ALONG = {
    "all_gather": lambda c, **named: c.all_gather(x4(), **named),
    "gather": lambda c, **named: c.gather(x4(), **named),
    "reduce_scatter": lambda c, **named: c.reduce_scatter(x4(), **named),
    "all_to_all": lambda c, **named: c.all_to_all(x4(), **named),
    "scatter": lambda c, **named: c.scatter(x4(), **named),
}
BAD_AXES = {
    "1": (1, ["is 1", "(4,)", "-1 to 0"]),
    "-2": (-2, ["is -2", "(4,)", "-1 to 0"]),
    "float": (0.0, ["is 0.0", "integer"]),
    "str": ("x", ["is 'x'", "integer"]),
    "None": (None, ["is None", "integer"]),
    "huge": (1 << 70, [str(1 << 70), "large"]),
}
BAD_SIZES = {
    "short": ([4], ["1 entries", "2 ranks", "one length per rank"]),
    "long": ([1, 1, 2], ["3 entries", "2 ranks", "one length per rank"]),
    "negative": ([5, -1], ["[5, -1]", "negative"]),
    "str": ("even", ["'even'", '"auto"']),
    "number": (2, ["is 2", '"auto"']),
    "float": ([2.0, 2.0], ["2.0", "integer"]),
    "set": ({2, 3}, ["{2, 3}", "one length per rank"]),
}


def refused_along(operation: str, named: dict[str, Any], *fragments: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 0:
            refused(comm, operation, lambda c: ALONG[operation](c, **named), *fragments)
        elif operation == "scatter":
            refused(
                comm, operation, lambda c: c.scatter(None), "rank 0 refused", "nothing was sent"
            )
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


@pytest.mark.parametrize("kind", BAD_AXES)
@pytest.mark.parametrize("operation", ALONG)
def test_bad_axis(operation: str, kind: str) -> None:
    axis, fragments = BAD_AXES[kind]
    refused_along(operation, {"axis": axis}, "argument 'axis'", *fragments)


@pytest.mark.parametrize("kind", BAD_SIZES)
@pytest.mark.parametrize("operation", ALONG)
def test_bad_sizes(operation: str, kind: str) -> None:
    sizes, fragments = BAD_SIZES[kind]
    refused_along(operation, {"sizes": sizes}, "argument 'sizes'", *fragments)


@pytest.mark.parametrize("operation", ALONG)
def test_sizes_that_do_not_add_up(operation: str) -> None:
    joins = operation in ("all_gather", "gather")
    needed = "axis 0 of x has length 4" if joins else "the axis has length 4"
    refused_along(operation, {"sizes": [3, 2]}, "argument 'sizes'", "3" if joins else "5", needed)


@pytest.mark.parametrize("operation", ["reduce_scatter", "scatter", "all_to_all"])
def test_length_that_does_not_divide(operation: str) -> None:
    def rank_main(comm: mr.Communicator) -> None:
        if comm.rank == 0 or operation == "scatter":
            x = np.zeros((2, 5)) if comm.rank == 0 else None
            call = {
                "reduce_scatter": lambda c: c.reduce_scatter(x, axis=1),
                "scatter": lambda c: c.scatter(x, axis=1),
                "all_to_all": lambda c: c.all_to_all(x, axis=1),
            }[operation]
            told = ["length 5", "2 ranks", "sizes=[3, 2]", '"auto"']
            refused(comm, operation, call, *(told if comm.rank == 0 else ["rank 0 refused"]))
        still_works(comm)

    mr.run_local(rank_main, 2, timeout=LIMIT)


BAD_RANKS = {
    "2": (2, ["is 2", "0 to 1"]),
    "-1": (-1, ["is -1", "0 to 1"]),
    "float": (1.0, ["is 1.0", "integer"]),
    "str": ("1", ["is '1'", "integer"]),
    "None": (None, ["is None", "integer"]),
}
TAKE_RANKS: dict[str, tuple[str, str, Callable[[mr.Communicator, Any], Any]]] = {
    "broadcast": ("broadcast", "root", lambda c, r: c.broadcast(x4(), r)),
    "reduce": ("reduce", "root", lambda c, r: c.reduce(x4(), root=r)),
    "gather": ("gather", "root", lambda c, r: c.gather(x4(), r)),
    "scatter": ("scatter", "root", lambda c, r: c.scatter(x4(), r)),
    "send": ("send", "dest", lambda c, r: c.send(x4(), r)),
    "isend": ("isend", "dest", lambda c, r: c.isend(x4(), r)),
    "recv": ("recv", "source", lambda c, r: c.recv(x4(), r)),
    "irecv": ("irecv", "source", lambda c, r: c.irecv(x4(), r)),
    "sendrecv dest": ("sendrecv", "dest", lambda c, r: c.sendrecv(x4(), r, 1)),
    "sendrecv source": ("sendrecv", "source", lambda c, r: c.sendrecv(x4(), 1, r)),
}


@pytest.mark.parametrize("kind", BAD_RANKS)
@pytest.mark.parametrize("which", TAKE_RANKS)
def test_bad_rank(which: str, kind: str) -> None:
    rank, fragments = BAD_RANKS[kind]
    operation, argument, call = TAKE_RANKS[which]
    bad_on_one_rank(operation, lambda c: call(c, rank), f"argument '{argument}'", *fragments)


TAKE_OP = {
    "all_reduce": lambda c, x, op: c.all_reduce(x, op),
    "reduce": lambda c, x, op: c.reduce(x, op),
    "reduce_scatter": lambda c, x, op: c.reduce_scatter(x, op),
}


@pytest.mark.parametrize("op", ["avg", "SUM", "", None, 0, ["sum"]])
@pytest.mark.parametrize("operation", TAKE_OP)
def test_bad_op(operation: str, op: Any) -> None:
    said = ["argument 'op'", repr(op), "'sum', 'prod', 'min', 'max' or 'mean'"]
    bad_on_one_rank(operation, lambda c: TAKE_OP[operation](c, x4(), op), *said)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("operation", TAKE_OP)
def test_reductions_without_meaning(operation: str, dtype: str) -> None:
    without = [op for op in oracle.OPS if not oracle.supports(dtype, op)]
    assert without == {"i": ["mean"], "u": ["mean"], "b": ["mean"], "c": ["min", "max"]}.get(
        oracle.dtype_of(dtype).kind, []
    )
    for op in without:
        x = np.ones(4, oracle.dtype_of(dtype))
        fix = "astype('float64')" if op == "mean" else "abs(x)"
        said = [f"op='{op}'", dtype, fix]
        bad_on_one_rank(operation, lambda c, x=x, op=op: TAKE_OP[operation](c, x, op), *said)
