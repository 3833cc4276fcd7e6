"""The table of backends that init() chooses from and doctor prints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from meshring.errors import UsageError


@dataclass(frozen=True)
class BackendInfo:
    """One backend, and whether it can be used here."""

    name: str
    usable: bool
    reason: str
    """Why it can or cannot be used, in one sentence."""


def available() -> tuple[BackendInfo, ...]:
    """Return all backends of this version of meshring."""
    linux = sys.platform == "linux"
    return (
        BackendInfo(
            "host",
            linux,
            "shared memory between the processes of one host, or the threads of one process"
            if linux
            else f"needs Linux (memfd, futex, pidfd); this is {sys.platform}",
        ),
        _nccl(),
    )


def _nccl() -> BackendInfo:
    """Look for what the NCCL backend needs, without opening it."""
    if find_spec("cupy") is None:
        return BackendInfo(
            "nccl", False, "CuPy is not installed; pip install 'meshring[cu12]' (or [cu13])"
        )
    return BackendInfo("nccl", True, "arrays on GPUs, with CuPy and NVIDIA's NCCL")


def require(name: str) -> str:
    """Return the backend that `name` ("auto" included) stands for.

    Errors: UsageError when there is none of that name, or it cannot be used here.
    """
    table = {b.name: b for b in available()}
    chosen = "host" if name == "auto" else name
    if chosen not in table:
        raise UsageError(
            f"init: argument 'backend' is {name!r}; this version of meshring has "
            f"{', '.join(repr(b) for b in table)} and 'auto'"
        )
    if not table[chosen].usable and chosen != "nccl":  # of which all ranks are told together
        raise UsageError(f"init: backend {chosen!r} cannot be used: {table[chosen].reason}")
    return chosen
