"""Our declarations of NCCL and of the CUDA driver against NVIDIA's headers, by a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADERS = ROOT / "tests" / "headers"

# What nccl.h needs of the CUDA runtime's headers.
SHIMS = {
    "cuda_runtime.h": "#include <stddef.h>\n"
    "typedef struct CUstream_st* cudaStream_t;\n"
    "typedef struct CUevent_st* cudaEvent_t;\n",
    "cuda_fp16.h": "",
    "cuda_bf16.h": "",
    "cuda_fp8.h": "",
}


def folders_with(header: str) -> list[Path]:
    """Include folders of NVIDIA's wheels that hold this header, then of an installed toolkit."""
    found = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(Path(root).glob(f"*/include/{header}"))
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes.append(str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    found += [Path(home) / "include" / header for home in homes if home]
    return [path.parent for path in found if path.exists()]


def compile_check(source: str, folders: list[Path], ours: Path = ROOT / "csrc") -> str:
    """What the compiler says about a file of static assertions; empty: all hold."""
    cxx = os.environ.get("CXX") or shutil.which("g++")
    if cxx is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    own = [f"-I{ours}", f"-I{HEADERS}"]
    theirs = [word for folder in folders for word in ("-isystem", str(folder))]
    command = [cxx, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", *own, *theirs]
    done = subprocess.run(
        [*command, str(HEADERS / source)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


def nccl_folders(tmp_path: Path) -> list[Path]:
    found = folders_with("nccl.h")
    if not found:
        pytest.skip("needs NVIDIA's nccl.h: pip install nvidia-nccl-cu12")
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(text)
    return [tmp_path, found[0]]


def cuda_folders() -> list[Path]:
    found = folders_with("cuda.h")
    if not found:
        pytest.skip("needs NVIDIA's cuda.h: pip install nvidia-cuda-runtime-cu12")
    return found[:1]


def test_nccl_declarations(tmp_path: Path) -> None:
    assert compile_check("nccl_header.cpp", nccl_folders(tmp_path)) == ""


def test_driver_declarations() -> None:
    assert compile_check("cuda_header.cpp", cuda_folders()) == ""


# The checks would notice: none of these changes to our declarations compiles.
def refused(
    header: str, source: str, folders: list[Path], change: tuple[str, str], to: Path
) -> None:
    text = (ROOT / "csrc" / header).read_text()
    assert change[0] in text
    path = to / "changed" / header
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(*change, 1))
    assert "static assertion failed" in compile_check(source, folders, to / "changed")


@pytest.mark.parametrize(
    "change",
    [
        ("remote_error = 6", "remote_error = 5"),
        ("  int shrink_share", "  size_t shrink_share"),
        ("int nvls_ctas = kUndefined;", "int nvls_ctas = kUndefined, next[2] = {};"),
        ("Result, (int*))", "Result, (unsigned*))"),
        ("Handle*, int, UniqueId, int, Config*", "Handle*, int, int, UniqueId, Config*"),
        ("int, int, Handle*, Config*", "int, int, Handle, Config*"),
        ("(const void*, size_t, DataType, int", "(void*, size_t, DataType, int"),
        ("ncclRedOpDestroy, 21800, Result, (Op,", "ncclRedOpDestroy, 21800, Result, (int*,"),
    ],
    ids=lambda change: change[1],
)
def test_the_nccl_check_notices(change: tuple[str, str], tmp_path: Path) -> None:
    refused("nccl/api.hpp", "nccl_header.cpp", nccl_folders(tmp_path), change, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("kNotReady = 600", "kNotReady = 601"),
        ("size_t src_pitch = 0;", "unsigned src_pitch = 0;"),
        ("cuMemcpyDtoDAsync_v2, Result, (Pointer,", "cuMemcpyDtoDAsync_v2, Result, (unsigned,"),
        ("(Pointer*, size_t, Pool, Stream)", "(Pointer*, size_t, Stream)"),
    ],
    ids=lambda change: change[1],
)
def test_the_driver_check_notices(change: tuple[str, str], tmp_path: Path) -> None:
    refused("device/driver_api.hpp", "cuda_header.cpp", cuda_folders(), change, tmp_path)
