"""ModelParallelConfig and ModelParallelContext on real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import meshring as mr
from pipeline_model import Dense, data, square_loss, without_pipeline
from procs import run_ranks

LIMIT = 20.0
S = mr.ModelParallelStrategy
X = np.arange(90.0).reshape(9, 10)


def config(**fields: Any) -> mr.ModelParallelConfig:
    return mr.ModelParallelConfig(**fields)


def test_defaults_are_the_seed_s() -> None:
    c = config()
    assert (c.num_devices, c.strategy, c.device_ids) == (1, S.PIPELINE, [0])
    assert (c.pipeline_depth, c.tensor_split_dim, c.gradient_checkpointing) == (None, None, False)
    assert c.comm_backend is mr.CommunicationBackend.AUTO
    names = {b.name for b in mr.CommunicationBackend}
    assert names == {"NCCL", "MPI", "GLOO", "CUSTOM", "HOST", "AUTO"}
    assert {s.name for s in S} == {"PIPELINE", "TENSOR", "HYBRID"}


def test_meshes_of_the_strategies() -> None:
    assert config(num_devices=4, strategy="tensor").mesh().shape == (2, 2)
    hybrid = config(num_devices=8, strategy=S.HYBRID, pipeline_depth=2).mesh()
    assert (hybrid.axis_names, hybrid.shape) == (("pp", "dp", "tp"), (2, 2, 2))
    assert config(num_devices=3, device_ids=[4, 2, 0]).mesh().device_at([1]) == 2


def test_the_seed_s_partition_on_four_ranks() -> None:
    def program(comm: mr.Communicator) -> None:
        with mr.ModelParallelContext(config(num_devices=4, strategy=S.TENSOR), comm) as ctx:
            t = ctx.partition_tensor(np.zeros((128, 512)), 0)
            assert t.local_shape() == (32, 512)
            assert t.partition is not None
            assert t.partition.start_idx == 32 * ctx.rank()
            assert t.requires_communication()
            assert (ctx.rank(), ctx.world_size()) == (comm.rank, 4)
        comm.barrier()  # it was the caller's: still open

    mr.run_local(program, 4, timeout=LIMIT)


def test_operations_on_all_ranks_and_along_an_axis() -> None:
    def program(comm: mr.Communicator) -> None:
        fields: Any = {"num_devices": 8, "strategy": S.HYBRID, "tensor_split_dim": 1}
        ctx = mr.ModelParallelContext(config(**fields, device_ids=list(range(7, -1, -1))), comm)
        assert ctx.device_id() == 7 - comm.rank
        t = ctx.partition_tensor(X)
        assert t.partition is not None
        assert t.partition.num_partitions == 8
        assert (ctx.all_gather(t) == X).all()
        along = ctx.partition_tensor(X, 0, axis="tp")
        assert along.local_shape() == ((5, 10), (4, 10))[comm.rank % 2]
        assert (ctx.all_gather(along) == X).all()
        total = ctx.reduce_scatter(X * ctx.rank(), 0)
        assert (ctx.all_gather(total) == 28 * X).all()
        assert total.local_shape()[0] == (2, 2, 2, 2, 1, 0, 0, 0)[comm.rank]
        pair = ctx.reduce_scatter(X, axis="dp")
        assert (ctx.all_gather(pair) == 2 * X).all()
        y = np.full(3, ctx.rank())
        assert ctx.all_reduce(y) is y
        assert y.tolist() == [28] * 3
        top = ctx.all_reduce(np.array([comm.rank]), "max", axis="pp")
        assert top[0] == 4 + comm.rank % 4
        assert ctx.broadcast(np.array([comm.rank]), 3)[0] == 3
        assert ctx.broadcast(np.array([comm.rank]), 1, axis="tp")[0] == comm.rank | 1
        partial = along.sum(axis=0)
        assert (ctx.all_reduce(partial, axis="tp").local_shard == X.sum(axis=0)).all()
        assert "HYBRID pp=2, dp=2, tp=2" in repr(ctx)
        tp = ctx.mesh.comm("tp")
        ctx.close()
        assert tp.closed
        assert not comm.closed

    mr.run_local(program, 8, timeout=LIMIT)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no devices": ({"num_devices": 0}, "num_devices is 0"),
    "strategy": ({"strategy": "data"}, "strategy is 'data'"),
    "ids": ({"num_devices": 3, "device_ids": [0, 1]}, "device_ids is [0, 1]"),
    "ids repeat": ({"num_devices": 2, "device_ids": [1, 1]}, "device_ids is [1, 1]"),
    "ids negative": ({"num_devices": 1, "device_ids": [-1]}, "device_ids is [-1]"),
    "ids are no numbers": ({"device_ids": ["0"]}, "device_ids is ['0']"),
    "depth": ({"num_devices": 8, "strategy": S.HYBRID, "pipeline_depth": 3}, "pipeline_depth is 3"),
    "depth 0": ({"pipeline_depth": 0}, "pipeline_depth is 0"),
    "depth of a line": ({"num_devices": 4, "pipeline_depth": 2}, "pipeline_depth is 2"),
    "split": ({"tensor_split_dim": "rows"}, "tensor_split_dim is 'rows'"),
    "checkpointing": ({"gradient_checkpointing": "no"}, "gradient_checkpointing is 'no'"),
    "backend": ({"comm_backend": "smoke"}, "comm_backend is 'smoke'"),
    "custom": ({"comm_backend": "custom"}, "backend_name is None"),
    "name without custom": ({"backend_name": "mine"}, "backend_name is 'mine'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_fields_are_named(name: str) -> None:
    fields, text = REFUSED[name]
    with pytest.raises(mr.UsageError) as caught:
        config(**fields)
    assert text in str(caught.value)


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(mr.UsageError) as caught:
        config(num_devices=2, device_ids=[0], pipeline_depth=3, tensor_split_dim=0.5)
    for field in ("device_ids", "pipeline_depth", "tensor_split_dim"):
        assert field in str(caught.value)


def test_bad_use_is_refused() -> None:
    def program(comm: mr.Communicator) -> None:
        with pytest.raises(mr.UsageError, match="meshring run -n 4"):
            mr.ModelParallelContext(config(num_devices=4), comm)
        with pytest.raises(mr.UsageError, match="'config'"):
            mr.ModelParallelContext(4, comm)  # type: ignore[arg-type]
        ctx = mr.ModelParallelContext(config(num_devices=2), comm)
        with pytest.raises(mr.UsageError, match="'split_dim'"):
            ctx.partition_tensor(X)
        with pytest.raises(mr.UsageError, match="'tp'"):
            ctx.partition_tensor(X, 0, axis="tp")
        with pytest.raises(mr.UsageError, match="'distributed'"):
            ctx.all_gather(X)  # type: ignore[arg-type]
        ctx.config.num_devices = 0
        with pytest.raises(mr.UsageError, match="num_devices is 0"):
            mr.ModelParallelContext(ctx.config, comm)

    mr.run_local(program, 2, timeout=LIMIT)


JOB = """
import numpy as np
import meshring as mr
config = mr.ModelParallelConfig(num_devices=4, strategy="tensor", comm_backend="host")
with mr.ModelParallelContext(config) as ctx:
    assert ctx.mesh.shape == (2, 2)
    assert ctx.all_reduce(np.array([ctx.rank()]), axis="cols")[0] in (1, 5)
    t = ctx.partition_tensor(np.arange(10), 0)
    assert (ctx.all_gather(t) == np.arange(10)).all()
assert ctx.comm.closed
try:
    mr.ModelParallelContext(mr.ModelParallelConfig(num_devices=4, comm_backend="custom",
                            backend_name="no such backend"))
except mr.UsageError as error:
    print("refused:", error)
"""


def test_a_job_of_processes() -> None:
    result = run_ranks(JOB, 4)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("refused:") == 4
    assert "'no such backend'" in result.stdout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pipeline_along_the_mesh(checkpointing: bool) -> None:
    """Depth and checkpointing come from the config; the Recompute operations are seen to run."""
    want, gradients, _ = without_pipeline(2, 8)
    x, target = data(8)

    def program(comm: mr.Communicator) -> None:
        c = config(
            num_devices=4,
            strategy=S.HYBRID,
            pipeline_depth=2,
            gradient_checkpointing=checkpointing,
        )
        with mr.ModelParallelContext(c, comm) as ctx:
            place = ctx.mesh.coordinate(comm.rank)[0]
            stage = Dense(place)
            pipeline = ctx.pipeline(stage, 4, loss=square_loss)
            result = pipeline.run(x, target)
            if place == 1:
                assert result.loss == pytest.approx(want, rel=1e-12)
            assert np.allclose(stage.g, gradients[place])
            recomputed = checkpointing and place == 0  # the last stage goes straight back
            assert stage.calls.count("forward") in ((8, 4) if checkpointing else (4,))
            assert not recomputed or stage.calls.count("forward") == 8
        with pytest.raises(mr.UsageError, match="closed"):
            pipeline.run(x, target)
        comm.barrier()

    mr.run_local(program, 4, timeout=LIMIT)


def test_a_pipeline_needs_a_pipeline_axis() -> None:
    def program(comm: mr.Communicator) -> None:
        with (
            mr.ModelParallelContext(config(num_devices=2, strategy="tensor"), comm) as ctx,
            pytest.raises(mr.UsageError, match="strategy TENSOR has no pipeline axis"),
        ):
            ctx.pipeline(Dense(0), 1)

    mr.run_local(program, 2, timeout=LIMIT)
