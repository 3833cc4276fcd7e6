"""How a mesh is shown: the grid in text and HTML, and what of it crosses hosts. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshring.topology import ASSUMED, crossing_groups

if TYPE_CHECKING:
    from meshring.mesh import DeviceMesh

_ROWS, _COLUMNS, _PLANES = 16, 10, 8


def _cut(count: int, limit: int) -> list[int | None]:
    """Indices to show of `count`; None stands for what is left out."""
    if count <= limit:
        return list(range(count))
    half = limit // 2
    return [*range(half), None, *range(count - half, count)]


def _planes(mesh: DeviceMesh) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The 2-D planes of a mesh with their headings."""
    ranks = mesh.ranks if mesh.ndim > 1 else mesh.ranks[None]
    outer = ranks.shape[:-2]
    for flat in _cut(int(np.prod(outer)), _PLANES):
        if flat is None:
            yield "...", np.empty((0, 0), np.int64)
            continue
        at = np.unravel_index(flat, outer) if outer else ()
        heading = ", ".join(f"{n}={int(i)}" for n, i in zip(mesh.axis_names, at, strict=False))
        yield heading, ranks[at]


def _table(mesh: DeviceMesh, plane: NDArray[np.int64]) -> list[list[str]]:
    """Rows of cells of one plane, headings included."""
    columns = _cut(plane.shape[1], _COLUMNS)
    last = mesh.axis_names[-1]
    row_name = mesh.axis_names[-2] if mesh.ndim > 1 else ""
    rows = [["", *("..." if c is None else f"{last}={c}" for c in columns)]]
    for r in _cut(plane.shape[0], _ROWS):
        if r is None:
            rows.append(["...", *("" for _ in columns)])
        else:
            cells = ("..." if c is None else str(plane[r, c]) for c in columns)
            rows.append([f"{row_name}={r}" if row_name else "rank", *cells])
    return rows


def title(mesh: DeviceMesh) -> str:
    """Return the mesh in one line: its axes and their lengths."""
    axes = ", ".join(f"{n}={s}" for n, s in zip(mesh.axis_names, mesh.shape, strict=True))
    return f"DeviceMesh({axes})"


def grid(mesh: DeviceMesh) -> str:
    """Return the mesh as text: one plane of ranks for each place along the outer axes."""
    lines = [title(mesh)]
    for heading, plane in _planes(mesh):
        if heading:
            lines.append(heading)
        if plane.size == 0:
            continue
        rows = _table(mesh, plane)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        indent = "  " if heading else ""
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
            lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def grid_html(mesh: DeviceMesh) -> str:
    """Return the mesh as HTML tables, for notebooks."""
    parts = [f"<b>{html.escape(title(mesh))}</b>"]
    for heading, plane in _planes(mesh):
        if heading:
            parts.append(f"<div>{html.escape(heading)}</div>")
        if plane.size == 0:
            continue
        head, *body = _table(mesh, plane)
        cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
        rows = "".join(
            f"<tr><th>{html.escape(r[0])}</th>"
            + "".join(f"<td style='text-align:right'>{html.escape(c)}</td>" for c in r[1:])
            + "</tr>"
            for r in body
        )
        parts.append(f"<table><tr>{cells}</tr>{rows}</table>")
    return "".join(parts)


def explain(mesh: DeviceMesh, traffic: Mapping[str, float] | None = None) -> str:
    """Return a table of the axes: whose groups cross hosts, over which link, with what traffic."""
    network = mesh.network
    if network is None:
        where = "one host is assumed; give network= for the real ones"
    else:
        where = f"{mesh.size} ranks on {len(np.unique(network.codes()[mesh.ranks]))} hosts"
    rows = [["axis", "length", "a group, for example", "groups that cross hosts", "link"]]
    if traffic is not None:
        rows[0].append("traffic that crosses")
    crossing_names = []
    for axis, name in enumerate(mesh.axis_names):
        groups = mesh.size // mesh.shape[axis]
        across = crossing_groups(mesh.ranks, network.codes(), axis) if network else 0
        if across:
            crossing_names.append(name)
        first = np.moveaxis(mesh.ranks, axis, -1).reshape(groups, -1)[0].tolist()
        shown = [str(r) for r in (first if len(first) <= 8 else first[:7])]
        link = mesh.link(name)
        rate = f"{link.bandwidth / 1e9:g} GB/s, {link.latency * 1e6:g} us"
        if link is ASSUMED:
            rate += " (assumed)"
        group = ", ".join(shown) + (", ..." if len(first) > 8 else "")
        rows.append([name, str(mesh.shape[axis]), group, f"{across} of {groups}", rate])
        if traffic is not None:
            rows[-1].append(f"{traffic.get(name, 0.0) * across / groups:g}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{title(mesh)}: {where}"]
    lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    if network is not None:
        lines.append(
            f"Crosses hosts: {', '.join(crossing_names)}."
            if crossing_names
            else "Nothing crosses hosts."
        )
    return "\n".join(lines)
