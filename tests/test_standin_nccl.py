"""The stand-in NCCL and CUDA driver themselves, through ctypes, against NumPy."""

from __future__ import annotations

from pathlib import Path

import pytest

from standin import SKIP, compiler
from standin_raw import job

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIP)

COLLECTIVES = """
import ml_dtypes
def kind(name):
    return np.dtype(getattr(ml_dtypes, name, name))
def inputs(name, size, count, dtype):
    high = 3 if name == "prod" else 5
    return [np.random.default_rng(r).integers(0 if name == "avg" else 1, high, count).astype(dtype)
            for r in range(size)]
def expected(xs, op, dtype):
    wide = [x.astype("f8") if dtype.kind not in "iu" else x for x in xs]
    fold = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum, "avg": np.add}
    total = wide[0]
    for w in wide[1:]:
        total = fold[op](total, w)
    if op == "avg":
        total = total // len(xs) if dtype.kind in "iu" else total / len(xs)
    return total.astype(dtype)
def check(n, rank):
    size, s = n.size, n.stream
    for code, name in enumerate(DTYPES):
        dtype = kind(name)
        for op, number in OPS.items():
            count = 100_003 if (name, op) == ("float32", "sum") else 37
            xs = inputs(op, size, count, dtype)
            want = expected(xs, op, dtype)
            send, recv = n.device(xs[rank]), n.empty(count, dtype)
            assert n.AllReduce(send, recv, count, code, number, n.comm, s) == 0
            assert n.AllReduce(send, send, count, code, number, n.comm, s) == 0
            for at in (send, recv):
                assert (n.host(at, count, dtype) == want).all(), (name, op)
            send = n.device(np.concatenate([x for x in [xs[rank]] * size]))
            assert n.ReduceScatter(send, recv, count, code, number, n.comm, s) == 0
            assert (n.host(recv, count, dtype) == want).all(), (name, op)
            root = size - 1
            assert n.Reduce(n.device(xs[rank]), recv if rank == root else None, count, code, number, root, n.comm, s) == 0
            assert rank != root or (n.host(recv, count, dtype) == want).all()
    count, one = 40_001, 40_001 * 4
    xs = [np.arange(count * size, dtype="f4") + 1000 * r for r in range(size)]
    mine = xs[rank][:count]
    whole = np.concatenate([x[:count] for x in xs])
    big = n.empty(count * size, "f4")
    assert n.AllGather(n.device(mine), big, count, 7, n.comm, s) == 0
    assert (n.host(big, count * size, "f4") == whole).all()
    big = n.device(np.where(np.arange(count * size) // count == rank, whole, 0).astype("f4"))
    assert n.AllGather(big + rank * one, big, count, 7, n.comm, s) == 0
    assert (n.host(big, count * size, "f4") == whole).all()
    big = n.device(xs[rank])
    assert n.ReduceScatter(big, big + rank * one, count, 7, 0, n.comm, s) == 0
    part = slice(rank * count, (rank + 1) * count)
    assert (n.host(big + rank * one, count, "f4") == sum(x[part] for x in xs)).all()
    out = n.empty(count, "f4")
    assert n.Broadcast(n.device(mine), out, count, 7, 1 % size, n.comm, s) == 0
    assert (n.host(out, count, "f4") == xs[1 % size][:count]).all()
    big = n.empty(count * size, "f4")
    assert n.AlltoAll(n.device(xs[rank]), big, count, 7, n.comm, s) == 0
    assert (n.host(big, count * size, "f4") == np.concatenate([x[part] for x in xs])).all()
    assert n.Gather(n.device(mine), big if rank == 0 else None, count, 7, 0, n.comm, s) == 0
    assert rank or (n.host(big, count * size, "f4") == whole).all()
    assert n.Scatter(n.device(xs[rank]) if rank == 0 else None, out, count, 7, 0, n.comm, s) == 0
    assert (n.host(out, count, "f4") == xs[0][part]).all()
    for call in ((n.AllReduce, 7, 0), (n.AllGather, 7), (n.ReduceScatter, 7, 0), (n.AlltoAll, 7)):
        assert call[0](None, None, 0, *call[1:], n.comm, s) == 0
    n.standin.synchronize(s)
    assert n.error() == 0
    assert n.CommFinalize(n.comm) == 0 and n.CommDestroy(n.comm) == 0
"""


@pytest.mark.parametrize("n", [1, 2, 4])
def test_collectives_between_processes(n: int, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes", reason="pip install ml_dtypes")
    job(tmp_path, COLLECTIVES + "process(check)", n)


def test_collectives_between_threads(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes", reason="pip install ml_dtypes")
    job(tmp_path, COLLECTIVES + "threads(check, 3)")


def test_groups_and_transfers(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        size, s = n.size, n.stream
        count = 60_000  # larger than a channel
        after, before = (rank + 1) % size, (rank - 1) % size
        x = np.arange(count, dtype="i4") + rank
        send, recv = n.device(x), n.empty(count, "i4")
        assert n.GroupStart() == 0 and n.GroupStart() == 0
        assert n.Send(send, count, 2, after, n.comm, s) == 0
        assert n.GroupEnd() == 0
        assert n.Recv(recv, count, 2, before, n.comm, s) == 0
        assert n.GroupEnd() == 0
        assert (n.host(recv, count, "i4") == np.arange(count) + before).all()
        # Several messages of one pair keep their order; broadcasts with every root in one group.
        sizes = [5, 0, 40_000]
        ins = [n.device(np.full(k, 10 * rank + j, "i4")) for j, k in enumerate(sizes)]
        outs = [n.empty(k, "i4") for k in sizes]
        whole = n.empty(3 * size, "i4")
        mine = n.device(np.full(3, rank, "i4"))
        assert n.GroupStart() == 0
        for k, source, target in zip(sizes, ins, outs):
            assert n.Recv(target, k, 2, before, n.comm, s) == 0
            assert n.Send(source, k, 2, after, n.comm, s) == 0
        for root in range(size):
            assert n.Broadcast(mine, whole + 12 * root, 3, 2, root, n.comm, s) == 0
        assert n.GroupEnd() == 0
        for j, (k, target) in enumerate(zip(sizes, outs)):
            assert (n.host(target, k, "i4") == 10 * before + j).all()
        assert (n.host(whole, 3 * size, "i4") == np.repeat(np.arange(size), 3)).all()
        # To itself: only with both halves in a group.
        assert n.Send(mine, 3, 2, rank, n.comm, s) == 5
        assert n.GroupStart() == 0
        assert n.Send(send, 3, 2, rank, n.comm, s) == 0
        assert n.Recv(recv, 3, 2, rank, n.comm, s) == 0
        assert n.GroupEnd() == 0
        assert (n.host(recv, 3, "i4") == x[:3]).all()
        # An error inside a group is the group's.
        assert n.GroupStart() == 0
        assert n.Send(send, 3, 2, size, n.comm, s) == 4
        assert n.GroupEnd() == 4
        assert n.GroupEnd() == 5
        # Two communicators and two streams in one group.
        child, other = P(), n.standin.stream()
        assert n.CommSplit(n.comm, 0, -rank, ctypes.byref(child), None) == 0
        ones = [n.device(np.ones(9, "f4")) for _ in range(3)]
        assert n.GroupStart() == 0
        assert n.AllReduce(ones[0], ones[0], 9, 7, 0, n.comm, s) == 0
        assert n.AllReduce(ones[1], ones[1], 9, 7, 0, child.value, s) == 0
        assert n.AllReduce(ones[2], ones[2], 9, 7, 0, n.comm, other) == 0
        assert n.GroupEnd() == 0
        n.standin.synchronize(other)
        assert all((n.host(p, 9, "f4") == size).all() for p in ones)
        # The keys turned the ranks around.
        assert n.Broadcast(mine, recv, 3, 2, 0, child.value, s) == 0
        assert (n.host(recv, 3, "i4") == size - 1).all()
        assert n.CommDestroy(child.value) == 0 and n.CommDestroy(n.comm) == 0
    threads(check, 3)
    """
    job(tmp_path, body)


def test_split_shrink_operators_and_registration(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        s, child, out = n.stream, P(), n.empty(4, "f4")
        x = n.device(np.full(4, rank + 1, "f4"))
        color = -1 if rank == 3 else rank % 2
        assert n.CommSplit(n.comm, color, 0, ctypes.byref(child), None) == 0
        assert (child.value is None) == (rank == 3)
        if child.value:
            assert n.AllReduce(x, out, 4, 7, 0, child.value, s) == 0
            assert (n.host(out, 4, "f4") == {0: 4, 1: 2}[color]).all()
            assert n.CommDestroy(child.value) == 0
        excluded = (N * 1)(3)
        if rank == 3:
            assert n.CommShrink(n.comm, excluded, 1, ctypes.byref(child), None, 0) == 4
        else:
            assert n.CommShrink(n.comm, excluded, 1, ctypes.byref(child), None, 0) == 0
            assert n.AllReduce(x, out, 4, 7, 0, child.value, s) == 0
            assert (n.host(out, 4, "f4") == 6).all()
            assert n.CommAbort(child.value) == 0
            assert n.AllReduce(x, out, 4, 7, 0, child.value, s) == 4
        op, half = N(), np.array([0.5], "f4")
        assert n.RedOpCreatePreMulSum(ctypes.byref(op), half.ctypes.data, 7, 1, n.comm) == 0
        assert n.AllReduce(x, out, 4, 7, op.value, n.comm, s) == 0
        assert (n.host(out, 4, "f4") == 5).all()
        assert n.AllReduce(x, out, 2, 8, op.value, n.comm, s) == 4  # another dtype
        assert n.RedOpDestroy(op.value, n.comm) == 0
        assert n.AllReduce(x, out, 4, 7, op.value, n.comm, s) == 4
        memory, window, handle = P(), P(), P()
        assert n.MemAlloc(ctypes.byref(memory), 8192) == 0
        assert n.CommWindowRegister(n.comm, memory.value, 8192, ctypes.byref(window), 1) == 0
        assert n.CommWindowRegister(n.comm, x, 16, ctypes.byref(handle), 1) == 4
        assert n.CommRegister(n.comm, x, 16, ctypes.byref(handle)) == 0
        assert n.CommDeregister(n.comm, handle.value) == 0
        assert n.CommDeregister(n.comm, handle.value) == 4
        assert n.CommWindowDeregister(n.comm, window.value) == 0
        assert n.MemFree(memory.value) == 0 and n.MemFree(memory.value) == 4
        assert n.CommRevoke(n.comm, 0) == 0
        assert n.AllReduce(x, out, 4, 7, 0, n.comm, s) == 5
        assert n.CommFinalize(n.comm) == 5
        assert n.CommDestroy(n.comm) == 0
    threads(check, 4)
    """
    job(tmp_path, body)


def test_streams_are_asynchronous(tmp_path: Path) -> None:
    body = """
    cu = standin.dll
    cu.cuStreamQuery.argtypes = (P,)
    cu.cuStreamIsCapturing.argtypes = (P, P)
    cu.cuEventRecord.argtypes = cu.cuEventElapsedTime.argtypes = (P, P)
    cu.cuEventElapsedTime.argtypes = (P, P, P)
    cu.cuEventQuery.argtypes = cu.cuEventDestroy_v2.argtypes = (P,)
    cu.cuStreamWaitEvent.argtypes = (P, P, N)
    cu.cuEventCreate.argtypes = (P, N)
    gate = threading.Event()
    def event(flags=0):
        made = P()
        assert cu.cuEventCreate(ctypes.byref(made), flags) == 0
        return made.value
    def check(n, rank):
        s, x = n.stream, n.device(np.full(8, 1.0, "f4"))
        copy, other = n.empty(8, "f4"), n.standin.stream()
        if rank == 1:
            assert gate.wait(20)
            for _ in range(4):
                assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 0
            n.standin.synchronize(s)
            return
        start, end = event(), event()
        assert cu.cuEventQuery(end) == 0  # never recorded
        assert cu.cuEventRecord(start, s) == 0
        assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 0
        assert cu.cuEventRecord(end, s) == 0
        assert cu.cuStreamWaitEvent(other, end, 0) == 0
        assert cu.cuMemcpyDtoDAsync_v2(P(copy), P(x), Z(32), P(other)) == 0
        assert cu.cuStreamQuery(s) == cu.cuStreamQuery(other) == cu.cuEventQuery(end) == 600
        assert cu.cuEventElapsedTime(ctypes.byref(ctypes.c_float()), start, end) == 600
        gate.set()
        n.standin.synchronize(other)
        assert (n.host(copy, 8, "f4") == 2).all()
        took = ctypes.c_float()
        assert cu.cuEventElapsedTime(ctypes.byref(took), start, end) == 0 and took.value >= 0
        assert cu.cuEventQuery(end) == cu.cuStreamQuery(other) == 0
        assert cu.cuEventDestroy_v2(end) == 0 and cu.cuEventRecord(end, s) == 400
        # A captured collective runs at each replay, not before.
        status = N()
        with n.standin.capture(s):
            assert cu.cuStreamIsCapturing(s, ctypes.byref(status)) == 0 and status.value == 1
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 0
            assert cu.cuStreamQuery(s) == 900
        assert (n.host(x, 8, "f4") == 2).all()
        for _ in range(3):
            n.standin.replay(s)
        assert (n.host(x, 8, "f4") == 16).all()
        n.standin.destroy(other)
        assert cu.cuStreamQuery(other) == 400
        assert n.AllReduce(x, x, 8, 7, 0, n.comm, other) == 1
    threads(check, 2)
    """
    job(tmp_path, body)


def test_nonblocking_calls_settle_when_polled(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        s, x = n.stream, n.device(np.ones(8, "f4"))
        for round in range(3):
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 7
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 4  # too early
            assert [n.error() for _ in range(4)] == [7, 7, 7, 0]
        assert (n.host(x, 8, "f4") == 8).all()
        child = P()
        code = n.CommSplit(n.comm, 0, 0, ctypes.byref(child), None)
        assert code == 0 and not child.value  # as NCCL: it goes on
        until(lambda: n.error() == 0)
        assert child.value
        until(lambda: n.error(child.value) == 0)
        assert n.CommFinalize(child.value) == 7
        assert n.CommDestroy(child.value) == 4
        until(lambda: n.error(child.value) == 0)
        assert n.CommDestroy(child.value) == 0
        # A call that stays in progress is ended by abort.
        if rank == 0:
            standin.faults("ncclAllReduce/0=in_progress")
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 7
            assert {n.error() for _ in range(50)} == {7}
        assert n.CommAbort(n.comm) == 0
    threads(check, 2, blocking=0)
    """
    job(tmp_path, body, in_progress=1, polls=3)


def test_the_driver(tmp_path: Path) -> None:
    body = """
    cu, made, count = standin.dll, P(), N()
    assert cu.cuDeviceGetCount(ctypes.byref(count)) == 3  # not initialised
    assert cu.cuInit(0) == 0
    assert cu.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value == 2
    assert cu.cuDeviceGet(ctypes.byref(count), 2) == 101
    name = ctypes.create_string_buffer(64)
    assert cu.cuDeviceGetName(name, 64, 1) == 0 and name.value == b"stand-in GPU 1"
    assert cu.cuModuleLoadData(ctypes.byref(made), b"ptx") == 201  # no context
    assert cu.cuDevicePrimaryCtxRetain(ctypes.byref(made), 1) == 0
    assert cu.cuCtxSetCurrent(made) == 0
    assert cu.cuCtxSetCurrent(P(1)) == 201
    assert cu.cuModuleLoadData(ctypes.byref(made), b"ptx") == 0
    kernel = b"meshring_copy_16_Uneven_u64"
    assert cu.cuModuleGetFunction(ctypes.byref(P()), made, b"no such kernel") == 500
    assert cu.cuModuleGetFunction(ctypes.byref(P()), made, kernel) == 0
    text = ctypes.c_char_p()
    assert cu.cuGetErrorName(500, ctypes.byref(text)) == 0 and text.value == b"CUDA_ERROR_NOT_FOUND"
    assert cu.cuGetErrorString(12345, ctypes.byref(text)) == 1
    pool, properties, pointer = P(), (N * 22)(1, 0, 1, 1), ctypes.c_ulonglong()
    assert cu.cuMemPoolCreate(ctypes.byref(pool), properties) == 0
    assert cu.cuMemPoolSetAttribute(pool, 4, ctypes.byref(pointer)) == 0
    assert cu.cuMemAllocFromPoolAsync(ctypes.byref(pointer), Z(96), pool, None) == 0
    where = N(-1)
    assert cu.cuPointerGetAttribute(ctypes.byref(where), 9, pointer) == 0 and where.value == 1
    assert cu.cuPointerGetAttribute(ctypes.byref(where), 9, ctypes.addressof(where)) == 1
    # Rows of 4 bytes from a pitch of 12 to a pitch of 8, from the second row and the third byte on.
    source = standin.allocate(96)
    ctypes.memmove(source, bytes(range(96)), 96)
    fields = [2, 1, 2, None, source, None, 12, 0, 0, 2, None, pointer.value, None, 8, 4, 5]
    copy = (ctypes.c_size_t * 16)(*(f or 0 for f in fields))
    stream = standin.stream()
    assert cu.cuMemcpy2DAsync_v2(copy, P(stream)) == 0
    standin.synchronize(stream)
    got = np.frombuffer((ctypes.c_char * 40).from_address(pointer.value), "u1").reshape(5, 8)[:, :4]
    want = np.arange(96, dtype="u1").reshape(8, 12)[1:6, 2:6]
    assert (got == want).all()
    assert cu.cuMemFreeAsync(pointer, P(stream)) == 0
    standin.synchronize(stream)
    assert cu.cuMemFreeAsync(pointer, P(stream)) == 1
    assert len(standin.calls("cuMemcpy2DAsync_v2")) == 1
    """
    job(tmp_path, body, gpus=2)


def test_cupy_arrays_over_the_stand_in(tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    pytest.importorskip("ml_dtypes", reason="pip install ml_dtypes")
    body = """
    import ml_dtypes
    standin.install()
    for dtype in ("?", "i2", "f2", "f4", "c16", ml_dtypes.bfloat16):
        x = np.arange(24).reshape(2, 3, 4).astype(dtype)
        y = standin.to_device(x)
        assert y.dtype == x.dtype and (standin.to_host(y) == x).all()
        assert (standin.to_host(y[:, ::-2].T) == x[:, ::-2].T).all()
    assert standin.to_host(standin.to_device(np.zeros((0, 3)))).shape == (0, 3)
    try:
        standin.to_device(np.zeros(2, ml_dtypes.float8_e4m3fn))
    except ValueError as error:
        assert "float8" in str(error)
    stream = standin.stream()
    with standin.memory_of(stream, 1):
        y = standin.to_device(np.ones(4))
    assert y.data.device_id == 1
    where = N()
    code = standin.dll.cuPointerGetAttribute(ctypes.byref(where), 9, P(y.data.ptr))
    assert (code, where.value) == (0, 1)
    address = y.data.ptr
    del y
    standin.synchronize(stream)
    assert ctypes.string_at(address, 8) == b"\\xdd" * 8
    """
    job(tmp_path, body, gpus=2)


@pytest.mark.parametrize("version", [21801, 22705, 23203])
def test_older_versions_lack_newer_symbols(version: int, tmp_path: Path) -> None:
    body = f"""
    first = {{"MemAlloc": 21901, "CommShrink": 22703, "AlltoAll": 22803, "CommRevoke": 22807}}
    for symbol, since in first.items():
        assert hasattr(standin.dll, "nccl" + symbol) == (since <= {version}), symbol
    assert hasattr(standin.dll, "ncclCommSplit")
    found = N()
    assert standin.dll.ncclGetVersion(ctypes.byref(found)) == 0 and found.value == {version}
    """
    job(tmp_path, body, version=version)


def test_null_mode_returns_at_once(tmp_path: Path) -> None:
    body = """
    n = Nccl()
    assert n.AllReduce(None, None, 9, 7, 0, 1, None) == 0
    assert standin.calls() == []
    """
    job(tmp_path, body, null=1)
