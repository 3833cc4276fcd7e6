"""What users see: docstrings, the stub against the module, imports, the package's promises."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import meshring as mr
from meshring import _core

STUB = Path(_core.__file__).parent / "_core.pyi"
HOT = (
    "all_reduce all_gather reduce_scatter broadcast reduce gather scatter all_to_all barrier "
    "send recv sendrecv isend irecv"
).split()
PARTS = ("Shapes:", "Units:", "Errors:", "Source:")


def test_everything_public_has_a_docstring() -> None:
    for name in mr.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(mr, name)), name
    tensors = (mr.DeviceMesh, mr.Sharding, mr.DistributedTensor, mr.Plan, mr.ModelParallelContext)
    for owner in tensors:
        for name, member in inspect.getmembers(owner, lambda m: isinstance(m, property)):
            assert inspect.getdoc(member), f"{owner.__name__}.{name}"
    for owner in (mr.Communicator, mr.Work, *tensors):
        for name, member in inspect.getmembers(owner):
            if not name.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{owner.__name__}.{name}"


@pytest.mark.parametrize("name", HOT)
def test_operations_say_shapes_units_errors_and_source(name: str) -> None:
    text = inspect.getdoc(getattr(mr.Communicator, name))
    assert text is not None
    for part in PARTS:
        assert part in text, f"{name}: {part}"


def test_hot_methods_are_not_overridden_and_not_slow_calls() -> None:
    for name in HOT:
        assert name not in vars(mr.Communicator)
        assert type(vars(_core.Communicator)[name]).__name__ == "method_descriptor"


def _stub() -> ast.Module:
    return ast.parse(STUB.read_text())


def test_stub_has_what_the_module_has() -> None:
    tree = _stub()
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    real = {n for n in vars(_core) if not n.startswith("_")}
    assert functions | set(classes) == real
    for name, node in classes.items():
        in_stub = {n.name for n in node.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
        in_module = {
            n
            for n in vars(getattr(_core, name))
            if not n.startswith("__") and n != "_pybind11_conduit_v1_"
        }
        assert in_stub == in_module, name


def test_stub_signatures_are_those_of_the_methods() -> None:
    (node,) = [n for n in _stub().body if isinstance(n, ast.ClassDef) and n.name == "Communicator"]
    stub = {n.name: n.args for n in node.body if isinstance(n, ast.FunctionDef)}
    for name in HOT:
        real = inspect.signature(getattr(_core.Communicator, name))
        args = stub[name]
        assert [a.arg for a in args.args + args.kwonlyargs] == list(real.parameters), name
        defaults = [ast.literal_eval(d) for d in [*args.defaults, *args.kw_defaults] if d]
        assert defaults == [
            p.default for p in real.parameters.values() if p.default is not inspect.Parameter.empty
        ], name


def test_import_brings_no_heavy_friends() -> None:
    code = (
        "import sys, meshring; "
        "bad = {'cupy', 'torch', 'mpi4py', 'ml_dtypes', 'click', 'rich', 'matplotlib', "
        "'sklearn', 'scipy'} "
        "& set(sys.modules); print(sorted(bad)); sys.exit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_pipelines_are_imported_on_first_use() -> None:
    code = (
        "import sys, meshring; assert not any('pipeline' in m for m in sys.modules); "
        "assert set(meshring.__all__) <= set(dir(meshring)); "
        "meshring.PipelineSchedule(2, 2); assert not hasattr(meshring, 'Pipelines')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_errors_are_also_the_builtin_kind() -> None:
    assert issubclass(mr.UsageError, ValueError)
    assert issubclass(mr.DeadlineError, TimeoutError)
    assert issubclass(mr.PeerLostError, ConnectionError)
    assert issubclass(mr.BackendError, RuntimeError)
    for kind in (mr.UsageError, mr.MismatchError, mr.DeadlineError, mr.PeerLostError):
        assert issubclass(kind, mr.MeshringError)


def test_trace_and_repr() -> None:
    def program(comm: mr.Communicator) -> list[dict[str, object]]:
        import numpy as np

        for i in range(40):
            comm.all_reduce(np.ones(i))
        assert "rank" in repr(comm) and "host" in repr(comm)
        return comm.trace()

    for rows in mr.run_local(program, 2):
        assert len(rows) == 32
        assert [r["number"] for r in rows] == list(range(9, 41))
        assert all(r["state"] == "done" and "test_public.py:" in str(r["site"]) for r in rows)
        assert rows[-1]["call"] == "all_reduce(float64 (39,), op=sum)"


def test_names_that_are_imported_late_are_all_there() -> None:
    code = (
        "import meshring as mr; from meshring import *; import sys; "
        "assert set(mr.__all__) <= set(dir(mr)); "
        "missing = [n for n in mr.__all__ if not hasattr(mr, n)]; print(missing); "
        "sys.exit(bool(missing) or hasattr(mr, 'nonsense'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
