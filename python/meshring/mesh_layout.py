"""The layouts of meshes made from another: slices, merged and cut axes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshring.errors import UsageError
from meshring.mesh_checks import axis_names, integers

if TYPE_CHECKING:
    from meshring.mesh import DeviceMesh

Named = tuple[NDArray[np.int64], tuple[str, ...]]


def sliced(mesh: DeviceMesh, wanted: tuple[str, ...], at: Mapping[str, int]) -> Named:
    """Return ranks and names of the part along the wanted axes, at a place of each other axis."""
    kept = [mesh.axis_index(n) for n in wanted]
    if not kept or len(set(kept)) != len(kept):
        raise UsageError(f"DeviceMesh.slice: axes {wanted}; name one or more, each once")
    rest = [n for n in mesh.axis_names if n not in wanted]
    if set(at) != set(rest):
        raise UsageError(
            f"DeviceMesh.slice: argument 'at' names {sorted(at)}; a place is needed for each "
            f"of {rest}"
        )
    layout = mesh.ranks.transpose([*(mesh.axis_index(n) for n in rest), *kept])
    for name in rest:
        if not 0 <= at[name] < mesh.axis_size(name):
            raise UsageError(
                f"DeviceMesh.slice: {name}={at[name]} is outside, the axis has length "
                f"{mesh.axis_size(name)}"
            )
        layout = layout[at[name]]
    return layout, wanted


def merged(mesh: DeviceMesh, axes: Sequence[str], new: str) -> Named:
    """Return ranks and names with the named axes made one, at the place of the first of them."""
    together = [mesh.axis_index(n) for n in axes]
    if len(together) < 1 or len(set(together)) != len(together):
        raise UsageError(f"DeviceMesh.merge: axes {tuple(axes)}; name one or more, each once")
    before = [a for a in range(together[0]) if a not in together]
    after = [a for a in range(together[0] + 1, mesh.ndim) if a not in together]
    names = (*(mesh.axis_names[a] for a in before), new, *(mesh.axis_names[a] for a in after))
    shape = [mesh.shape[a] for a in before] + [-1] + [mesh.shape[a] for a in after]
    layout = mesh.ranks.transpose([*before, *together, *after]).reshape(shape)
    return layout, axis_names(names, shape)


def cut(mesh: DeviceMesh, axis: str, shape: Sequence[int], names: Sequence[str]) -> Named:
    """Return ranks and names with one axis cut into several, slowest first."""
    i = mesh.axis_index(axis)
    sizes = integers(shape, "shape")
    if math.prod(sizes) != mesh.shape[i]:
        raise UsageError(
            f"DeviceMesh.split: lengths {tuple(sizes)} multiply to {math.prod(sizes)}, and "
            f"axis {axis!r} has length {mesh.shape[i]}"
        )
    lengths = [*mesh.shape[:i], *sizes, *mesh.shape[i + 1 :]]
    all_names = (*mesh.axis_names[:i], *names, *mesh.axis_names[i + 1 :])
    return mesh.ranks.reshape(lengths), axis_names(all_names, lengths)
