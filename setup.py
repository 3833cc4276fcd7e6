"""Builds meshring._core: plain C++17 and pybind11; a CUDA compiler adds the device kernels."""

import os
import sys
import sysconfig
from copy import copy
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc" / "device"))
from compile_ptx import write_ptx  # noqa: E402

SANITIZE = os.environ.get("MESHRING_SANITIZE", "")
STRICT = os.environ.get("MESHRING_STRICT", "") == "1"
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
if SANITIZE not in SANITIZERS:
    sys.exit(f"MESHRING_SANITIZE={SANITIZE!r}: give 'address' or 'thread', or leave it unset.")


class BuildExtension(build_ext):
    def run(self) -> None:
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.exists():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            sys.exit(
                f"meshring cannot be built: {header} is missing; install Python's headers, on "
                f"Debian and Ubuntu with: apt-get install python3-dev (or python{version}-dev)"
            )
        self.ptx = Path(self.build_temp) / "ptx.cpp"
        write_ptx(self.ptx)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        ext = copy(ext)  # the generated source is none of the sdist's
        ext.sources = [*ext.sources, str(self.ptx)]
        super().build_extension(ext)


sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.hpp"))
flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
if STRICT or SANITIZE:
    flags += ["-Wall", "-Wextra", "-Wswitch-enum", "-Werror"]
if SANITIZE:
    flags += ["-g", "-O1", "-fno-omit-frame-pointer"]

ParallelCompile("MESHRING_BUILD_JOBS", default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "meshring._core",
            sources,
            include_dirs=["csrc"],
            depends=headers,
            cxx_std=17,
            extra_compile_args=flags + SANITIZERS[SANITIZE],
            extra_link_args=["-pthread", *SANITIZERS[SANITIZE]],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    # Objects of one kind of build must not be linked into another.
    options={"build": {"build_base": f"build/{SANITIZE}"}} if SANITIZE else {},
)
