"""The checks of a mesh's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshring.communicator import Communicator
from meshring.errors import UsageError


def integers(given: Any, argument: str, least: int | None = 1) -> list[int]:
    """Return a list of plain integers from one or several, checked."""
    values = [given] if isinstance(given, (int, np.integer)) else given
    floor = 0 if argument == "device_ids" else least
    try:
        found = [v.__index__() for v in values]
    except (TypeError, AttributeError):
        found = []
    bad = isinstance(given, (str, bool)) or not found
    if bad or (floor is not None and min(found) < floor):
        raise UsageError(
            f"DeviceMesh: argument {argument!r} is {given!r}; integers"
            f"{'' if floor is None else f' >= {floor}'} are needed, at least one"
        )
    return found


def axis_names(given: Any, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the axes, checked."""
    if given is None and len(shape) == 1:
        return ("x",)
    names: tuple[Any, ...] = (given,) if isinstance(given, str) else tuple(given or ())
    if len(names) != len(shape) or not all(isinstance(n, str) and n for n in names):
        raise UsageError(
            f"DeviceMesh: argument 'axis_names' is {given!r}; {len(shape)} names are needed, one "
            f"for each axis of the shape {tuple(shape)}"
        )
    if len(set(names)) != len(names):
        raise UsageError(f"DeviceMesh: axis names {names} repeat; give each axis a name of its own")
    return names


def check_ranks(layout: NDArray[Any], shape: Iterable[int], own: bool) -> None:
    """Refuse ranks that repeat or do not fill the shape; `own`: not the default."""
    size = math.prod(shape)
    whole = layout.dtype.kind in "iu"
    if layout.size != size or not whole or layout.min() < 0 or np.unique(layout).size != size:
        raise UsageError(
            f"DeviceMesh: argument 'ranks' holds {layout.size} entries of {layout.dtype}; {size} "
            "different ranks >= 0 are needed"
        )
    if own and layout.ndim > 1 and layout.shape != tuple(shape):
        raise UsageError(
            f"DeviceMesh: argument 'ranks' has shape {layout.shape}, and the mesh {tuple(shape)}"
        )


def checked_devices(given: Any, size: int) -> tuple[int, ...]:
    """Return the devices, one of its own for each place."""
    devices = tuple(integers(given, "device_ids"))
    if len(devices) != size or len(set(devices)) != size:
        raise UsageError(
            f"DeviceMesh: argument 'device_ids' has {len(devices)} entries, {len(set(devices))} of "
            f"them different, and the mesh {size} places; give a device of its own for each place"
        )
    return devices


def check_communicator(
    comm: Communicator, layout: NDArray[Any], shape: Sequence[int], own: bool
) -> None:
    """Refuse a communicator that has not the ranks of the mesh."""
    if not isinstance(comm, Communicator):
        raise UsageError(
            f"DeviceMesh: argument 'comm' is a {type(comm).__name__}; give what meshring.init() "
            "returned"
        )
    size, most = layout.size, int(layout.max())
    if most >= comm.size or (not own and size != comm.size):
        raise UsageError(
            f"DeviceMesh (rank {comm.rank}/{comm.size}): the mesh {tuple(shape)} has {size} "
            f"places, to rank {most}, and there are {comm.size} ranks; start {most + 1} with "
            f"meshring run -n {most + 1}, change the shape, or say which ranks with ranks="
        )
