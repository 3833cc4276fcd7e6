"""ModelParallelConfig and ModelParallelContext: one object for a model-parallel program."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from meshring.communicator import Communicator, init
from meshring.errors import UsageError
from meshring.mesh import DeviceMesh
from meshring.namespace import as_array
from meshring.partition import Partial, Replicate, Shard
from meshring.pipeline.execute import Pipeline, build_pipeline
from meshring.pipeline.schedule import PipelineScheduleType
from meshring.tensor import DistributedTensor
from meshring.topology import ModelParallelStrategy, strategy_shape

Kind = TypeVar("Kind", bound=enum.Enum)


class CommunicationBackend(enum.Enum):
    """What carries the data; AUTO takes the best there is, CUSTOM a backend by its name."""

    NCCL = "nccl"
    MPI = "mpi"
    GLOO = "gloo"
    CUSTOM = "custom"
    HOST = "host"
    AUTO = "auto"


@dataclass
class ModelParallelConfig:
    """How a model is spread over devices. Checked as a whole when it is made.

    device_ids: one for each device, 0 to num_devices - 1 by default. pipeline_depth: the number of
    stages of HYBRID. tensor_split_dim: the axis that partition_tensor() and reduce_scatter() cut
    when they are given none. gradient_checkpointing: pipeline() keeps inputs only and recomputes.
    backend_name: the registered name of a CUSTOM backend.
    Errors: UsageError that names every field that is wrong.
    """

    num_devices: int = 1
    strategy: ModelParallelStrategy = ModelParallelStrategy.PIPELINE
    device_ids: Sequence[int] | None = None
    pipeline_depth: int | None = None
    tensor_split_dim: int | None = None
    gradient_checkpointing: bool = False
    comm_backend: CommunicationBackend = CommunicationBackend.AUTO
    backend_name: str | None = None

    def __post_init__(self) -> None:
        if self.device_ids is None and _is_count(self.num_devices):
            self.device_ids = list(range(self.num_devices))
        self.validate()

    def validate(self) -> None:
        """Check all fields; ModelParallelContext does so again."""
        problems: list[str] = []
        self.strategy = _member(ModelParallelStrategy, self.strategy, "strategy", problems)
        self.comm_backend = _member(
            CommunicationBackend, self.comm_backend, "comm_backend", problems
        )
        if not _is_count(self.num_devices):
            problems.append(f"num_devices is {self.num_devices!r}; give a number of devices >= 1")
        elif isinstance(self.strategy, ModelParallelStrategy):
            problems += self._device_problems()
            problems += self._depth_problems()
        if self.tensor_split_dim is not None and not _is_integer(self.tensor_split_dim):
            problems.append(
                f"tensor_split_dim is {self.tensor_split_dim!r}; give a tensor axis, or None"
            )
        if not isinstance(self.gradient_checkpointing, (bool, np.bool_)):
            problems.append(
                f"gradient_checkpointing is {self.gradient_checkpointing!r}; give True or False"
            )
        custom = self.comm_backend is CommunicationBackend.CUSTOM
        if custom != (self.backend_name is not None):
            problems.append(
                f"backend_name is {self.backend_name!r} and comm_backend {self.comm_backend}; a "
                "name goes with CUSTOM, and only with it"
            )
        if problems:
            raise UsageError("ModelParallelConfig: " + "; ".join(problems))

    def _device_problems(self) -> list[str]:
        try:
            ids = [i.__index__() for i in self.device_ids or ()]
        except (TypeError, AttributeError):
            ids = []
        if len(ids) != self.num_devices or len(set(ids)) != len(ids) or min(ids) < 0:
            return [
                f"device_ids is {self.device_ids!r}; {self.num_devices} different numbers >= 0 are "
                "needed, one for each of num_devices"
            ]
        return []

    def _depth_problems(self) -> list[str]:
        depth = self.pipeline_depth
        if depth is not None and not _is_count(depth):
            return [f"pipeline_depth is {depth!r}; give a number of stages >= 1, or None"]
        try:
            strategy_shape(self.strategy, self.num_devices, depth)
        except UsageError as error:
            return [str(error)]
        return []

    def mesh(self, comm: Communicator | None = None) -> DeviceMesh:
        """Return the mesh of the strategy: a line, a balanced 2-D grid, or pp x dp x tp."""
        return DeviceMesh.from_strategy(
            self.strategy,
            self.num_devices,
            comm,
            pipeline_depth=self.pipeline_depth,
            device_ids=self.device_ids,
        )


class ModelParallelContext:
    """A rank's place in a model-parallel job: its mesh, its communicator, tensors cut over them.

    Made on every rank, under `meshring run` or with a communicator. axis= of the methods names an
    axis of the mesh, and all ranks together when it is left out. Cuts are ceil-div, clamped.
    Errors: UsageError when the job has another number of ranks than config.num_devices.
    """

    def __init__(self, config: ModelParallelConfig, comm: Communicator | None = None) -> None:
        if not isinstance(config, ModelParallelConfig):
            raise UsageError(
                f"ModelParallelContext: argument 'config' is a {type(config).__name__}; give a "
                "ModelParallelConfig"
            )
        config.validate()
        self.config = config
        self._owned = comm is None
        if comm is None:
            comm = init(backend=config.backend_name or config.comm_backend.value)
        self.comm = comm
        """The communicator of all ranks."""
        if comm.size != config.num_devices:
            size, wanted = comm.size, config.num_devices
            if self._owned:
                comm.close()
            raise UsageError(
                f"ModelParallelContext (rank {comm.rank}/{size}): the job has {size} ranks, and "
                f"config.num_devices is {wanted}; start as many: meshring run -n {wanted} ..."
            )
        self.mesh = config.mesh(comm)
        """The mesh of the strategy, on the communicator."""
        self._all = self.mesh.flatten("all")
        self._pipelines: list[Pipeline] = []

    def rank(self) -> int:
        """Return the number of this rank."""
        return self.comm.rank

    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.comm.size

    def device_id(self) -> int:
        """Return the device of this rank, by config.device_ids."""
        return self.mesh.device_ids[self.comm.rank]

    def _split(
        self, split_dim: int | None, axis: str | None
    ) -> tuple[DeviceMesh, dict[str, Shard]]:
        dim = self.config.tensor_split_dim if split_dim is None else split_dim
        if dim is None:
            raise UsageError(
                "ModelParallelContext: argument 'split_dim' is None and so is "
                "config.tensor_split_dim; give one of them"
            )
        shard = Shard(dim, "ceil")
        if axis is None:
            return self._all, {"all": shard}
        self.mesh.axis_index(axis)
        return self.mesh, {axis: shard}

    def _along(self, axis: str | None) -> Communicator:
        return self.comm if axis is None else self.mesh.comm(axis)

    def partition_tensor(
        self, tensor: Any, split_dim: int | None = None, axis: str | None = None
    ) -> DistributedTensor:
        """Return this rank's part of a tensor that every rank has. Without communication."""
        mesh, placements = self._split(split_dim, axis)
        return DistributedTensor.shard(tensor, mesh, placements)

    def all_gather(self, distributed: DistributedTensor) -> Any:
        """Return the whole array of a distributed tensor, on every rank. Source: MPI_Allgatherv."""
        if not isinstance(distributed, DistributedTensor):
            raise UsageError(
                f"ModelParallelContext.all_gather: argument 'distributed' is a "
                f"{type(distributed).__name__}; a DistributedTensor is needed, as "
                "partition_tensor() returns; for arrays use ctx.comm.all_gather"
            )
        return distributed.gather()

    def reduce_scatter(
        self, tensor: Any, split_dim: int | None = None, axis: str | None = None
    ) -> DistributedTensor:
        """Add up the tensors of the ranks and keep this rank's part. Source: ncclReduceScatter."""
        mesh, placements = self._split(split_dim, axis)
        tensor = as_array(tensor, "ModelParallelContext.reduce_scatter", "tensor")
        (name,) = placements
        whole = DistributedTensor.from_local(tensor, mesh, {name: Partial()}, tensor.shape)
        return whole.redistribute(placements)

    def all_reduce(self, tensor: Any, op: str = "sum", axis: str | None = None) -> Any:
        """Add up an array over the ranks, in place; return it. Source: ncclAllReduce.

        Of a DistributedTensor, the reductions that are still to be done are, in a new tensor.
        """
        if isinstance(tensor, DistributedTensor):
            if axis is not None:
                tensor.mesh.axis_index(axis)
            return tensor.redistribute(
                [
                    Replicate() if isinstance(p, Partial) and axis in (None, n) else p
                    for n, p in zip(tensor.mesh.axis_names, tensor.placements, strict=True)
                ]
            )
        return self._along(axis).all_reduce(tensor, op)

    def broadcast(self, tensor: Any, root: int = 0, axis: str | None = None) -> Any:
        """Copy an array of rank `root` (its place, along an axis) to all, in place; return it."""
        return self._along(axis).broadcast(tensor, root)

    def pipeline(
        self,
        stages: Any,
        num_microbatches: int,
        schedule_type: str | PipelineScheduleType = "1f1b",
        **options: Any,
    ) -> Pipeline:
        """Make a Pipeline along the mesh's pp axis: one rank a stage, or two where the kind folds.

        config.gradient_checkpointing adds the Recompute operations. stages and options: as of
        Pipeline, for example loss= or data_parallel=ctx.mesh.comm("dp"). All ranks call it; the
        context closes it. Errors: UsageError for a strategy without a pp axis, and those of
        Pipeline.
        """
        if "pp" not in self.mesh.axis_names:
            raise UsageError(
                f"ModelParallelContext.pipeline (rank {self.rank()}/{self.world_size()}): strategy "
                f"{self.config.strategy.name} has no pipeline axis; take PIPELINE or HYBRID"
            )
        made = build_pipeline(
            stages,
            num_microbatches,
            schedule_type,
            comm=self.mesh.comm("pp"),
            depth=self.config.pipeline_depth,
            gradient_checkpointing=self.config.gradient_checkpointing,
            **options,
        )
        self._pipelines.append(made)
        return made

    def close(self) -> None:
        """Close pipelines, the mesh's communicators, then the job's if the context joined it."""
        for made in self._pipelines:
            made.close()
        self.mesh.close()
        self._all.close()
        if self._owned:
            self.comm.close()

    def __enter__(self) -> ModelParallelContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        axes = ", ".join(
            f"{n}={s}" for n, s in zip(self.mesh.axis_names, self.mesh.shape, strict=True)
        )
        kind = self.config.strategy.name
        return f"<meshring.ModelParallelContext {kind} {axes}, rank {self.rank()}>"


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _member(kind: type[Kind], value: Any, name: str, problems: list[str]) -> Kind:
    """A member of an enum from itself or its name."""
    if isinstance(value, str):
        for member in kind:
            if value.lower() in (member.value, member.name.lower()):
                return member
    if not isinstance(value, kind):
        problems.append(f"{name} is {value!r}; give one of {', '.join(m.name for m in kind)}")
    found: Kind = value
    return found
