"""How the build makes the device kernels, with and without a CUDA compiler."""

from __future__ import annotations

import importlib.util
import locale
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PTX = '.version 8.0\n.target sm_70\n.address_size 64\n\n// a "word"\n.entry a\\b() { ret; }\n'


@pytest.fixture
def tool() -> ModuleType:
    path = ROOT / "csrc/device/compile_ptx.py"
    spec = importlib.util.spec_from_file_location("compile_ptx", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_system_compiler(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Hides the machine's CUDA; returns an empty folder on PATH."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(tool.ctypes.util, "find_library", lambda name: None)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def compiled(source: Path, folder: Path) -> str:
    """What kPtx holds in a program built with the generated source."""
    main = folder / "main.cpp"
    main.write_text(
        '#include <cstdio>\n#include "device/ptx.hpp"\n'
        "int main() { const auto& p = meshring::device::kPtx;\n"
        '  std::printf("%s|%s|%s|%s", p.text ? p.text : "none", p.isa, p.target, p.compiler); }\n'
    )
    compiler = shutil.which("g++")
    assert compiler, "install g++"
    program = folder / "main"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), str(main), "-o", str(program)], check=True, timeout=60)
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout


def test_nvrtc_compiles_every_kernel(tool: ModuleType, tmp_path: Path) -> None:
    if not list(tool.nvrtc_paths(sys.path)):
        pytest.skip("no NVRTC: pip install 'nvidia-cuda-nvrtc-cu12==12.0.*'")
    encoding = locale.getpreferredencoding(False)
    ptx, compiler = tool.compile_ptx(ROOT / "csrc/device/pack.cu")
    assert locale.getpreferredencoding(False) == encoding  # NVRTC would change it
    assert compiler.startswith("NVRTC 1"), compiler
    entries = set(re.findall(r"\.entry (\w+)", ptx))
    kinds = [f"{blocks}_{index}" for blocks in ("Equal", "Uneven") for index in ("u32", "u64")]
    assert entries == {f"meshring_copy_{w}_{kind}" for w in (1, 2, 4, 8, 16) for kind in kinds}
    if compiler == "NVRTC 12.0":
        assert re.search(r"^\.version 8\.0$", ptx, re.MULTILINE)
        assert re.search(r"^\.target sm_70$", ptx, re.MULTILINE)
    assert "__local_depot" not in ptx  # tables of blocks stay where the parameters are
    assert "ld.global.v4.u32" in ptx and "st.global.v4.u32" in ptx
    output = tmp_path / "ptx.cpp"
    output.write_text(tool.as_cpp(ptx, compiler))
    assert ".entry meshring_copy_16_Equal_u32(" in compiled(output, tmp_path)


def test_without_a_compiler_the_build_goes_on_and_says_so(
    tool: ModuleType,
    no_system_compiler: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = [p for p in sys.path if not (Path(p or ".") / "nvidia").exists()]
    monkeypatch.setattr(sys, "path", path)
    tool.write_ptx(tmp_path / "deep" / "ptx.cpp")
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "without device kernels" in said and "nvidia-cuda-nvrtc-cu12==12.0.*" in said
    monkeypatch.undo()
    assert compiled(tmp_path / "deep" / "ptx.cpp", tmp_path).startswith("none|||the build found")


def test_nvcc_is_asked_for_the_oldest_architecture_it_knows(
    tool: ModuleType, no_system_compiler: Path, tmp_path: Path
) -> None:
    nvcc = no_system_compiler / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "if '-arch=compute_70' in sys.argv: sys.exit('unsupported gpu architecture')\n"
        f"open(sys.argv[sys.argv.index('-o') + 1], 'w').write({PTX.replace('70', '75')!r})\n"
    )
    nvcc.chmod(0o755)
    ptx, compiler = tool.compile_ptx(ROOT / "csrc/device/pack.cu", folders=[])
    assert (ptx, compiler) == (PTX.replace("70", "75"), "nvcc")
    nvcc.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no host compiler')\n")
    ptx, reason = tool.compile_ptx(ROOT / "csrc/device/pack.cu", folders=[])
    assert ptx == ""
    assert "no host compiler" in reason


def test_a_library_that_is_no_compiler_is_a_reason(
    tool: ModuleType, no_system_compiler: Path, tmp_path: Path
) -> None:
    lib = tmp_path / "nvidia" / "cuda_nvrtc" / "lib"
    lib.mkdir(parents=True)
    (lib / "libnvrtc.so.12").write_bytes(b"not a library")
    ptx, reason = tool.compile_ptx(ROOT / "csrc/device/pack.cu", folders=[str(tmp_path)])
    assert ptx == ""
    assert "libnvrtc.so.12" in reason


def test_the_generated_source_holds_the_text(tool: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "ptx.cpp"
    output.write_text(tool.as_cpp(PTX, 'a "compiler"'))
    text = ".version 8.0\n.target sm_70\n.address_size 64\n.entry a\\b() { ret; }\n"
    assert compiled(output, tmp_path) == f'{text}|8.0|sm_70|a "compiler"'
    with pytest.raises(tool.Failed, match="version"):
        tool.as_cpp("no ptx", "a compiler")


def test_nothing_is_written_where_nothing_changed(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else every build would compile and link again."""
    monkeypatch.setattr(tool, "compile_ptx", lambda source: (PTX, "a compiler"))
    output = tmp_path / "ptx.cpp"
    tool.write_ptx(output)
    output.chmod(0o444)
    before = output.stat().st_mtime_ns
    tool.write_ptx(output)
    assert output.stat().st_mtime_ns == before
