"""Which launcher started this process, and what it says of rank and size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

# Launchers in the order in which they are believed; the first that gives rank and size wins.
# (name, rank, size, local rank)
_LAUNCHERS = (
    ("meshring run", "MESHRING_RANK", "MESHRING_SIZE", "MESHRING_RANK"),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    (
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    ("mpirun (MPICH, Hydra)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Detected:
    """What the environment variables say."""

    launcher: str
    """Name of the launcher that is believed, or "none"."""
    rank: int
    size: int
    local_rank: int
    believed: dict[str, str] = field(default_factory=dict)
    """The variables that rank and size come from."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Variables of other launchers that are set too."""


def detect(environ: Mapping[str, str] | None = None) -> Detected:
    """Read the launcher's variables; the innermost launcher, `meshring run`, is believed first.

    Errors: ValueError when a believed variable is not a number in range.
    """
    env = os.environ if environ is None else environ
    found: Detected | None = None
    ignored: dict[str, str] = {}
    for name, rank_key, size_key, local_key in _LAUNCHERS:
        keys = [k for k in (rank_key, size_key, local_key) if k in env]
        if found is None and rank_key in env and size_key in env:
            rank, size = _number(env, rank_key), _number(env, size_key)
            if size < 1 or not 0 <= rank < size:
                raise ValueError(
                    f"{rank_key}={rank} and {size_key}={size} make no sense together: "
                    "0 <= rank < size is needed"
                )
            local = _number(env, local_key) if local_key in env else rank
            found = Detected(name, rank, size, local, {k: env[k] for k in keys}, ignored)
        elif name != "srun" or len(keys) == 3:
            ignored.update({k: env[k] for k in keys})
    return found if found is not None else Detected("none", 0, 1, 0, {}, ignored)


def _number(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except ValueError:
        raise ValueError(f"{key}={env[key]!r} is not a number") from None
