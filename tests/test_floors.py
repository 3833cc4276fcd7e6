"""The one-way order of the house: a file uses only its own floor and those below it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

CPP = {
    0: {"dtype", "error", "view", "deadline", "call"},
    1: {
        "reduce",
        "reduce_kernels",
        "reduce_operators",
        "reduce_portable",
        "reduce_avx2",
        "reduce_avx512",
        "segment",
        "board",
        "wait",
        "library",
        "device/driver",
        "device/driver_api",
        "device/layout",
        "device/plan",
        "device/emulate",
        "device/ptx",
        "nccl/api",
        "nccl/nccl",
        "nccl/ras",
    },
    2: {"backend", "world", "nccl/watchdog", "nccl/lanes"},
    3: {
        "host/region",
        "host/host_backend",
        "host/transfers",
        "device/kernels",
        "nccl/enqueue",
        "nccl/nccl_backend",
    },
    4: {"communicator", "communicator_device", "report", "shrink", "worker"},
    5: {
        "bind_arguments",
        "bind_blocks",
        "bind_call",
        "bind_collectives",
        "bind_communicator",
        "bind_device",
        "bind_kernels",
        "bind_nccl",
        "bind_python",
        "bind_run",
        "bind_transfers",
        "module",
    },
}
PYTHON = {
    0: {"errors", "_arrays", "namespace"},
    1: {"environment", "_core"},
    2: {"backends", "backends.base", "nccl", "device"},
    3: {"communicator", "local"},
    4: {
        "topology",
        "mesh",
        "mesh_checks",
        "mesh_comm",
        "mesh_layout",
        "mesh_text",
        "partition",
        "exchange",
        "planner",
        "redistribute",
        "tensor_base",
        "rules",
        "algebra",
        "tensor",
        "storage",
    },
    5.0: {"pipeline.action", "pipeline.engine", "pipeline.channels"},
    5.1: {"pipeline.operations", "pipeline.timeline_base"},
    5.15: {"pipeline.picture", "pipeline.trace", "pipeline.stage"},
    5.16: {"pipeline.picture_files", "pipeline.timeline_text"},
    5.17: {"pipeline.timeline"},
    5.2: {"pipeline.program", "pipeline.layout", "pipeline.links"},
    5.25: {"pipeline.transform", "pipeline.copies", "pipeline.agree"},
    5.3: {"pipeline.schedules_line", "pipeline.schedules_loop", "pipeline.schedules_v"},
    5.35: {"pipeline.schedules_block"},
    5.4: {"pipeline.schedules", "pipeline.auto"},
    5.5: {"pipeline.costs", "pipeline.flow", "pipeline.semantics"},
    5.6: {"pipeline.transfers"},
    5.65: {"pipeline.linear", "pipeline.deadlock"},
    5.66: {"pipeline.search"},
    5.67: {"pipeline.stalls", "pipeline.footprint"},
    5.68: {"pipeline.automatic"},
    5.7: {"pipeline.simulate", "pipeline.lowering"},
    5.75: {"pipeline.validate"},
    5.8: {"pipeline.schedule"},
    5.82: {"pipeline.execute_rank", "pipeline.execute_record"},
    5.85: {"pipeline.execute"},
    5.9: {"pipeline"},
    6: {"context"},
    7: {
        "__main__",
        "bench",
        "bench_data",
        "bench_device",
        "bench_report",
        "bench_table",
        "bench_worker",
        "cli",
        "doctor",
        "doctor_check",
        "doctor_gpu",
        "launch",
        "schedule_command",
    },
}


def floors(table: Mapping[Any, set[str]]) -> dict[str, float]:
    return {name: floor for floor, names in table.items() for name in names}


def test_cpp_includes_go_down() -> None:
    floor_of = floors(CPP)
    source = ROOT / "csrc"
    files = [p for p in source.rglob("*") if p.suffix in {".hpp", ".cpp"}]
    assert len(files) > 20
    for path in files:
        name = str(path.relative_to(source).with_suffix(""))
        assert name in floor_of, f"csrc/{name} has no floor in tests/test_floors.py"
        text = path.read_text()
        for included in re.findall(r'#include "([^"]+)"', text):
            target = (path.parent / included).resolve()
            if not target.exists():
                target = (source / included).resolve()
            other = str(target.relative_to(source).with_suffix(""))
            assert floor_of[other] <= floor_of[name], f"{name} includes {other} from a floor above"
        if floor_of[name] < 5:
            assert "Python.h" not in text and "pybind11" not in text, name


def test_python_imports_go_down() -> None:
    floor_of = floors(PYTHON)
    package = ROOT / "python" / "meshring"
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name == "__init__":
            continue
        assert name in floor_of, f"meshring.{name} has no floor in tests/test_floors.py"
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module == "meshring":
                    targets = [alias.name for alias in node.names]
                elif node.module.startswith("meshring."):
                    targets = [node.module.removeprefix("meshring.")]
            elif isinstance(node, ast.Import):
                targets = [
                    alias.name.removeprefix("meshring.")
                    for alias in node.names
                    if alias.name.startswith("meshring.")
                ]
            for target in targets:
                if target in floor_of:
                    assert floor_of[target] <= floor_of[name], f"{name} imports {target}"


def test_ci_runs_what_the_light_run_skips() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for path in (ROOT / "tests").glob("test_*.py"):
        needs = re.findall(r"pip install (?!ml_dtypes)\S+", path.read_text())
        if needs and path.name != Path(__file__).name:
            assert f"tests/{path.name}" in ci, f"{path.name} skips without {needs}; name it there"


def test_files_stay_small() -> None:
    for folder in ("csrc", "python", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".hpp", ".cu"}:
                lines = len(path.read_text().splitlines())
                assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"
