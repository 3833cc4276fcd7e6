"""Collectives, meshes and sharded arrays for people who write NumPy and CuPy.

import numpy as np
import meshring as mr

comm = mr.init()
x = np.arange(8, dtype="f4") + comm.rank
comm.all_reduce(x)
"""

from meshring._core import Work
from meshring.communicator import Communicator, init
from meshring.context import CommunicationBackend, ModelParallelConfig, ModelParallelContext
from meshring.errors import (
    BackendError,
    DeadlineError,
    MeshringError,
    MismatchError,
    PeerLostError,
    UsageError,
)
from meshring.local import run_local
from meshring.mesh import DeviceMesh
from meshring.partition import Partial, Replicate, Shard, Sharding, TensorPartition
from meshring.planner import Plan, plan
from meshring.tensor import DistributedTensor
from meshring.topology import Grid2D, Grid3D, Linear, Link, ModelParallelStrategy, Network

__version__ = "0.1.0"

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
    "Plan",
    "Replicate",
    "Shard",
    "Sharding",
    "TensorPartition",
    "UsageError",
    "Work",
    "__version__",
    "init",
    "plan",
    "run_local",
]
