"""Decides, once and for all ranks together, whether NCCL is used and on which GPUs."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any

import numpy as np

from meshring import _core, nccl
from meshring.errors import MeshringError, UsageError

# With one of these the user says that several ranks on one GPU are meant.
_SHARING = ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID")
INSTALL = "pip install 'meshring[cu12]' (CUDA 13: 'meshring[cu13]')"


def readiness(local_rank: int) -> dict[str, Any]:
    """Say what this rank has: its GPU and its NCCL, or in `why_off` what is missing.

    CuPy is not imported. Errors: none.
    """
    if find_spec("cupy") is None:
        return {"why_off": f"CuPy is not installed; {INSTALL}"}
    if os.environ.get("NCCL_COMM_BLOCKING", "0") != "0":
        return {"why_off": "NCCL_COMM_BLOCKING is set, and then no call has a deadline; unset it"}
    try:
        devices = _core.cuda_devices()
        library = nccl.library()
    except MeshringError as error:
        return {"why_off": str(error)}
    mine = devices[local_rank % len(devices)]
    return {
        "device": mine["index"],
        "name": mine["name"],
        "uuid": mine["uuid"],
        "nccl": library.code,
        "sharing": any(os.environ.get(name) for name in _SHARING),
        "why_off": "",
    }


def choose(
    comm: _core.Communicator,
    backend: str,
    local_rank: int,
    *,
    check: bool,
    config: nccl.Config,
    timeout: float,
) -> None:
    """Let all ranks tell what they have, and set the communicator accordingly. Collective.

    Errors: UsageError on every rank when they ask for different backends, or for "nccl" where a
    rank cannot.
    """
    mine = {"backend": backend}
    if backend == "host":
        mine["why_off"] = "this job was started with backend='host'"
    else:
        mine |= readiness(local_rank)
    rows = _tell_all(comm, mine, timeout)
    for rank, row in enumerate(rows):
        if row["backend"] != backend:
            raise UsageError(
                f"argument 'backend' is {backend!r}, and rank {rank} has {row['backend']!r}; "
                "give every rank the same"
            )
    why_off = _why_off(rows, comm.rank)
    if why_off and backend == "nccl":
        raise UsageError(f"backend 'nccl' cannot be used: {why_off}")
    device = -1 if why_off else int(mine["device"])
    comm._choose_device(device, why_off, backend == "nccl", check, config.given())
    if backend == "nccl":
        comm._open_device(timeout)
    comm._forget_calls()


def _why_off(rows: list[dict[str, Any]], me: int) -> str:
    order = [me, *(r for r in range(len(rows)) if r != me)]  # this rank's own trouble first
    for rank in order:
        if rows[rank]["why_off"]:
            return ("" if rank == me else f"rank {rank}: ") + str(rows[rank]["why_off"])
    versions = {row["nccl"] for row in rows}
    if len(versions) > 1:
        each = ", ".join(f"rank {r} {row['nccl']}" for r, row in enumerate(rows))
        return f"the ranks have different versions of NCCL ({each}); install the same everywhere"
    if all(row["sharing"] for row in rows):
        return ""
    owners: dict[str, int] = {}
    for rank, row in enumerate(rows):
        other = owners.setdefault(row["uuid"], rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} share one GPU ({row['name']}); start as many ranks as "
                "there are GPUs, or see docs/nccl.md for several ranks on one"
            )
    return ""


def _tell_all(
    comm: _core.Communicator, mine: dict[str, Any], timeout: float
) -> list[dict[str, Any]]:
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = comm.all_gather(np.array([len(text)]), timeout=timeout)
    everything = comm.all_gather(text, sizes=lengths.tolist(), timeout=timeout).tobytes()
    ends = np.cumsum(lengths)
    return [json.loads(everything[end - n : end]) for n, end in zip(lengths, ends, strict=True)]
