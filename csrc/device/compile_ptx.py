"""Compiles pack.cu to PTX and writes it as C++ source: `compile_ptx.py OUTPUT`.

Takes NVRTC (a wheel's, else the system's), else nvcc; needs neither a GPU nor a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import locale
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST = 70  # Volta; CUDA 13 begins with 75
ADVICE = "pip install 'nvidia-cuda-nvrtc-cu12==12.0.*'"


class Failed(Exception):
    """A compiler was there and did not compile."""


def nvrtc_paths(folders: list[str]) -> Iterator[str]:
    """Libraries of NVIDIA's wheels for CUDA 12, then 13 (whose PTX needs newer drivers); system."""
    for pattern in ("nvidia/cuda_nvrtc/lib/libnvrtc.so.*", "nvidia/cu1*/lib/libnvrtc.so.*"):
        for folder in folders:
            yield from (str(p) for p in sorted(Path(folder or ".").glob(pattern)))
    if home := cuda_home():
        yield from (str(p) for p in sorted(Path(home).glob("lib64/libnvrtc.so.*")))
    if name := ctypes.util.find_library("nvrtc"):
        yield name


def cuda_home() -> str | None:
    """Return the toolkit's folder as its users name it."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


@contextmanager
def kept_locale() -> Iterator[None]:
    """Keep the process's locale, which NVRTC sets to its own."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


class Nvrtc:
    """NVIDIA's run-time compiler as a library."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.name = f"NVRTC {major.value}.{minor.value}"

    def check(self, result: int, what: str) -> None:
        """Raise with NVRTC's text unless `result` is success."""
        if result != 0:
            self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise Failed(f"{what}: {self.lib.nvrtcGetErrorString(result).decode()}")

    def target(self) -> int:
        """The oldest architecture that it knows, from Volta on."""
        count = ctypes.c_int()
        self.check(self.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "its architectures")
        known = (ctypes.c_int * count.value)()
        self.check(self.lib.nvrtcGetSupportedArchs(known), "its architectures")
        return min(arch for arch in known if arch >= LEAST)

    def text(self, size_of: str, get: str, program: ctypes.c_void_p) -> str:
        """Return what a pair of NVRTC's functions, size and content, tell of a program."""
        size = ctypes.c_size_t()
        self.check(getattr(self.lib, size_of)(program, ctypes.byref(size)), size_of)
        buffer = ctypes.create_string_buffer(size.value)
        self.check(getattr(self.lib, get)(program, buffer), get)
        return buffer.value.decode()

    def compile(self, source: Path) -> str:
        """Return the PTX of a file whose includes lie beside it."""
        headers = sorted(source.parent.glob("layout.hpp"))
        texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
        names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
        options = [b"--std=c++17", f"--gpu-architecture=compute_{self.target()}".encode()]
        program = ctypes.c_void_p()
        code = source.read_bytes()
        made = self.lib.nvrtcCreateProgram(
            ctypes.byref(program), code, source.name.encode(), len(headers), texts, names
        )
        self.check(made, "nvrtcCreateProgram")
        try:
            arguments = (ctypes.c_char_p * len(options))(*options)
            if self.lib.nvrtcCompileProgram(program, len(options), arguments) != 0:
                log = self.text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                raise Failed(f"{source.name}:\n{log}")
            return self.text("nvrtcGetPTXSize", "nvrtcGetPTX", program)
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))


def compile_with_nvcc(nvcc: str, source: Path) -> str:
    """Return the PTX for the oldest architecture, from Volta on, that this nvcc knows."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pack.ptx"
        for arch in (LEAST, 75):
            command = [nvcc, "-ptx", "-std=c++17", f"-arch=compute_{arch}", "-o", str(out)]
            done = subprocess.run([*command, str(source)], capture_output=True, text=True)
            if done.returncode == 0:
                return out.read_text()
    raise Failed(done.stderr.strip())


def compile_ptx(source: Path, folders: list[str] | None = None) -> tuple[str, str]:
    """Return the PTX, "" where nothing compiles it, and the compiler's name or the reason."""
    reasons = []
    for path in nvrtc_paths(sys.path if folders is None else folders):
        try:
            with kept_locale():
                nvrtc = Nvrtc(path)
                return nvrtc.compile(source), nvrtc.name
        except (OSError, AttributeError, ValueError, Failed) as error:
            reasons.append(f"{Path(path).name}: {error}")
    places = os.environ.get("PATH", "") + os.pathsep + f"{cuda_home() or '.'}/bin"
    if nvcc := shutil.which("nvcc", path=places):
        try:
            return compile_with_nvcc(nvcc, source), "nvcc"
        except (OSError, Failed) as error:
            reasons.append(f"{nvcc}: {error}")
    return "", "; ".join(reasons) or f"the build found neither NVRTC nor nvcc ({ADVICE})"


def as_cpp(ptx: str, compiler: str) -> str:
    """Return the source that defines kPtx; literals in pieces that every compiler takes."""

    def literal(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'

    head = '#include "device/ptx.hpp"\n\nconst meshring::device::Ptx meshring::device::kPtx = {\n'
    if not ptx:
        return f'{head}    nullptr, "", "", {literal(compiler)}}};\n'
    isa = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if isa is None or target is None:
        raise Failed("the compiler's output has no .version and .target line")
    code = (line for line in ptx.splitlines() if line and not line.startswith("//"))
    body = "\n".join("    " + literal(line + "\n") for line in code)
    rest = ", ".join(literal(text) for text in (isa[1], target[1], compiler))
    return f"{head}{body},\n    {rest}}};\n"


def write_ptx(output: Path) -> None:
    """Write the generated source, untouched where it is the same; a sentence if without kernels."""
    ptx, compiler = compile_ptx(HERE / "pack.cu")
    text = as_cpp(ptx, compiler)
    if not ptx:
        print(
            f"meshring: built without device kernels, so packing GPU arrays uses the driver's 2-D "
            f"copies: {compiler}",
            file=sys.stderr,
            flush=True,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists() or output.read_text() != text:
        output.write_text(text)


if __name__ == "__main__":
    write_ptx(Path(sys.argv[1]))
