"""What can go wrong on a GPU, on the stand-in NCCL: which error, on which rank, in which words."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import standin
from procs import Result, run_ranks

pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
pytestmark = pytest.mark.skipif(standin.compiler() is None, reason=standin.SKIP)

HEAD = """
import os, signal, sys, time
import numpy as np, cupy, meshring as mr
from standin import Standin
standin = Standin()
standin.install()
def array(*shape, dtype="f4", fill=1):
    return standin.to_device(np.full(shape, fill, dtype))
def raised(kind, body):
    try:
        body()
    except kind as error:
        assert type(error) is kind, repr(error)
        print(f"{type(error).__name__}: {error}", flush=True)
        return error
    raise AssertionError(f"{kind.__name__} was not raised")
def quiet(seconds=20):
    # until the watchdog has seen it
    end = time.monotonic() + seconds
    while comm.poisoned is None:
        assert time.monotonic() < end
        time.sleep(0.002)
"""
INIT = "comm = mr.init('nccl', timeout=30)\nrank = comm.rank\n"


def job(
    folder: Path,
    body: str,
    n: int = 2,
    *,
    head: str = HEAD + INIT,
    version: int = 23203,
    **options: object,
) -> Result:
    """Run ranks on the stand-in; they must end with 0 and leave nothing."""
    env = standin.environment(folder, version, **options) | {"NCCL_HOSTID": "standin"}
    result = run_ranks(head + textwrap.dedent(body), n, env=env, timeout=60)
    assert result.left == []
    return result


def well(result: Result) -> str:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def lines_of(out: str, rank: int) -> str:
    return "\n".join(re.findall(rf"^\[{rank}\] (.*)$", out, re.M))


def test_an_error_of_nccl_has_all_its_parts(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            comm.all_reduce(array(8))
            comm.synchronize()
            if rank == 0:
                standin.faults("ncclAllReduce=2")
                error = raised(mr.BackendError, lambda: comm.all_reduce(array(8)))
                raised(mr.UsageError, lambda: comm.all_reduce(array(8)))
            else:
                comm.all_reduce(array(8))
                raised(mr.PeerLostError, lambda: comm.synchronize())
            """,
        )
    )
    first = lines_of(out, 0)
    for part in (
        "all_reduce #2 (rank 0/2): ncclAllReduce: ncclSystemError (2)",
        "NCCL says: ",
        "NCCL 2.32.3, ",
        "libnccl.so.2. ",
        "NCCL_SOCKET_IFNAME",
        "UsageError: all_reduce (rank 0/2): this communicator cannot be used any more",
    ):
        assert part in first, first
    assert "rank 0 (pid " in lines_of(out, 1)
    assert "script.py:" in lines_of(out, 1)


def test_an_asynchronous_error_is_told_by_the_next_call(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            standin.faults("ncclAllReduce=async:3")
            x = comm.all_reduce(array(8))
            quiet()
            raised(mr.BackendError, lambda: comm.barrier())
            raised(mr.UsageError, lambda: comm.barrier())
            comm.close()
            """,
            1,
        )
    )
    assert "all_reduce #1 (rank 0/1): " in out
    assert "ncclInternalError (3)" in out


def test_who_did_not_come(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            comm.all_reduce(array(8))
            comm.synchronize()
            if rank == 0:
                x = comm.all_reduce(array(4, 2), timeout=0.3)
                error = raised(mr.DeadlineError, lambda: comm.synchronize())
                assert error.ranks == (1,), error.ranks
            else:
                raised(mr.PeerLostError, lambda: comm.barrier())
            """,
        )
    )
    first = lines_of(out, 0)
    for part in (
        "DeadlineError: all_reduce #2 (rank 0/2) at ",
        "not done on the GPU after 0.",
        "rank 1 did not make this call",
        "rank 0 (pid ",
        "enqueued all_reduce(float32 (4, 2), op=sum) #2 at ",
        "rank 1 (pid ",
        "MISSING: ",
        "in barrier #2 at ",
    ):
        assert part in first, first


def test_everybody_came_and_the_gpu_hangs(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            standin.faults("ncclAllReduce=stall")
            work = comm.all_reduce(array(8), async_op=True, timeout=0.3)
            assert not work.done()
            raised(mr.DeadlineError, work.wait)
            assert work.done()
            raised(mr.DeadlineError, work.wait)
            raised(mr.UsageError, lambda: comm.all_reduce(array(8)))
            comm.close()
            """,
        )
    )
    for rank in range(2):
        text = lines_of(out, rank)
        # Whoever finds it second hears that the other has given up.
        assert "every rank has made this call" in text or "PeerLostError" in text, text


def test_a_killed_peer_is_named(tmp_path: Path) -> None:
    result = job(
        tmp_path,
        """
        comm.all_reduce(array(8))
        comm.synchronize()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.all_reduce(array(8))
        error = raised(mr.PeerLostError, lambda: comm.synchronize())
        assert error.ranks == (1,)
        """,
    )
    out = lines_of(result.stdout, 0)
    assert "all_reduce #2 (rank 0/2): rank 1 (pid " in out, result.stdout + result.stderr
    assert "SIGKILL" in out


def test_check_compares_before_the_launch(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            comm = mr.init("nccl", timeout=30, check=True)
            rank = comm.rank
            raised(mr.MismatchError, lambda: comm.all_reduce(array(8 + rank)))
            raised(mr.MismatchError, lambda: comm.all_reduce(array(8), op=["sum", "max"][rank]))
            raised(mr.MismatchError, lambda: comm.broadcast(array(8), root=rank))
            x = array(8)
            comm.all_reduce(x)
            comm.synchronize()
            assert standin.to_host(x).tolist() == [2] * 8
            assert not standin.violations()
            """,
            head=HEAD,
        )
    )
    for rank in range(2):
        text = lines_of(out, rank)
        for part in (
            "all_reduce #1 (rank ",
            "the ranks disagree in shape",
            "all_reduce(float32 (9,), op=sum) at ",
            "disagree in reduction",
            "disagree in root",
            "script.py:",
        ):
            assert part in text, text


def test_initialisation_has_a_deadline(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            standin.faults("ncclCommInitRankConfig=in_progress")
            raised(mr.DeadlineError, lambda: mr.init("nccl", timeout=1))
            """,
            1,
            head=HEAD,
        )
    )
    assert "init (rank 0/1): ncclCommInitRankConfig did not end within 1 s" in out, out


def test_initialisation_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            raised((mr.BackendError, mr.PeerLostError)[int(os.environ["MESHRING_RANK"])],
                   lambda: mr.init("nccl", timeout=30))
            """,
            head=HEAD,
            faults="ncclCommInitRankConfig/0=1",
        )
    )
    assert "ncclUnhandledCudaError (1)" in lines_of(out, 0)
    assert "rank 0 (pid " in lines_of(out, 1)


def test_a_thread_that_does_not_come_out_of_nccl_ends_the_process(tmp_path: Path) -> None:
    result = job(
        tmp_path,
        """
        standin.faults("ncclAllReduce=hang")
        comm.all_reduce(array(8), timeout=0.2)
        """,
        1,
    )
    assert result.returncode == 70, result.stderr
    assert "all_reduce #1 (rank 0/1): this rank's thread is inside NCCL" in result.stderr
    assert result.seconds > 5


def test_what_we_refuse_leaves_the_communicator_usable(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            raised(mr.UsageError, lambda: comm.all_reduce(array(8, dtype="i2")))
            raised(mr.UsageError, lambda: comm.reduce_scatter(array(8, dtype="c8"), "prod"))
            raised(mr.UsageError, lambda: comm.all_reduce(array(8, dtype="i4"), "mean"))
            raised(mr.UsageError, lambda: comm.all_reduce(array(8), out=np.ones(8, "f4")))
            raised(mr.UsageError, lambda: comm.all_reduce(np.ones(8, "f4"), out=array(8)))
            raised(mr.UsageError, lambda: comm.all_reduce(np.ones(8, "f4"), stream=0))
            raised(mr.UsageError, lambda: comm.all_reduce(array(8), stream="mine"))
            raised(mr.UsageError, lambda: comm.all_reduce(array(8), stream=2))
            raised(mr.UsageError, lambda: comm.register(array(8), window=True))
            raised(mr.UsageError, lambda: comm.all_reduce(array(4, 2).T))
            raised(mr.UsageError, lambda: comm.sendrecv(array(8), 0, 0, np.ones(8, "f4")))
            assert comm.all_reduce(np.ones(2)).tolist() == [1, 1]
            x = array(3)
            assert comm.all_reduce(x) is x
            comm.synchronize()
            """,
            1,
        )
    )
    for part in (
        "NCCL has no int16; reduce x.astype('int32')",
        "NCCL cannot do op='prod' of complex64",
        "op='mean' of int32 is not exact",
        "argument 'out' is on the host, and x is on GPU 0; give both in one place",
        "argument 'out' is on GPU 0, and x is on the host",
        "argument 'stream' is for arrays on a GPU, and x is on the host",
        "argument 'stream' is 'mine'; give a cupy.cuda.Stream",
        "not C-contiguous (shape (2, 4))",
        "the per-thread default stream means another stream in NCCL's own threads",
        "register (rank 0/1): argument 'x' is not in memory of meshring.nccl.allocator()",
        "arguments 'x' and 'out' are not in one place",
    ):
        assert part in out, out


def test_array_of_another_gpu(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            memory = cupy.cuda.UnownedMemory(1 << 20, 64, None, device_id=1)
            x = cupy.ndarray(16, "f4", memptr=cupy.cuda.MemoryPointer(memory, 0))
            raised(mr.UsageError, lambda: comm.all_reduce(x))
            """,
            1,
            gpus=2,
        )
    )
    assert "all_reduce (rank 0/1): argument 'x' is on GPU 1, and this rank communicates on" in out
    assert "with cupy.cuda.Device(0)" in out


def test_settings_that_the_library_is_too_old_for(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            settings = mr.nccl.Config(max_ctas=4, comm_name="mine")
            raised(mr.UsageError, lambda: mr.init("nccl", nccl=settings))
            raised(mr.UsageError, lambda: mr.init("nccl", nccl={"max_ctas": 4}))
            """,
            1,
            head=HEAD,
            version=21801,
        )
    )
    assert "the setting 'comm_name' needs NCCL 2.27.3 or newer; this is NCCL 2.18.1, " in out
    assert "argument 'nccl' is {'max_ctas': 4}; give a meshring.nccl.Config" in out


def test_a_library_that_is_too_old_or_none(tmp_path: Path) -> None:
    body = "raised(mr.UsageError, lambda: mr.init('nccl'))"
    out = well(job(tmp_path, body, 1, head=HEAD, nccl_version=21703))
    assert "is NCCL 2.17.3; 2.18.1 or newer is needed: pip install -U" in out
    body = f"os.environ['MESHRING_NCCL_LIBRARY'] = '/nowhere/libnccl.so.2'\n{body}"
    out = well(job(tmp_path, body, 1, head=HEAD))
    assert "backend 'nccl' cannot be used: NCCL was not found. MESHRING_NCCL_LIBRARY: " in out


def test_closing_does_not_wait_for_what_never_ends(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            standin.faults("ncclAllReduce=stall")
            comm = mr.init("nccl", timeout=30)
            comm.all_reduce(array(8))
            comm.abort()
            raised(mr.UsageError, lambda: comm.all_reduce(array(8)))
            start = time.monotonic()
            comm.close()
            comm.close()
            assert time.monotonic() - start < 20
            """,
            1,
        )
    )
    assert "since: abort() was called on this rank" in out


def test_a_peer_hears_of_an_abort(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            if rank == 0:
                comm.abort()
            else:
                comm.all_reduce(array(8))
                error = raised(mr.PeerLostError, lambda: comm.synchronize())
                assert error.ranks == (0,)
            """,
        )
    )
    assert "rank 0 (pid " in lines_of(out, 1)


def test_ranks_that_ask_for_different_backends(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            backend = ["nccl", "host"][int(os.environ["MESHRING_RANK"])]
            raised(mr.UsageError, lambda: mr.init(backend, timeout=30))
            """,
            head=HEAD,
        )
    )
    assert "init (rank 0/2): argument 'backend' is 'nccl', and rank 1 has 'host'" in out


def test_two_ranks_on_one_gpu_are_refused(tmp_path: Path) -> None:
    env = standin.environment(tmp_path)
    body = "raised(mr.UsageError, lambda: mr.init('nccl', timeout=30))\n"
    result = run_ranks(HEAD + body, 2, env=env, timeout=60)
    assert "ranks 0 and 1 share one GPU (stand-in GPU 0)" in well(result)


def test_work_of_the_gpu_that_fails_is_no_success(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            work = comm.all_reduce(array(8), async_op=True)
            standin.faults("cuEventQuery=700")
            raised(mr.BackendError, work.wait)
            """,
            1,
        )
    )
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in out or "(700)" in out, out


def test_parts_of_a_communicator(tmp_path: Path) -> None:
    """Splitting ends what runs first; a part that is dropped lets its calls end."""
    well(
        job(
            tmp_path,
            """
            x = comm.all_reduce(array(8))
            part = comm.split(0 if rank else None)
            assert (part is None) == (rank == 0)
            both = comm.split(0, -rank)
            assert both.rank == 1 - rank
            def work():
                inner = both.split(0)
                return inner.all_reduce(array(4))
            y = work()
            assert standin.to_host(y).tolist() == [2] * 4
            both.close()
            if part:
                part.close()
            assert not standin.violations()
            """,
        )
    )


def test_what_nccl_s_own_service_says_is_added(tmp_path: Path) -> None:
    out = well(
        job(
            tmp_path,
            """
            import socket, threading
            server = socket.create_server(("127.0.0.1", 0))
            os.environ["NCCL_RAS_ADDR"] = "127.0.0.1:%d" % server.getsockname()[1]
            def serve():
                talk, _ = server.accept()
                with talk:
                    assert talk.recv(100) == b"verbose status\\n"
                    talk.sendall(b"Job summary: 1 rank is behind\\n")
            threading.Thread(target=serve).start()
            standin.faults("ncclAllReduce=stall")
            comm.all_reduce(array(8), timeout=0.2)
            raised(mr.DeadlineError, comm.synchronize)
            server.close()
            """,
            1,
        )
    )
    assert "NCCL's RAS service says:" in out
    assert "Job summary: 1 rank is behind" in out
