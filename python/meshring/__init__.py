"""Collectives, meshes and sharded arrays for people who write NumPy and CuPy.

import numpy as np
import meshring as mr

comm = mr.init()
x = np.arange(8, dtype="f4") + comm.rank
comm.all_reduce(x)
"""

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
    from meshring.pipeline.action import PipelineOp
    from meshring.pipeline.execute import Pipeline, PipelineResult, build_pipeline, run_pipeline
    from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType
    from meshring.pipeline.stage import PipelineStage
    from meshring.pipeline.timeline import Timeline

__version__ = "0.1.0"

_ON_FIRST_USE = {  # what a program without pipelines need not import
    "Pipeline": "execute",
    "PipelineOp": "action",
    "PipelineResult": "execute",
    "PipelineSchedule": "schedule",
    "PipelineScheduleType": "schedule",
    "PipelineStage": "stage",
    "Timeline": "timeline",
    "build_pipeline": "execute",
    "run_pipeline": "execute",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'meshring' has no attribute {name!r}")
    value = getattr(import_module(f"meshring.pipeline.{_ON_FIRST_USE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BackendError",
    "Communicator",
    "DeadlineError",
    "MeshringError",
    "MismatchError",
    "PeerLostError",
    "Pipeline",
    "PipelineOp",
    "PipelineResult",
    "PipelineSchedule",
    "PipelineScheduleType",
    "PipelineStage",
    "StageError",
    "Timeline",
    "UsageError",
    "Work",
    "__version__",
    "build_pipeline",
    "init",
    "run_local",
    "run_pipeline",
]
