"""Sharded save and load: a folder of .npy parts with a JSON manifest that is written last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meshring.errors import UsageError
from meshring.exchange import intersection
from meshring.mesh import DeviceMesh
from meshring.namespace import dtype_of
from meshring.partition import Placements, Replicate, Shard, Sharding
from meshring.redistribute import relative

if TYPE_CHECKING:
    from meshring.tensor_base import TensorBase

_MANIFEST = "manifest.json"
_FORMAT = "meshring-shards-1"


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in the file: ml_dtypes' are kept as unsigned integers of their size."""
    return (
        dtype if dtype.kind in "?biufc" and dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
    )


def save(t: TensorBase, path: Any) -> None:
    """Save a tensor. Collective over the mesh; every rank must see the same folder."""
    if t.sharding.partial is not None:
        raise UsageError(
            f"DistributedTensor.to_file: placements {t.sharding.by_name()} hold operands of a "
            "reduction; redistribute the Partial axis first"
        )
    mesh, rank = t.mesh, t.mesh.rank
    if rank not in mesh:
        return
    comm = mesh.comm() if mesh.size > 1 else None
    token = np.frombuffer(os.urandom(8), np.uint8).copy()
    if comm is not None:
        comm.broadcast(token)
    name = token.tobytes().hex()
    folder = Path(path)
    failed = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _writes(t.sharding, rank):
            local = t.local_shard.get() if t.xp is not np else t.local_shard
            local = np.ascontiguousarray(local).reshape(local.shape)
            _write(folder / f"{name}-{rank}.npy", local.view(_plain(local.dtype)))
    except OSError as error:
        failed = str(error)
    _all_fine(comm, failed, folder, rank)
    try:
        if rank == int(mesh.ranks.flat[0]):
            _finish(t, folder, name)
    except OSError as error:
        failed = str(error)
    _all_fine(comm, failed, folder, rank)


def _writes(sharding: Sharding, rank: int) -> bool:
    """Whether this rank's part is not another's too, and not empty."""
    at = sharding.mesh.coordinate(rank)
    first = all(
        isinstance(p, Shard) or c == 0 for p, c in zip(sharding.placements, at, strict=True)
    )
    return first and all(e > s for s, e in sharding.box(rank))


def _write(path: Path, local: Any) -> None:
    with path.open("wb") as file:
        np.save(file, local, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _all_fine(comm: Any, failed: str, folder: Path, rank: int) -> None:
    """Raise on every rank when one has failed, so that none waits for it."""
    wrong = np.array([bool(failed)])
    if comm is not None:
        wrong = comm.all_gather(wrong)
    if failed:
        raise OSError(f"DistributedTensor.to_file (rank {rank}): {failed}")
    if wrong.any():
        ranks = np.flatnonzero(wrong).tolist()
        raise OSError(
            f"DistributedTensor.to_file (rank {rank}): {folder}: places {ranks} of the mesh could "
            "not write; see their errors"
        )


def _finish(t: TensorBase, folder: Path, name: str) -> None:
    sharding, mesh = t.sharding, t.mesh
    parts = []
    for rank in mesh.ranks.ravel().tolist():
        if _writes(sharding, rank):
            parts.append({"file": f"{name}-{rank}.npy", "box": sharding.box(rank)})
    manifest = {
        "format": _FORMAT,
        "shape": sharding.shape,
        "dtype": str(t.dtype),
        "mesh": dict(zip(mesh.axis_names, mesh.shape, strict=True)),
        "placements": {
            n: [p.axis, p.split, p.sizes] if isinstance(p, Shard) else None
            for n, p in zip(mesh.axis_names, sharding.placements, strict=True)
        },
        "parts": parts,
    }
    text = json.dumps(manifest, indent=1)
    for part in parts:
        file = folder / str(part["file"])
        if not file.exists():
            raise OSError(
                f"{file} is not there; the ranks must share the file system, or save to "
                "folders of their own with t.local_shard"
            )
    temporary = folder / f"{name}.tmp"
    with temporary.open("w") as file_object:
        file_object.write(text)
        file_object.flush()
        os.fsync(file_object.fileno())
    os.replace(temporary, folder / _MANIFEST)
    kept = {str(part["file"]) for part in parts}
    for old in folder.glob("*-*.npy"):  # of the save before this one
        if old.name not in kept:
            old.unlink(missing_ok=True)


# ---- load -----------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _MANIFEST).read_text())
        if found["format"] != _FORMAT:
            raise UsageError(
                f"DistributedTensor.from_file: {folder} has format {found['format']!r}, this "
                f"version reads {_FORMAT!r}"
            )
        return {key: found[key] for key in ("shape", "dtype", "mesh", "placements", "parts")}
    except OSError as error:
        raise UsageError(
            f"DistributedTensor.from_file: {folder} is no saved tensor ({error.strerror}: "
            f"{_MANIFEST}); give the folder that to_file() wrote to"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"DistributedTensor.from_file: {folder / _MANIFEST} is damaged: {error}"
        ) from None


def _saved_placements(manifest: dict[str, Any], mesh: DeviceMesh) -> list[Any]:
    """The saved placements by axis name; sizes fall back to balanced where the length differs."""
    found: list[Any] = []
    for name, n in zip(mesh.axis_names, mesh.shape, strict=True):
        saved = manifest["placements"].get(name)
        if saved is None:
            found.append(Replicate())
            continue
        axis, split, sizes = saved
        fits = sizes is not None and len(sizes) == n
        found.append(Shard(axis, split, tuple(sizes) if fits else None))
    return found


def load(path: Any, mesh: DeviceMesh, placements: Placements, xp: Any) -> tuple[Sharding, Any, Any]:
    """Read this rank's part; return the sharding, the part (None off the mesh) and a sample."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    given = _saved_placements(manifest, mesh) if placements is None else placements
    sharding = Sharding(mesh, manifest["shape"], given)
    dtype = dtype_of(manifest["dtype"])
    if mesh.rank not in mesh:
        return sharding, None, xp.empty((0,), dtype)
    wanted = sharding.box(mesh.rank)
    local = np.empty([e - s for s, e in wanted], dtype)
    covered = 0
    for part in manifest["parts"]:
        box = tuple((int(s), int(e)) for s, e in part["box"])
        common = intersection(box, wanted)
        if common is not None:
            data = _open_part(folder / part["file"], box, dtype)
            place = local[relative(common, wanted)]
            place[...] = data[relative(common, box)].view(dtype)
            covered += place.size
    if covered != local.size:
        raise UsageError(
            f"DistributedTensor.from_file: {folder}: the parts give {covered} of the "
            f"{local.size} elements of this rank; the manifest is damaged"
        )
    return sharding, xp.asarray(local), xp.asarray(local)


def _open_part(path: Path, box: Any, dtype: np.dtype[Any]) -> Any:
    shape = tuple(e - s for s, e in box)
    try:
        data = np.load(path, mmap_mode="r" if shape else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"DistributedTensor.from_file: {path} cannot be read: {error}; the save is damaged"
        ) from None
    if data.shape != shape or data.dtype != _plain(dtype):
        raise UsageError(
            f"DistributedTensor.from_file: {path} holds {data.dtype} {data.shape}, the manifest "
            f"says {_plain(dtype)} {shape}; the save is damaged"
        )
    return data
