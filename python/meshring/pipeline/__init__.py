"""Pipeline schedules: made, lowered, checked, simulated, drawn and run."""

from meshring.pipeline.action import OpKind, PipelineOp
from meshring.pipeline.operations import OP, Operations
from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType

__all__ = [
    "OP",
    "OpKind",
    "Operations",
    "PipelineOp",
    "PipelineSchedule",
    "PipelineScheduleType",
]
