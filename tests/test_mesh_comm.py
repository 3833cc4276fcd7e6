"""Communicators along the axes of a mesh, with ranks as threads and as processes."""

from __future__ import annotations

import numpy as np
import pytest

import meshring as mr
from procs import run_ranks

LIMIT = 20.0


def test_groups_along_axes_in_any_order_of_asking() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 3), ("dp", "tp"), comm, ranks=[5, 4, 3, 2, 1, 0])
        names = ("dp", "tp") if comm.rank % 2 else ("tp", "dp")
        found = {name: mesh.comm(name) for name in names}
        dp, tp = mesh.coordinate()
        assert (found["dp"].rank, found["tp"].rank) == (dp, tp)
        for axis, name in enumerate(mesh.axis_names):
            line = np.moveaxis(mesh.ranks, axis, -1)[(tp, dp)[axis]].tolist()
            assert found[name].world_ranks == tuple(line)
            assert mesh.comm(name) is found[name]
            assert mesh[name].comm(name) is found[name]
        everyone = mesh.comm()
        assert everyone.world_ranks == (5, 4, 3, 2, 1, 0)
        assert mesh.comm("tp", "dp") is everyone
        assert mesh.rank == comm.rank
        mesh.close()
        assert found["dp"].closed
        assert not comm.closed

    mr.run_local(program, 6, timeout=LIMIT)


def test_the_whole_of_a_plain_mesh_is_its_communicator() -> None:
    def program(comm: mr.Communicator) -> None:
        with mr.DeviceMesh((2, 2, 1), ("a", "b", "c"), comm) as mesh:
            assert mesh.comm() is comm
            assert mesh.comm("a", "c").size == 2
            assert mesh["b", "a"].comm("b") is mesh.comm("b")
            assert mesh.flatten().comm("a_b_c") is comm

    mr.run_local(program, 4, timeout=LIMIT)


def test_ranks_outside_take_part_by_open() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh(2, "pair", comm, ranks=[3, 1])
        if comm.rank in (1, 3):
            total = mesh.comm("pair").all_gather(np.array([comm.rank]))
            assert total.tolist() == [3, 1]
            assert mesh.comm() is mesh.comm("pair")
        else:
            mesh.open()
            with pytest.raises(mr.UsageError, match="not on"):
                mesh.comm("pair")
        comm.barrier()

    mr.run_local(program, 4, timeout=LIMIT)


def test_different_axes_on_different_ranks_are_noticed() -> None:
    def program(comm: mr.Communicator) -> None:
        mesh = mr.DeviceMesh((2, 2, 2), ("a", "b", "c"), comm)
        mesh.open()
        with pytest.raises(mr.UsageError, match="came to a group of 4"):
            mesh.comm("a", "b" if comm.rank < 3 else "c")

    mr.run_local(program, 8, timeout=LIMIT)


def test_a_communicator_of_another_size_is_refused() -> None:
    def program(comm: mr.Communicator) -> None:
        for shape in ((2, 4), (1, 2)):
            with pytest.raises(mr.UsageError, match="meshring run -n"):
                mr.DeviceMesh(shape, ("a", "b"), comm)

    mr.run_local(program, 4, timeout=LIMIT)


OPEN_AT_EXIT = """
import numpy as np
import meshring as mr
comm = mr.init()
mesh = mr.DeviceMesh((2, 2), ("dp", "tp"), comm)
assert mesh.comm("tp").all_reduce(np.ones(1))[0] == 2
print("fine")
"""


def test_meshes_need_no_close() -> None:
    result = run_ranks(OPEN_AT_EXIT, 4)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("fine") == 4
    result = run_ranks(OPEN_AT_EXIT + "comm.close()\nassert mesh.comm('tp').closed\n", 4)
    assert (result.returncode, result.stderr) == (0, "")
