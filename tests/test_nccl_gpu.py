"""The NCCL backend on one GPU: the case table, streams, lifetimes, graphs, and what goes wrong.

Several ranks share the GPU, which NCCL allows between separate processes only: by NCCL_HOSTID each
rank is a host of its own (sockets), by NCCL_MULTI_RANK_GPU_ENABLE they use its memory directly.
What needs no kernel of CuPy runs on the stand-in too.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

import standin
from meshring import _core, nccl
from meshring.errors import MeshringError
from procs import launched, run_ranks

LIMIT = 110.0
SOCKETS = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
DIRECT = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "1", "NCCL_NVLS_ENABLE": "0"}
DIRECT_SINCE = 23003
HEAD = """\
import os, signal, sys, time
from pathlib import Path
import numpy as np
rank, size = int(os.environ["MESHRING_RANK"]), int(os.environ["MESHRING_SIZE"])
if os.environ.get("SHARED") == "hostid":
    os.environ["NCCL_HOSTID"] = f"meshring-test-{rank}"
import meshring as mr
import cases, nccl_ranks
folder = Path(sys.argv[1])
on_device, on_host = nccl_ranks.places()

def wait_for(name):
    end = time.monotonic() + 60
    while not (folder / name).exists():
        assert time.monotonic() < end, name
        time.sleep(0.01)

def settled(comm):
    # The watchdog marks several calls at once; what it blames later must be alone.
    comm.synchronize(timeout=60)
    end = time.monotonic() + 60
    while any(call["state"] != "done" for call in comm.trace()):
        assert time.monotonic() < end, comm.trace()
        time.sleep(0.005)

def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        text = str(error)
        missing = [word for word in words if word not in text]
        assert not missing, (missing, text)
        return error
    raise AssertionError(f"no {kind}")
"""


def why_no_gpu() -> str | None:
    """What is missing for a real GPU, if anything is."""
    if importlib.util.find_spec("cupy") is None:
        return "pip install cupy-cuda12x nvidia-nccl-cu12 (CUDA 13: -cuda13x, -cu13), on a GPU"
    try:
        _core.cuda_devices()
        nccl.library()
    except MeshringError as error:
        return f"needs a GPU: {error}"
    return None


@pytest.fixture(scope="module")
def gpu() -> dict[str, str]:
    """The environment of ranks on a real GPU."""
    why = why_no_gpu()
    if why is not None:
        pytest.skip(why)
    tests = str(Path(__file__).parent)
    return {
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
        "NCCL_DEBUG": "WARN",
    }


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "standin"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of ranks on a real GPU, or on the stand-in."""
    if request.param == "gpu":
        found: dict[str, str] = request.getfixturevalue("gpu")
        return found
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    return standin.environment(tmp_path)


def shared(environment: dict[str, str], way: str = "hostid") -> dict[str, str]:
    """The environment of several ranks on one GPU."""
    if way == "hostid":
        return environment | SOCKETS | {"SHARED": "hostid"}
    if "STANDIN_DIR" not in environment and nccl.library().code < DIRECT_SINCE:
        pytest.skip(
            f"NCCL_MULTI_RANK_GPU_ENABLE needs NCCL 2.30.3; this is {nccl.library().version}"
        )
    return environment | DIRECT


def run(
    n: int, body: str, folder: Path, env: dict[str, str], *launcher_args: str, code: int = 0
) -> str:
    result = run_ranks(
        HEAD + body, n, str(folder), env=env, timeout=LIMIT, launcher_args=launcher_args
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.left == []
    assert "violation" not in result.stderr
    return result.stdout + result.stderr


# ---- the case table


TABLE = """
sizes = tuple(cases.SIZES) if len(sys.argv) < 3 else tuple(sys.argv[2].split(","))
with mr.init("nccl", timeout=90) as comm:
    table = nccl_ranks.table(size, sizes)
    where = nccl_ranks.on_gpu()
    found = cases.failures(comm, table, where)
    comm.synchronize(timeout=60)
(folder / f"rank{rank}.json").write_text(__import__("json").dumps([len(table), found]))
"""


def run_table(n: int, folder: Path, env: dict[str, str], *sizes: str) -> None:
    args = (str(folder), *([",".join(sizes)] if sizes else []))
    result = run_ranks(HEAD + TABLE, n, *args, env=env, timeout=LIMIT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.left == []
    for rank in range(n):
        count, found = json.loads((folder / f"rank{rank}.json").read_text())
        assert count > 100
        assert not found, "\n".join(found[:10])


@pytest.mark.gpu
def test_the_table_on_one_rank(gpu: dict[str, str], tmp_path: Path) -> None:
    run_table(1, tmp_path, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["hostid", "direct"])
@pytest.mark.parametrize(
    ("n", "sizes"), [(2, ("seven", "slot+", "large")), (3, ("line+",)), (4, ("empty", "seven"))]
)
def test_the_table_on_one_gpu(
    n: int, sizes: tuple[str, ...], way: str, gpu: dict[str, str], tmp_path: Path
) -> None:
    run_table(n, tmp_path, shared(gpu, way), *sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("off", ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"])
def test_other_transports(off: str, gpu: dict[str, str], tmp_path: Path) -> None:
    run_table(2, tmp_path, shared(gpu, "direct") | {off: "1"}, "seven", "slot+")


def test_ranks_that_share_a_gpu_unasked_are_refused(place: dict[str, str], tmp_path: Path) -> None:
    body = """
raises(mr.UsageError, lambda: mr.init("nccl", timeout=30), "init", "share one GPU", "docs/nccl.md")
"""
    if "STANDIN_DIR" not in place and len(_core.cuda_devices()) > 1:
        pytest.skip("needs a machine with exactly one GPU")
    run(2, body, tmp_path, place)


# ---- streams, lifetimes, graphs

STREAMS = """
import cupy
N = 1 << 20
comm = mr.init("nccl", timeout=90)
cupy.cuda.Device(comm.device).use()

def slow(x, times=300):
    for _ in range(times):
        x += 1
    return x

def stream():
    return cupy.cuda.Stream(non_blocking=True)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_streams(n: int, gpu: dict[str, str], tmp_path: Path) -> None:
    body = """
# On the current stream: behind the kernels before it, ahead of those after it.
with stream():
    x = cupy.zeros(N, "f4")
    comm.all_reduce(slow(x))
    y = x + 1
    assert (y == 300 * size + 1).all()
# Two streams in turn, each with its own order.
first, second = stream(), stream()
with first:
    a = cupy.zeros(N, "f4")
    comm.all_reduce(slow(a))
with second:
    b = cupy.full(N, 2, "i4")
    comm.all_reduce(slow(b, 10), "max")
    assert (b == 12).all()
with first:
    assert (a == 300 * size).all()
# stream=: given as a stream, by its protocol and as an address.
class Protocol:
    def __init__(self, stream):
        self.stream = stream
    def __cuda_stream__(self):
        return (0, self.stream.ptr)
kept = []  # an address alone does not keep its stream
for way in (lambda s: s, Protocol, lambda s: s.ptr):
    s = stream()
    kept.append(s)
    with s:
        x = slow(cupy.zeros(N, "f4"), 50)
    gathered = comm.all_gather(x, stream=way(s))
    s.synchronize()
    assert gathered.size == N * size and (gathered == 50).all()
raises(mr.UsageError, lambda: comm.all_reduce(x, stream="s"), "all_reduce", "stream")
raises(mr.UsageError, lambda: comm.all_reduce(np.ones(3), stream=first), "on the host")
# A part of the communicator, and the host beside it.
part = comm.split(0)
x = cupy.ones(5)
part.all_reduce(x)
part.synchronize()
part.close()
assert (x == size).all() and (comm.all_reduce(np.ones(2)) == size).all()
comm.synchronize(timeout=30)
comm.close()
"""
    run(n, STREAMS + body, tmp_path, shared(gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_lifetimes(n: int, gpu: dict[str, str], tmp_path: Path) -> None:
    body = """
# What is freed right after the call is not given to the next array before the call has read it.
for _ in range(10):
    x = slow(cupy.zeros(N, "f4"), 100)
    y = comm.all_gather(x)
    del x
    other = cupy.full(N, 7, "f4")
    assert (y == 100).all()
    x = slow(cupy.zeros(N, "f4"), 100)
    work = comm.all_reduce(x, async_op=True)
    del x
    other = cupy.full(N, 7, "f4")
    assert (work.wait(30) == 100 * size).all()
    # On another stream CuPy knows nothing of the use, so the communicator keeps the array.
    s = stream()
    x = slow(cupy.zeros(N, "f4"), 100)
    s.wait_event(cupy.cuda.get_current_stream().record())
    y = comm.all_gather(x, stream=s)
    del x
    other = cupy.full(N, 7, "f4")
    s.synchronize()
    assert (y == 100).all()
work = comm.all_reduce(cupy.ones(4), async_op=True)
assert (work.wait(30) == size).all() and work.done()
comm.close()
"""
    run(n, STREAMS + body, tmp_path, shared(gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("how", ["current", "argument"])
def test_graphs(n: int, how: str, gpu: dict[str, str], tmp_path: Path) -> None:
    body = (
        f"how = {how!r}\n"
        + """
s = stream()
x, rows = cupy.zeros(1000, "f4"), cupy.zeros((30, 16), "f4")
total, wide = cupy.zeros(1000, "f4"), cupy.zeros((30, 16 * size), "f4")
cupy.cuda.get_current_stream().synchronize()

def work():
    stream = {} if how == "current" else {"stream": s}
    comm.all_reduce(x, out=total, **stream)
    comm.all_gather(rows, axis=1, out=wide, **stream)  # with memory and a kernel of ours
    comm.all_reduce(total, "max", **stream)

def captured():
    s.begin_capture()
    work()
    return s.end_capture()

with s:
    work()  # connects
    s.synchronize()
    graph = captured() if how == "current" else None
if how == "argument":
    graph = captured()
for value in (1, 2, 3):
    with s:
        x[:] = value
        rows[:] = value + 10
        graph.launch(s)
        assert (total == value * size).all(), value
        assert (wide == value + 10).all(), value
        comm.all_reduce(x)  # beside the graph
        assert (x == value * size).all()
comm.synchronize(timeout=30)
comm.close()
"""
    )
    run(n, STREAMS + body, tmp_path, shared(gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_arrays_that_are_not_contiguous(n: int, gpu: dict[str, str], tmp_path: Path) -> None:
    body = """
x = cupy.arange(48, dtype="f4").reshape(6, 8) + rank
every = [np.arange(48, dtype="f4").reshape(6, 8) + r for r in range(size)]
before = comm.packed_bytes
wide = comm.all_gather(x[:, ::2].T, axis=1)
assert comm.packed_bytes - before == 96
np.testing.assert_array_equal(wide.get(), np.concatenate([e[:, ::2].T for e in every], 1))
out = comm.all_reduce(x[::-1], out=cupy.empty((6, 8), "f4"))
np.testing.assert_array_equal(out.get(), sum(e[::-1] for e in every))
raises(mr.UsageError, lambda: comm.all_reduce(x[:, ::2]), "all_reduce", "'x'", "contiguous")
raises(mr.UsageError, lambda: comm.all_reduce(x, out=cupy.empty((8, 6), "f4").T), "'out'")
comm.close()
"""
    run(n, STREAMS + body, tmp_path, shared(gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_registered_memory(n: int, gpu: dict[str, str], tmp_path: Path) -> None:
    if nccl.library().code < 21901:
        pytest.skip(f"registration needs NCCL 2.19.1; this is {nccl.library().version}")
    body = """
from meshring import nccl
windows = (False, True) if nccl.library().code >= 22703 else (False,)
for window in windows:
    with cupy.cuda.using_allocator(nccl.allocator()):
        x = cupy.empty(N, "f4")
    with comm.register(x, window=window) as registration:
        for value in (1, 2):
            x[:] = value
            comm.all_reduce(x)
            assert (x == value * size).all(), (window, value)
        comm.synchronize(timeout=30)
    registration.close()
    x[:] = 3
    comm.all_reduce(x)
    assert (x == 3 * size).all()
raises(mr.UsageError, lambda: comm.register(np.ones(3)), "register", "on the host")
comm.close()
"""
    run(n, STREAMS + body, tmp_path, shared(gpu))


# ---- what goes wrong


def test_a_rank_that_does_not_come(place: dict[str, str], tmp_path: Path) -> None:
    body = """
comm = mr.init("nccl", timeout=60)
x = on_device(np.ones(8, "f4"))
comm.all_reduce(x)
settled(comm)
if rank == 1:
    wait_for("known")
else:
    comm.all_reduce(x, timeout=3)
    error = raises(mr.DeadlineError, lambda: comm.synchronize(timeout=60), "all_reduce",
                   "rank 1 did not make this call", "cannot be used any more")
    assert error.ranks == (1,), error.ranks
    raises(mr.UsageError, lambda: comm.all_reduce(x), "all_reduce", "only closed, since")
    (folder / "known").touch()
comm.close()
"""
    run(2, body, tmp_path, shared(place))


def test_a_killed_peer(place: dict[str, str], tmp_path: Path) -> None:
    body = """
comm = mr.init("nccl", timeout=60)
x = on_device(np.ones(8, "f4"))
comm.all_reduce(x)
settled(comm)
if rank == 1:
    wait_for("go")
    os.kill(os.getpid(), signal.SIGKILL)
comm.all_reduce(x, timeout=60)
(folder / "go").touch()
# NCCL's own network error may come before the word of the system.
raises((mr.PeerLostError, mr.BackendError), lambda: comm.synchronize(timeout=60), "all_reduce")
raises(mr.UsageError, lambda: comm.all_reduce(x), "all_reduce", "only closed, since")
comm.close()
print("rank 0 knows", flush=True)
"""
    env = shared(place)
    with launched(HEAD + body, 2, str(tmp_path), launcher_args=["--keep-going"], env=env) as job:
        result = job.finish(LIMIT)
    assert "rank 0 knows" in result.stdout, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.left == []


def test_abort(place: dict[str, str], tmp_path: Path) -> None:
    body = """
comm = mr.init("nccl", timeout=60)
x = on_device(np.ones(8, "f4"))
comm.all_reduce(x)
settled(comm)
if rank == 1:
    wait_for("gone")
else:
    comm.all_reduce(x)
    comm.abort()
    raises(mr.MeshringError, lambda: comm.all_reduce(x), "all_reduce")
    comm.close()
    (folder / "gone").touch()
comm.close()
"""
    run(2, body, tmp_path, shared(place))


def test_compared_before_the_launch(place: dict[str, str], tmp_path: Path) -> None:
    body = """
comm = mr.init("nccl", timeout=60, check=True)
x = on_device(np.ones(8, "f4"))
raises(mr.MismatchError, lambda: comm.all_reduce(x if rank == 0 else x[:4]), "shape", "rank 1")
comm.all_reduce(x)
assert (on_host(x) == size).all()
comm.close()
"""
    run(2, body, tmp_path, shared(place))


def test_arrays_where_nccl_is_off(place: dict[str, str], tmp_path: Path) -> None:
    body = """
comm = mr.init("host", timeout=60)
x = on_device(np.ones(8, "f4"))
raises(mr.UsageError, lambda: comm.all_reduce(x), "all_reduce", "'x'", "on a GPU", "NCCL is off")
assert (comm.all_reduce(np.ones(2)) == size).all()
comm.close()
"""
    run(1, body, tmp_path, place)


@pytest.mark.gpu
def test_an_array_on_another_gpu(gpu: dict[str, str], tmp_path: Path) -> None:
    if len(_core.cuda_devices()) < 2:
        pytest.skip("needs two GPUs")
    body = """
comm = mr.init("nccl", timeout=60)
import cupy
with cupy.cuda.Device(1):
    x = cupy.ones(3)
raises(mr.UsageError, lambda: comm.all_reduce(x), "on GPU 1", "communicates on GPU 0")
comm.close()
"""
    run(1, body, tmp_path, gpu)


def test_an_array_on_another_gpu_of_the_stand_in(tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    body = """
import cupy
comm = mr.init("nccl", timeout=60)
x = on_device(np.ones(3))
memory = cupy.cuda.UnownedMemory(x.data.ptr, 24, x, device_id=1)
there = cupy.ndarray(3, "f8", cupy.cuda.MemoryPointer(memory, 0))
raises(mr.UsageError, lambda: comm.all_reduce(there), "on GPU 1", "communicates on GPU 0")
comm.close()
"""
    run(1, body, tmp_path, standin.environment(tmp_path, gpus=2))
