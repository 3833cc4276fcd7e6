"""Pipelines whose values are CuPy arrays, over the stand-in NCCL: the same numbers as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import standin
from procs import run_ranks

pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
pytestmark = pytest.mark.skipif(standin.compiler() is None, reason=standin.SKIP)

# The stages compute with NumPy, as the stand-in has no kernels; what moves is on the "GPU".
JOB = """
import sys
import numpy as np
import meshring as mr
import standin_cupy
from pipeline_model import Dense, data, square_loss, without_pipeline

fake = standin_cupy.install()
kind, chunks, checkpoint = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"


class OnGpu(Dense):
    def forward(self, x):
        y, saved = super().forward(fake.to_host(x))
        return fake.to_device(y), saved

    def backward_input(self, saved, gy):
        gx, rest = super().backward_input(saved, fake.to_host(gy))
        return fake.to_device(gx), rest


def loss(y, target):
    value, gradient = square_loss(fake.to_host(y), target)
    return value, fake.to_device(gradient)


x, target = data(12)
batches, targets = np.split(x, 6), np.split(target, 6)
comm = mr.init("nccl", timeout=60)
count = comm.size * chunks
schedule = mr.PipelineSchedule(count, 6, kind, num_ranks=comm.size)
make = lambda number, total: OnGpu(number % count)
with mr.Pipeline(schedule, make, comm, loss=loss, gradient_checkpointing=checkpoint) as pipeline:
    for run in range(2):
        result = pipeline.run([fake.to_device(b) for b in batches], targets, timeout=60)
    stages = pipeline.stages
want, gradients, _ = without_pipeline(count, 12)
if result.losses:
    assert abs(result.loss - want) < 1e-9 * abs(want), (result.loss, want)
for number, stage in stages.items():
    assert np.allclose(stage.g, 2 * gradients[number % count]), number
sent = [c for c in fake.calls("ncclSend")]
assert sent and not fake.violations(), fake.violations()[:3]
assert len({c["stream"] for c in sent}) >= (2 if 0 < comm.rank < comm.size - 1 else 1)
print("well")
"""
FAIL = """
import numpy as np
import meshring as mr
import standin_cupy
from pipeline_model import Dense

fake = standin_cupy.install()


class Bad(Dense):
    def forward(self, x):
        if comm.rank == 1:
            raise ValueError("the stage is tired")
        return fake.to_device(super().forward(fake.to_host(x))[0]), None


comm = mr.init("nccl", timeout=60)
schedule = mr.PipelineSchedule(3, 4, "1f1b")
pipeline = mr.Pipeline(schedule, lambda n, t: Bad(n), comm, loss=lambda y, t: (0.0, y))
try:
    pipeline.run([fake.to_device(np.ones((2, 6)))] * 4, [None] * 4, timeout=60)
except mr.StageError as error:
    print("StageError", str(error).count("the stage is tired") > 0)
pipeline.close()
assert comm.all_reduce(np.ones(1)).tolist() == [3]
"""


@pytest.mark.parametrize(
    ("kind", "chunks", "checkpoint"),
    [
        ("1f1b", 1, False),
        ("1f1b", 1, True),
        ("interleaved-1f1b", 2, False),
        ("zb-h1", 1, False),
        ("zb-v", 2, False),
    ],
)
def test_the_same_numbers(kind: str, chunks: int, checkpoint: bool, tmp_path: Path) -> None:
    env = standin.environment(tmp_path) | {"NCCL_HOSTID": "standin"}
    result = run_ranks(JOB, 3, kind, str(chunks), str(checkpoint), env=env, timeout=90)
    assert result.stdout.count("well") == 3, result.stdout + result.stderr[-3000:]
    assert result.left == []


def test_a_stage_that_fails_stops_all(tmp_path: Path) -> None:
    env = standin.environment(tmp_path) | {"NCCL_HOSTID": "standin"}
    result = run_ranks(FAIL, 3, env=env, timeout=90)
    assert result.stdout.count("StageError True") == 3, result.stdout + result.stderr[-3000:]
    assert result.left == []
