"""The case table on CuPy arrays: the NCCL backend on the stand-in libnccl.so.2, 1 to 4 processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import standin
from procs import run_ranks

pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
pytestmark = pytest.mark.skipif(standin.compiler() is None, reason=standin.SKIP)

JOB = """
import json, os, sys
import cases, nccl_ranks, meshring as mr
from standin import Standin
standin = Standin()
standin.install()
with mr.init("nccl", timeout=60) as comm:
    table = nccl_ranks.table(comm.size)
    found = cases.failures(comm, table, nccl_ranks.on_standin(standin))
    comm.synchronize(timeout=60)
    calls = sorted({call["function"] for call in standin.calls()})
with open(os.path.join(sys.argv[1], f"rank{comm.rank}.json"), "w") as f:
    json.dump([len(table), found, standin.violations(), calls], f)
"""
# An old library, one before the native all-to-all, and the newest.
VERSIONS = (21801, 22705, 23203)
NATIVE = {"ncclAlltoAll", "ncclGather", "ncclScatter"}


@pytest.mark.parametrize(
    ("n", "version"), [(1, 23203), (2, 21801), (2, 23203), (3, 22705), (4, 23203)]
)
def test_the_table(n: int, version: int, tmp_path: Path) -> None:
    env = standin.environment(tmp_path, version) | {"NCCL_HOSTID": "standin"}
    result = run_ranks(JOB, n, str(tmp_path), env=env, timeout=100)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.left == []
    for rank in range(n):
        cases, found, violations, calls = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert cases > 300
        assert not found, "\n".join(found[:10])
        assert not violations, violations[:5]
        assert (
            set(calls) >= NATIVE
            if version >= 22803 and n > 1
            else not NATIVE & set(calls) or n == 1
        )
        assert {"ncclAllReduce", "ncclBroadcast", "ncclReduce"} <= set(calls)
