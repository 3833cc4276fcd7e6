"""The stand-in NCCL when things go wrong: faults, misuse and lost peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from procs import run_ranks, script
from standin import SKIP, compiler, environment
from standin_raw import HEAD, job

pytestmark = pytest.mark.skipif(compiler() is None, reason=SKIP)


def test_faults(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        s, x = n.stream, n.device(np.ones(8, "f4"))
        call = lambda: n.AllReduce(x, x, 8, 7, 0, n.comm, s)
        if rank == 0:
            assert [call() for _ in range(4)] == [0, 3, 3, 0]
        else:
            assert [call() for _ in range(2)] == [0, 0]
        n.standin.synchronize(s)
        if rank == 1:
            n.CommAbort(n.comm)
            return
        assert b"fault" in n.GetLastError(None)
        standin.clear()
        standin.faults("ncclGroupEnd=2x1")
        assert n.GroupStart() == 0 and call() == 0 and n.GroupEnd() == 2
        # A call that hangs goes on when it is released, or ends with the communicator.
        for end, code in ((standin.release, 4), (lambda: n.CommAbort(n.comm), 3)):
            standin.faults("ncclReduce=hang")
            codes = []
            stuck = threading.Thread(target=lambda: codes.append(n.Reduce(x, x, 8, 7, 0, 99, n.comm, s)))
            stuck.start()
            until(lambda: standin.hanging() == 1)
            assert len(standin.calls("ncclReduce")) == 1
            end()
            stuck.join(10)
            assert codes == [code]
            standin.clear()
    standin.faults("ncclAllReduce/0=3@1x2")
    threads(check, 2)
    os.unlink(os.environ["STANDIN_DIR"] + "/id")
    def late(n, rank):
        s, x = n.stream, n.device(np.ones(8, "f4"))
        call = lambda: n.AllReduce(x, x, 8, 7, 0, n.comm, s)
        for rule, error in (("stall", 0), ("lose:1", 6), ("async:3", 3)):
            standin.clear()
            standin.faults(f"ncclAllReduce={rule}")
            child = P()
            assert n.CommSplit(n.comm, 0, 0, ctypes.byref(child), None) == 0
            assert n.AllReduce(x, x, 8, 7, 0, child.value, s) == 0
            until(lambda: n.error(child.value) == error)
            assert (standin.dll.cuStreamQuery(P(s)) == 600) == (rule != "async:3")
            if error:
                assert n.AllReduce(x, x, 8, 7, 0, child.value, s) == error
            assert n.CommAbort(child.value) == 0
            n.standin.synchronize(s)
        standin.clear()
        standin.faults("cuStreamQuery=700")
        assert standin.dll.cuStreamQuery(P(s)) == 700
        try:
            standin.faults("ncclAllReduce=nonsense")
        except ValueError:
            pass
        else:
            raise AssertionError("nonsense was taken")
        standin.clear()
    threads(late, 1)
    made = UniqueId()
    standin.faults("ncclGetUniqueId=2")
    assert standin.dll.ncclGetUniqueId(ctypes.byref(made)) == 2
    """
    job(tmp_path, body)
    body = """
    made = UniqueId()
    assert standin.dll.ncclGetUniqueId(ctypes.byref(made)) == 2
    assert standin.dll.ncclGetUniqueId(ctypes.byref(made)) == 0
    """
    job(tmp_path, body, faults="ncclGetUniqueId=2x1")


def test_what_nccl_leaves_undefined_is_noticed(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        s, x = n.stream, n.device(np.ones(8, "f4"))
        def child():
            made = P()
            assert n.CommSplit(n.comm, 0, 0, ctypes.byref(made), None) == 0
            return made.value
        def expect(what, comm):
            until(lambda: n.error(comm) == 6)
            assert n.CommAbort(comm) == 0
            n.standin.synchronize(s)
            until(lambda: any(what in v for v in standin.violations()))
        other = child()
        assert n.AllReduce(x, x, 8 - rank, 7, 0, other, s) == 0
        expect("count 7", other)
        other = child()
        assert n.AllReduce(x, x, 8, 7 if rank else 2, 0, other, s) == 0
        expect("dtype int32", other)
        other = child()
        assert n.Broadcast(x, x, 8, 7, rank, other, s) == 0
        expect("broadcast count 8 dtype float32 op 0 root 1", other)
        other = child()
        if rank:
            assert n.Send(x, 8, 7, 0, other, s) == 0
        else:
            assert n.Recv(x, 4, 7, 1, other, s) == 0
        expect("receives 4 of float32 from rank 1, which sends 8", other)
        if rank == 0:
            assert n.AllReduce(x, x, 9, 7, 0, n.comm, s) == 4
            assert n.AllGather(x, x, 8, 7, n.comm, s) == 4
            assert "not inside one block" in standin.violations()[-1]
        # Overlap that is not the in-place form, then memory freed too early.
        big = n.device(np.ones(64, "f4"))
        assert n.AllReduce(big, big + 4, 8, 7, 0, n.comm, s) == 0
        n.standin.synchronize(s)
        assert any("overlap" in v for v in standin.violations())
        y, free = n.device(np.ones(8, "f4")), n.standin.stream()
        if rank == 0:
            assert n.AllReduce(y, y, 8, 7, 0, n.comm, s) == 0
            assert n.AllReduce(y, y, 8, 7, 0, n.comm, s) == 0
            n.standin.free(y, free)
            n.standin.synchronize(free)
            gate.set()
        else:
            assert gate.wait(20)
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 0
            assert n.AllReduce(x, x, 8, 7, 0, n.comm, s) == 0
        n.standin.synchronize(s)
        assert any("freed before" in v for v in standin.violations())
        # In the order of the stream, a free waits for what was enqueued before.
        before = len(standin.violations())
        z = n.device(np.ones(8, "f4"))
        assert n.AllReduce(z, x, 8, 7, 0, n.comm, s) == 0
        n.standin.free(z, s)
        assert (n.host(x, 8, "f4") == 2).all()
        assert len(standin.violations()) == before
        assert n.CommDestroy(n.comm) == 0
    gate = threading.Event()
    threads(check, 2)
    standin.clear()
    """
    job(tmp_path, body)


def test_a_killed_peer_is_a_remote_error(tmp_path: Path) -> None:
    body = """
    def check(n, rank):
        x = n.device(np.ones(8, "f4"))
        assert n.AllReduce(x, x, 8, 7, 0, n.comm, n.stream) == 0
        n.standin.synchronize(n.stream)
        if rank == 1:
            print("done", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        assert n.AllReduce(x, x, 8, 7, 0, n.comm, n.stream) == 0
        until(lambda: n.error() == 6)
        assert b"rank 1 has gone" in n.GetLastError(None)
        child = P()
        assert n.CommShrink(n.comm, (N * 1)(1), 1, ctypes.byref(child), None, 1) == 0
        n.standin.synchronize(n.stream)
        assert n.AllReduce(x, x, 8, 7, 0, child.value, n.stream) == 0
        assert (n.host(x, 8, "f4") == 2).all()
        assert n.CommAbort(n.comm) == 0 and n.CommDestroy(child.value) == 0
        print("survived", flush=True)
    process(check)
    """
    env = environment(tmp_path)
    result = run_ranks(script(body, HEAD), 2, launcher_args=["--keep-going"], env=env, timeout=40)
    assert "survived" in result.stdout, result.stderr
    assert result.left == []
    assert [p.name for p in tmp_path.iterdir()] == ["id"]
