"""Pipeline schedules: made, lowered, checked, simulated, drawn and run."""

from meshring.pipeline.action import OpKind, PipelineOp
from meshring.pipeline.costs import Costs
from meshring.pipeline.operations import OP, Operations
from meshring.pipeline.schedule import PipelineSchedule, PipelineScheduleType
from meshring.pipeline.semantics import Semantics
from meshring.pipeline.validate import Report

__all__ = [
    "OP",
    "Costs",
    "OpKind",
    "Operations",
    "PipelineOp",
    "PipelineSchedule",
    "PipelineScheduleType",
    "Report",
    "Semantics",
]
