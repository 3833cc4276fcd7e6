"""The extension's own way to the kernels, on the stand-in driver: load, launch, fall back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import standin

PROGRAM = """\
import sys
import numpy as np
import standin
from meshring import _core

fake = standin.Standin()
refused = _core.kernels_refused(0)
widths, rows = [512, 0, 256, 130], 40
pitch = sum(widths)
stream = fake.stream()
array, packed, back = (fake.allocate(rows * pitch, stream) for _ in range(3))

def bytes_at(address):
    import ctypes
    return np.ctypeslib.as_array((ctypes.c_uint8 * (rows * pitch)).from_address(address))

bytes_at(array)[:] = np.random.default_rng(1).integers(0, 256, rows * pitch, np.uint8)
bytes_at(back)[:] = 0
fake.clear()
_core._copy_blocks(array, packed, rows, widths, True, stream=stream)
_core._copy_blocks(back, packed, rows, widths, False, stream=stream)
fake.synchronize(stream)
blocks = np.split(bytes_at(array).reshape(rows, pitch), np.cumsum(widths)[:-1], 1)
assert bytes_at(packed).tobytes() == b"".join(b.tobytes() for b in blocks)
assert bytes_at(back).tobytes() == bytes_at(array).tobytes()
print([c["function"] for c in fake.calls() if "Launch" in c["function"] or "2D" in c["function"]])
print(fake.violations(), repr(refused))
for address in (array, packed, back):
    fake.free(address, stream)
fake.destroy(stream)
"""


def run(folder: Path, **options: object) -> tuple[list[str], str]:
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | standin.environment(folder, **options),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_two_launches(tmp_path: Path) -> None:
    from meshring import _core

    if not _core.kernels_info()["built"]:
        pytest.skip("built without kernels: pip install 'nvidia-cuda-nvrtc-cu12==12.0.*', build")
    (enqueued, rest), said = run(tmp_path)
    assert enqueued == "['cuLaunchKernel', 'cuLaunchKernel']"
    assert rest == "[] ''"
    assert said == ""


def test_a_driver_too_old_for_the_kernels_copies(tmp_path: Path) -> None:
    (enqueued, rest), said = run(tmp_path, faults="cuModuleLoadData=222")
    assert "cuLaunchKernel" not in enqueued
    assert enqueued.count("cuMemcpy2DAsync") == 6  # three blocks that are not empty, there and back
    assert rest.startswith("[] ")
    assert said.count("meshring: blocks of GPU arrays are packed by the driver's 2-D copies") == 1
