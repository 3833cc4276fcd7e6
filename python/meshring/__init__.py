"""Collectives, meshes and sharded arrays for people who write NumPy and CuPy.

import numpy as np
import meshring as mr

comm = mr.init()
x = np.arange(8, dtype="f4") + comm.rank
comm.all_reduce(x)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meshring._core import Work
from meshring.communicator import Communicator, init
from meshring.errors import (
    BackendError,
    DeadlineError,
    MeshringError,
    MismatchError,
    PeerLostError,
    StageError,
    UsageError,
)
from meshring.local import run_local

if TYPE_CHECKING:
    from meshring.context import CommunicationBackend, ModelParallelConfig, ModelParallelContext
    from meshring.mesh import DeviceMesh
    from meshring.partition import Partial, Replicate, Shard, Sharding, TensorPartition
    from meshring.pipeline.action import PipelineOp
    from meshring.pipeline.execute import Pipeline, PipelineResult, build_pipeline, run_pipeline
    from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType
    from meshring.pipeline.stage import PipelineStage
    from meshring.pipeline.timeline import Timeline
    from meshring.planner import Plan, plan
    from meshring.tensor import DistributedTensor
    from meshring.topology import Grid2D, Grid3D, Linear, Link, ModelParallelStrategy, Network

__version__ = "0.1.0"

# Imported when first asked for: programs that use collectives only start as fast as without.
_LATER = {
    "context": "CommunicationBackend ModelParallelConfig ModelParallelContext",
    "mesh": "DeviceMesh",
    "partition": "Partial Replicate Shard Sharding TensorPartition",
    "pipeline.action": "PipelineOp",
    "pipeline.execute": "Pipeline PipelineResult build_pipeline run_pipeline",
    "pipeline.schedule": "PipelineSchedule PipelineScheduleType",
    "pipeline.stage": "PipelineStage",
    "pipeline.timeline": "Timeline",
    "planner": "Plan plan",
    "tensor": "DistributedTensor",
    "topology": "Grid2D Grid3D Linear Link ModelParallelStrategy Network",
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names.split():
            found = getattr(import_module(f"meshring.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'meshring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BackendError",
    "CommunicationBackend",
    "Communicator",
    "DeadlineError",
    "DeviceMesh",
    "DistributedTensor",
    "Grid2D",
    "Grid3D",
    "Linear",
    "Link",
    "MeshringError",
    "MismatchError",
    "ModelParallelConfig",
    "ModelParallelContext",
    "ModelParallelStrategy",
    "Network",
    "Partial",
    "PeerLostError",
    "Pipeline",
    "PipelineOp",
    "PipelineResult",
    "PipelineSchedule",
    "PipelineScheduleType",
    "PipelineStage",
    "Plan",
    "Replicate",
    "Shard",
    "Sharding",
    "StageError",
    "TensorPartition",
    "Timeline",
    "UsageError",
    "Work",
    "__version__",
    "build_pipeline",
    "init",
    "plan",
    "run_local",
    "run_pipeline",
]
