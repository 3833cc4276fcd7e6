"""The GPU part of `meshring doctor`: CUDA driver, GPUs, CuPy, NCCL, kernels.

The looking is done by a process of its own, since a broken driver may hang or crash whoever asks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshring import _core, device, environment, nccl
from meshring.doctor_check import FAIL, OK, WARN, Check, installed
from meshring.errors import MeshringError

LOOK_LIMIT_S = 30.0
CUPY = re.compile(r"cupy(-.+)?")
NCCL_WHEEL = re.compile(r"nvidia-nccl-cu\d+")
CUDA_OF_PACKAGE = re.compile(r"-cu(?:da)?(\d+)x?$")
DEVICE_FILE = "/dev/nvidiactl"


# ---------------------------------------------------------------- looking


def _or_error(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return what()
    except MeshringError as error:
        return {"error": str(error)}


def _kernels(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """The packing kernels of this build, and which GPUs refuse them."""
    facts: dict[str, Any] = dict(_core.kernels_info())
    reasons = {}
    for gpu in gpus if facts["built"] else []:
        try:
            reasons[gpu["index"]] = _core.kernels_refused(gpu["index"])
        except MeshringError as error:
            reasons[gpu["index"]] = str(error)
    return facts | {"refused": {index: why for index, why in reasons.items() if why}}


def look() -> dict[str, Any]:
    """Ask driver, NCCL and kernels in this process.

    Errors: none; what cannot be had is {"error": why}.
    """
    mapped_before = nccl.mapped()
    library = _or_error(lambda: vars(nccl.library()).copy())
    driver = _or_error(_core.cuda_driver)
    gpus = _or_error(lambda: {"gpus": _core.cuda_devices()}).get("gpus", [])
    try:
        local_rank = environment.detect().local_rank
    except ValueError:  # another check's finding
        local_rank = 0
    return {
        "nccl": library,
        "mapped": mapped_before,
        "driver": driver,
        "gpus": gpus,
        "kernels": _kernels(gpus),
        "why_off": device.readiness(local_rank)["why_off"],
    }


def look_elsewhere() -> dict[str, Any]:
    """Let another process look(), so that any end of it is a finding: {"failed": how}."""
    argv = [sys.executable, "-m", "meshring.doctor_gpu"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=LOOK_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {
            "failed": f"asking the CUDA driver did not end in {LOOK_LIMIT_S:g} s; look at "
            "nvidia-smi and the kernel's log"
        }
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {
            "failed": f"asking the CUDA driver ended with exit code {done.returncode}: {last[0]}"
        }
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def find_nccl() -> list[str]:
    """Return the path of every libnccl.so found: wheels, LD_LIBRARY_PATH, the linker's cache."""
    folders = [Path(entry or ".") / "nvidia/nccl/lib" for entry in sys.path]
    folders += [Path(p) for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    found = []
    for folder in folders:
        try:
            found += sorted(str(path) for path in folder.glob("libnccl.so*"))
        except OSError:
            continue
    ldconfig = shutil.which("ldconfig", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if ldconfig:
        listing = subprocess.run(
            [ldconfig, "-p"], capture_output=True, text=True, timeout=10, check=False
        )
        found += re.findall(r"libnccl\.so\S*.*=> (\S+)", listing.stdout)
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- the sentences


def _others(facts: dict[str, Any], paths: list[str]) -> list[str]:
    """The libraries beside the one in use, each file once, whatever links lead to it."""
    used = facts["nccl"].get("path", "")
    seen = {os.path.realpath(used)} if used else set()
    others = []
    for path in [*facts["mapped"], *paths]:
        real = os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            others.append(path)
    return others


def _nccl_text(facts: dict[str, Any]) -> str:
    library = facts["nccl"]
    text = (
        library.get("error") or f"NCCL {library['version']}, {library['path']} ({library['found']})"
    )
    if facts["others"]:
        text += f"; also here and not used: {', '.join(facts['others'])}"
    return text


def _names(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _kernels_text(kernels: dict[str, Any]) -> str:
    if not kernels["built"]:
        return f"not compiled in ({kernels['compiler']}), the driver's copies pack instead"
    return f"compiled in as PTX ISA {kernels['isa']} for {kernels['target']} and newer"


def _check_wheels(have: dict[str, str]) -> list[Check]:
    wheels = {name: have[name] for name in sorted(have) if NCCL_WHEEL.fullmatch(name)}
    if len(wheels) < 2:
        return []
    sentence = (
        f"{' and '.join(wheels)} own the same files, and removing one deletes the library: "
        "uninstall both, install one"
    )
    return [Check("NCCL wheels", WARN, sentence, {"wheels": wheels})]


def _check_driver(facts: dict[str, Any]) -> Check:
    driver, gpus = facts["driver"], facts["gpus"]
    names = [gpu["name"] for gpu in gpus]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    version = f"{driver['version'] // 1000}.{driver['version'] % 1000 // 10}"
    return Check("cuda", OK, f"driver for CUDA {version}, {driver['path']}; {counted}", driver)


def _check_cupy(packages: dict[str, str], wheels: dict[str, str], cuda: int) -> Check:
    """CuPy by its metadata, and whether the driver is new enough for it and for NCCL's wheel."""
    if not packages:
        sentence = f"CuPy is not installed: {device.INSTALL}"
        return Check("cupy", WARN, sentence)
    if len(packages) > 1:
        sentence = f"{' and '.join(packages)} own the same files: uninstall all, install one"
        return Check("cupy", WARN, sentence, packages)
    for name in (*packages, *wheels):
        match = CUDA_OF_PACKAGE.search(name)
        if match and int(match[1]) > cuda // 1000:
            sentence = (
                f"{name} is made for CUDA {match[1]}, and the driver is for CUDA {cuda // 1000}: "
                f"install a newer driver, or the package for CUDA {cuda // 1000}"
            )
            return Check("cupy", WARN, sentence, packages)
    return Check("cupy", OK, _names(packages), packages)


def _check_library(facts: dict[str, Any]) -> Check:
    text = _nccl_text(facts)
    used = os.path.realpath(facts["nccl"].get("path", ""))
    strangers = [path for path in facts["mapped"] if os.path.realpath(path) != used]
    if "error" in facts["nccl"]:
        return Check("libnccl", WARN, text, facts["nccl"])
    if strangers:
        text += (
            "; two of them are mapped into one process and do not know of each other: unset "
            "MESHRING_NCCL_LIBRARY"
        )
        return Check("libnccl", WARN, text, facts["nccl"])
    return Check("libnccl", OK, text, facts["nccl"])


def _check_kernels(kernels: dict[str, Any]) -> Check:
    text = f"kernels that pack blocks are {_kernels_text(kernels)}"
    if not kernels["built"]:
        return Check("kernels", WARN, text, kernels)
    if kernels["refused"]:
        gpu, why = next(iter(kernels["refused"].items()))
        return Check("kernels", WARN, f"{text}; on GPU {gpu} {why}", kernels)
    return Check("kernels", OK, f"{text}; the driver takes them", kernels)


def check_gpu() -> list[Check]:
    """Say whether NCCL is used here, with what, and why not: one line where there is no GPU."""
    have = installed()
    checks = _check_wheels(have)
    facts = look_elsewhere()
    if "failed" in facts:
        return [*checks, Check("backend nccl", FAIL, facts["failed"], {"available": False})]
    packages = {name: have[name] for name in sorted(have) if CUPY.fullmatch(name)}
    wheels = {name: have[name] for name in sorted(have) if NCCL_WHEEL.fullmatch(name)}
    facts["others"] = _others(facts, find_nccl())
    facts |= {"installed": packages | wheels, "available": not facts["why_off"]}
    if "error" in facts["driver"]:
        named = "MESHRING_NCCL_LIBRARY" in os.environ
        absent = "error" in facts["nccl"] and not facts["others"] and not named
        sentence = (
            f"off, arrays on the host work without it: {facts['driver']['error']}. Beside that: "
            f"{_names(packages) or 'no CuPy'}; {'no NCCL' if absent else _nccl_text(facts)}; "
            f"kernels {_kernels_text(facts['kernels'])}"
        )
        broken = Path(DEVICE_FILE).exists() and "CUDA_VISIBLE_DEVICES" not in os.environ
        return [*checks, Check("backend nccl", WARN if broken else OK, sentence, facts)]
    checks += [
        _check_driver(facts),
        _check_cupy(packages, wheels, facts["driver"]["version"]),
        _check_library(facts),
        _check_kernels(facts["kernels"]),
    ]
    if facts["why_off"]:
        return [*checks, Check("backend nccl", WARN, f"off: {facts['why_off']}", facts)]
    most = len({gpu["uuid"] for gpu in facts["gpus"]})
    sentence = f"on: NCCL {facts['nccl']['version']} between up to {most} ranks, each with its GPU"
    return [*checks, Check("backend nccl", OK, sentence, facts)]


if __name__ == "__main__":
    print(json.dumps(look()))
