"""shrink(): the ranks that stay go on, on the host and on the stand-in NCCL."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path

import numpy as np
import pytest

import meshring as mr
import standin
from procs import run_ranks

LIMIT = 20.0


def test_the_ranks_that_stay_are_dense_and_in_order() -> None:
    def program(comm: mr.Communicator) -> None:
        if comm.rank == 1:
            comm.barrier()
            return
        with comm.shrink([1]) as part:
            assert (part.rank, part.size) == ([0, -1, 1, 2][comm.rank], 3)
            assert part.world_ranks == (0, 2, 3)
            assert part.all_gather(np.array([comm.rank])).tolist() == [0, 2, 3]
            with part.shrink([0]) if part.rank else part as smaller:
                if part.rank:
                    assert smaller.all_reduce(np.ones(1)).tolist() == [2]
        comm.barrier()

    mr.run_local(program, 4, timeout=LIMIT)


def test_bad_arguments() -> None:
    def program(comm: mr.Communicator) -> None:
        for wrong, words in (
            ([comm.rank], "names this rank, "),
            ([7], r"argument 'exclude' is 7; the ranks of this communicator are 0 to 1"),
            (3, r"argument 'exclude' is 3; give a list of ranks"),
            ("0", r"argument 'exclude' is '0'; give a list of ranks"),
        ):
            with pytest.raises(mr.UsageError, match=words):
                comm.shrink(wrong)  # type: ignore[arg-type]
        part = comm.shrink([])
        assert part.all_reduce(np.ones(1)).tolist() == [2]
        part.close()

    mr.run_local(program, 2, timeout=LIMIT)


def test_a_survivor_that_does_not_come_is_named() -> None:
    def program(comm: mr.Communicator) -> None:
        if comm.rank == 2:
            with pytest.raises(mr.DeadlineError, match=r"shrink \(rank 2/3\): rank 1 did not come"):
                comm.shrink([0], timeout=0.2)
        comm.barrier()
        with comm.shrink([]) as part:
            part.barrier()

    mr.run_local(program, 3, timeout=LIMIT)


SURVIVE = """
import os, signal
import numpy as np, meshring as mr
{head}
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    {call}
except mr.PeerLostError as error:
    lost = error.ranks
assert lost == (1,), lost
part = comm.shrink(lost, timeout=20)
comm.close()
{after}
part.close()
"""


def survivors(head: str, call: str, after: str, env: dict[str, str] | None = None) -> None:
    script = SURVIVE.format(head=head, call=call, after=textwrap.dedent(after))
    result = run_ranks(script, 3, launcher_args=["--keep-going"], env=env, timeout=60)
    assert result.stdout.count("went on with 2 ranks") == 2, result.stdout + result.stderr
    assert result.left == []


def test_after_a_kill() -> None:
    after = """
    assert part.all_reduce(np.ones(3)).tolist() == [2, 2, 2]
    print("went on with", part.size, "ranks")
    """
    survivors("comm = mr.init(timeout=30)", "comm.barrier()", after)


@pytest.mark.parametrize("version", [21801, 23203])
def test_on_a_gpu_after_a_kill(version: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("pip install cupy-cuda12x")
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    head = """
from standin import Standin
standin = Standin()
standin.install()
comm = mr.init("nccl", timeout=30)
x = standin.to_device(np.ones(8, "f4"))
comm.all_reduce(x)
comm.synchronize()
"""
    after = """
    x = standin.to_device(np.ones(8, "f4"))
    part.all_reduce(x)
    part.synchronize()
    assert standin.to_host(x).tolist() == [2] * 8
    # Among ranks that are well NCCL's own shrink does it, where there is one.
    last = part.shrink([0]) if part.rank == 1 else None
    if last:
        y = standin.to_device(np.ones(2, "f4"))
        last.all_reduce(y)
        last.synchronize()
        used = bool(standin.calls("ncclCommShrink"))
        assert used == (mr.nccl.library().code >= 22703), used
        last.close()
    part.barrier()
    print("went on with", part.size, "ranks")
    """
    env = standin.environment(tmp_path, version) | {"NCCL_HOSTID": "standin"}
    survivors(head, "comm.all_reduce(x); comm.synchronize()", after, env)
