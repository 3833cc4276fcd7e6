"""Sharded save and load: other numbers of ranks, damage, and what happens on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshring as mr
from procs import run_ranks

LIMIT = 20.0
X = np.arange(63.0).reshape(9, 7)
T = mr.DistributedTensor
R, S0, S1 = mr.Replicate(), mr.Shard(0), mr.Shard(1)


def save(path: Path, x: Any, shape: tuple[int, ...], placements: Any) -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(shape, ("dp", "tp")[-len(shape) :], comm)
        T.shard(x, mesh, placements).to_file(path)

    mr.run_local(program, int(np.prod(shape)), timeout=LIMIT)


def check_load(path: Path, x: Any, shape: tuple[int, ...], placements: Any) -> list[Any]:
    def program(comm: mr.Communicator) -> Any:
        mesh = mr.DeviceMesh(shape, ("dp", "tp")[-len(shape) :], comm)
        t = T.from_file(path, mesh, placements)
        part = x[t.sharding.region(comm.rank)]
        assert t.dtype == x.dtype
        assert t.local_shard.shape == part.shape
        assert (t.local_shard == part).all()
        return t.placements

    return mr.run_local(program, int(np.prod(shape)), timeout=LIMIT)


def test_three_ranks_load_what_four_saved(tmp_path: Path) -> None:
    save(tmp_path / "t", X, (2, 2), {"dp": 0, "tp": 1})
    files = sorted(p.name for p in (tmp_path / "t").iterdir())
    assert len(files) == 5
    assert "manifest.json" in files
    for placements in (0, 1, R, mr.Shard(0, sizes=(9, 0, 0))):
        check_load(tmp_path / "t", X, (3,), placements)
    assert check_load(tmp_path / "t", X, (3,), None)[0] == (S1,)  # as saved along "tp"
    assert check_load(tmp_path / "t", X, (1, 1), None)[0] == (S0, S1)


placement = st.one_of(st.just(R), st.builds(mr.Shard, st.integers(0, 1)))


@settings(max_examples=15)
@given(
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(placement, placement),
    placement,
    st.sampled_from(["f8", "?", "c8", "bfloat16"]),
)
def test_any_placement_to_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    saved: Any,
    loaded: Any,
    dtype: str,
) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = np.arange(shape[0] * shape[1]).reshape(shape).astype(kind)
    path = tmp_path_factory.mktemp("t")
    save(path, x, (2, 2), saved)
    check_load(path, x, (3,), loaded)


def test_only_the_parts_that_are_needed_are_read(tmp_path: Path) -> None:
    save(tmp_path, X, (3,), 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / manifest["parts"][2]["file"]).unlink()

    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(3, "tp", comm)
        if comm.rank < 2:
            assert (T.from_file(tmp_path, mesh).local_shard == X[3 * comm.rank :][:3]).all()
        else:
            with pytest.raises(mr.UsageError, match="cannot be read"):
                T.from_file(tmp_path, mesh)

    mr.run_local(program, 3, timeout=LIMIT)


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, X, (2, 2), (S0, S1))
    save(tmp_path, -X, (2,), 1)
    check_load(tmp_path, -X, (3,), 0)
    assert len(list(tmp_path.iterdir())) == 3


def test_scalars_and_ranks_off_the_mesh(tmp_path: Path) -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(2, "a", comm, ranks=[2, 1])
        mesh.open()
        T.shard(np.array(2.5), mesh).to_file(tmp_path)
        comm.barrier()
        t = T.from_file(tmp_path, mesh)
        assert (t.local_shard is None) == (comm.rank == 0)
        assert t.shape == ()
        assert comm.rank == 0 or t.local_shard == 2.5

    mr.run_local(program, 3, timeout=LIMIT)


def test_a_rank_that_cannot_write_is_known_to_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def program(comm: mr.Communicator) -> None:
        path = tmp_path / ("good" if comm.rank else "file")
        t = T.shard(X, mr.DeviceMesh(3, "tp", comm), 0)
        with pytest.raises(OSError, match="file" if comm.rank == 0 else "see their errors"):
            t.to_file(path)
        with pytest.raises(OSError, match=r"share the file system|could not write"):
            t.to_file(tmp_path / str(comm.rank))

    mr.run_local(program, 3, timeout=LIMIT)


def _broken(change: Callable[[Path, dict[str, Any]], object]) -> Callable[[Path], None]:
    def breaks(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(path, manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return breaks


def _truncate(path: Path, manifest: dict[str, Any]) -> None:
    file = path / manifest["parts"][0]["file"]
    file.write_bytes(file.read_bytes()[:-8])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no saved tensor"),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "damaged"),
    "key missing": (_broken(lambda p, m: m.pop("parts")), "damaged: 'parts'"),
    "other format": (_broken(lambda p, m: m.update(format="x")), "'meshring-shards-1'"),
    "part missing": (_broken(lambda p, m: m["parts"].pop()), "the manifest is damaged"),
    "other shape": (_broken(lambda p, m: m["parts"][0].update(box=[[0, 9], [0, 4]])), "damaged"),
    "other dtype": (_broken(lambda p, m: m.update(dtype="float32")), "holds float64"),
    "truncated": (_broken(_truncate), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed(name: str, tmp_path: Path) -> None:
    save(tmp_path, X, (2,), 0)
    change, text = DAMAGE[name]
    change(tmp_path)
    with pytest.raises(mr.UsageError) as caught:
        T.from_file(tmp_path, mr.DeviceMesh(1, "x"))
    assert text in str(caught.value)


PROCESSES = """
import sys
import numpy as np
import meshring as mr
comm = mr.init()
mesh = mr.DeviceMesh(comm.size, "x", comm)
x = np.arange(1000.0).reshape(50, 20)
if sys.argv[1] == "save":
    mr.DistributedTensor.shard(x, mesh, 0).to_file(sys.argv[2])
else:
    t = mr.DistributedTensor.from_file(sys.argv[2], mesh, 1)
    assert (t.gather() == x).all()
    print("same")
"""


def test_between_jobs_of_processes(tmp_path: Path) -> None:
    assert run_ranks(PROCESSES, 4, "save", str(tmp_path)).returncode == 0
    result = run_ranks(PROCESSES, 3, "load", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("same") == 3
