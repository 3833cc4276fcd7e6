"""docs/nccl.md: its Python runs on the stand-in, or is for a GPU and compiles; its facts are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import standin
from meshring import nccl
from procs import run_ranks

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "nccl.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
GPU_ONLY = "# on a GPU\n"
START = "import standin_cupy; fake = standin_cupy.install()\n"
END = """
assert cupy.asnumpy(rows).shape == (8,) and (cupy.asnumpy(total) == 2).all()
assert (cupy.asnumpy(part) == 1).all() and part.shape == (2, 7)
assert got.shape == (4,) and halo.shape == (2,)
assert not fake.violations(), fake.violations()
print("the page ran")
"""


def test_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="pip install cupy-cuda12x")
    if standin.compiler() is None:
        pytest.skip(standin.SKIP)
    code = [block for block in BLOCKS if not block.startswith(GPU_ONLY)]
    assert len(code) > 5
    program = START + "\n".join([*code[:-1], "comm.synchronize()", END, code[-1]])
    env = standin.environment(tmp_path, gpus=2)
    result = run_ranks(program, 2, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the page ran") == 2
    assert result.stderr == ""


def test_what_needs_a_gpu_compiles() -> None:
    code = [block for block in BLOCKS if block.startswith(GPU_ONLY)]
    assert len(code) > 2
    for block in code:
        compile(block, "docs/nccl.md", "exec")


def test_versions_and_limits_are_those_of_the_code() -> None:
    def number(text: str) -> int:
        major, minor, patch = (*map(int, text.split(".")), 0)[:3]
        return major * 10000 + minor * 100 + patch

    table = dict(re.findall(r"^\| ([\w, ]+?) \| ([\d.]+) \|", PAGE, re.M))
    since = {name: number(v) for names, v in table.items() for name in names.split(", ")}
    bind = (ROOT / "csrc" / "bind_nccl.cpp").read_text()
    fields = dict(re.findall(r'\{"(\w+)", &nccl::Config::\w+, (\d+)\}', bind))
    assert fields and {name: since[name] for name in fields} == {
        n: int(v) for n, v in fields.items()
    }
    assert set(nccl.Config.__dataclass_fields__) <= set(since)
    api = (ROOT / "csrc" / "nccl" / "api.hpp").read_text()
    for function in ("ncclMemAlloc", "ncclCommRegister", "ncclCommWindowRegister", "ncclAlltoAll"):
        (first,) = re.findall(rf"{function}, (\d+),", api)
        assert since[function] == int(first)
    enqueue = (ROOT / "csrc" / "nccl" / "enqueue.cpp").read_text()
    assert "kGroupBelow = 512 << 10" in enqueue and "kSendBelow = 6 << 20" in enqueue
    assert (
        "kEvery = std::chrono::milliseconds(10)"
        in (ROOT / "csrc" / "nccl" / "watchdog.cpp").read_text()
    )


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
