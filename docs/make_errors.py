"""Writes docs/errors.md: runs each program, and keeps what one of its ranks says.

python docs/make_errors.py          needs g++ and CuPy, no GPU: NCCL is the tests' stand-in
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
sys.path.insert(0, str(ROOT / "tests"))

from procs import Job  # noqa: E402

HOST = """\
import numpy as np
import meshring as mr

comm = mr.init()
x = np.ones(8, "f4")
"""
GPU = """\
import cupy
import meshring as mr

comm = mr.init("nccl")
cupy.cuda.Device(comm.device).use()
x = cupy.ones(8, "f4")
"""


@dataclass(frozen=True)
class Case:
    """A program that goes wrong, and the rank whose message is shown."""

    title: str
    text: str
    program: str
    kind: str
    parts: tuple[str, ...]
    """What the message must have, whatever times and pids are."""
    ranks: int = 2
    shown: int = 0
    gpu: dict[str, Any] | None = None
    """Options of the stand-in; None is the host."""
    env: dict[str, str] = field(default_factory=dict)


CASES = [
    Case(
        "The ranks disagree",
        "Rank 1 passes another dtype. Every rank raises, and nothing moved.",
        HOST + 'comm.all_reduce(x if comm.rank != 1 else x.astype("f8"))\n',
        "MismatchError",
        ("all_reduce #1", "disagree in dtype", "rank 1: all_reduce(float64", "at program.py:6",
         "(this rank)", "stays usable", "Give every rank the same dtype"),
        ranks=3,
    ),
    Case(
        "A rank does not come",
        "Rank 2 is busy elsewhere. Its last call says where.",
        "import time\n" + HOST + "comm.barrier()\nif comm.rank == 2:\n    time.sleep(60)\n"
        "comm.all_reduce(x, timeout=2)\n",
        "DeadlineError",
        ("all_reduce #2 (rank 0/3)", "rank 2 did not come within 2 s", "MISSING: last call was",
         "barrier #1 at program.py:7", "timeout="),
        ranks=3,
    ),
    Case(
        "A rank is killed",
        "What the out-of-memory killer does, or a scheduler.",
        "import os, signal\n" + HOST + "comm.all_reduce(x)\nif comm.rank == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\ncomm.all_reduce(x)\n",
        "PeerLostError",
        ("all_reduce #2 (rank 0/2)", "rank 1 (pid", "killed by SIGKILL", "last call was"),
    ),
    Case(
        "A bad argument",
        "Nothing was sent, and the communicator stays usable.",
        HOST + "comm.reduce_scatter(x[:5])\n",
        "UsageError",
        ("reduce_scatter (rank 0/2)", "length 5", "2 ranks", "sizes="),
    ),
    Case(
        "NCCL returns an error",
        "Rank 1's second launch fails. The message has NCCL's result, its last error, and which "
        "library it was.",
        GPU + "comm.all_reduce(x)\ncomm.all_reduce(x)\ncomm.synchronize()\n",
        "BackendError",
        ("all_reduce #2 (rank 1/2)", "ncclAllReduce: ncclSystemError (2)", "NCCL says: ",
         "NCCL 2.32.3, ", "libnccl.so.2", "NCCL_SOCKET_IFNAME"),
        shown=1,
        gpu={"faults": "ncclAllReduce/1=2@1"},
    ),
    Case(
        "NCCL fails after the launch",
        "The network to rank 1 breaks; the call had been enqueued and had returned. The watchdog "
        "sees the asynchronous error and ends what was enqueued; the next call or wait raises.",
        GPU + "comm.all_reduce(x)\ncomm.synchronize()\n",
        "BackendError",
        ("all_reduce #1 (rank 0/2)", "ncclRemoteError (6)", "NCCL says: ", "NCCL 2.32.3, ",
         "libnccl.so.2", "Another rank"),
        gpu={"faults": "ncclAllReduce/0=lose:1"},
    ),
    Case(
        "A rank does not come, on GPUs",
        "Ranks 0 and 1 have enqueued, rank 2 has not. The deadline ends the work on the GPU.",
        "import time\n" + GPU + "comm.barrier()\nif comm.rank == 2:\n    time.sleep(60)\n"
        "comm.all_reduce(x, timeout=2)\ncomm.synchronize()\n",
        "DeadlineError",
        ("all_reduce #2 (rank 0/3) at program.py:", "not done on the GPU",
         "rank 2 did not make this call", "MISSING: last call was barrier #1",
         "enqueued all_reduce(float32 (8,), op=sum) #2 at program.py:", "cannot be used any more"),
        ranks=3,
        gpu={},
    ),
    Case(
        "The ranks disagree, on GPUs",
        "NCCL does not notice: it hangs, or sums garbage. With `check=True` (or "
        "`MESHRING_CHECK=1`) the ranks compare before each launch.",
        GPU.replace('"nccl"', '"nccl", check=True')
        + "comm.all_reduce(x if comm.rank != 1 else x[:4])\n",
        "MismatchError",
        ("all_reduce #1 (rank 0/2)", "disagree in shape", "rank 1: all_reduce(float32 (4,)",
         "No data moved", "same shape"),
        gpu={},
    ),
    Case(
        "A rank is killed, on GPUs",
        "With `check=True` the ranks meet on the host, where the end of a process is known at "
        "once, and how. Without it NCCL may say `ncclRemoteError` first.",
        "import os, signal\n" + GPU.replace('"nccl"', '"nccl", check=True')
        + "comm.all_reduce(x)\ncomm.synchronize()\nif comm.rank == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\ncomm.all_reduce(x)\n",
        "PeerLostError",
        ("all_reduce #2 (rank 0/2)", "rank 1 (pid", "killed by SIGKILL",
         "all_reduce(float32 (8,), op=sum) #1 at"),
        gpu={},
    ),
    Case(
        "What NCCL does not have",
        "Refused before anything is sent.",
        GPU + 'comm.all_reduce(cupy.ones(8, "i2"))\n',
        "UsageError",
        ("all_reduce (rank 0/2)", "NCCL has no int16", "x.astype('int32')"),
        gpu={},
    ),
    Case(
        "Two ranks on one GPU",
        "Of more ranks than GPUs, said at the start.",
        GPU,
        "UsageError",
        ("init (rank 0/2)", "backend 'nccl' cannot be used", "share one GPU", "docs/nccl.md"),
        gpu={"gpus": 1},
    ),
    Case(
        "No driver",
        "`mr.init()` would go on without NCCL; `mr.init(\"nccl\")` insists.",
        GPU,
        "UsageError",
        ("init (rank 0/2)", "backend 'nccl' cannot be used", "no CUDA driver", "--gpus all"),
        gpu={},
        env={"MESHRING_CUDA_LIBRARY": "libcuda.so.none"},
    ),
]  # fmt: skip


def run(case: Case) -> str:
    """The message of the rank that is shown, with paths and pids made neutral."""
    import standin

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(case.program)
        env = dict(case.env)
        command = [sys.executable, "-m", "meshring", "run", "-n", str(case.ranks)]
        if case.gpu is not None:
            options = {"gpus": case.ranks} | case.gpu
            env = standin.environment(folder, **options) | env
            command.append(str(ROOT / "tests" / "standin_cupy.py"))
        said = Job(folder, [*command, "program.py"], env).finish(60).stderr
    head, own = f"[{case.shown}] ", []
    for line in said.splitlines():
        if line.startswith(head):
            own.append(line[len(head) :])
    start = [i for i, line in enumerate(own) if line.startswith("meshring.errors.")]
    if not start:
        raise RuntimeError(f"{case.title}: rank {case.shown} raised nothing:\n{said}")
    return neutral("\n".join(own[start[-1] :]).replace(f"{folder}/", ""))


def neutral(message: str) -> str:
    """Without what is only true on this machine."""
    message = re.sub(r"/\S*/(libnccl\.so\S*?)(?=[.,]? |\.?$)", r"/.../\1", message)
    return re.sub(r"\bpid \d+", "pid 4242", message)


HEAD = """\
# Errors

Real output, written by `docs/make_errors.py`; process numbers and paths are made neutral. Every
message says, in this order: operation and number, rank, what was given, what is needed, what to do.
Programs with CuPy ran on the stand-in NCCL of the tests, on a machine without a GPU, with faults
that it was told to make; where a message has "NCCL says", those words are the stand-in's.

| error | also a | then |
|---|---|---|
| `UsageError` | `ValueError` | nothing was sent; the communicator stays usable |
| `MismatchError` | | nothing moved; the communicator stays usable |
| `DeadlineError` | `TimeoutError` | the communicator is finished: `close()` it |
| `PeerLostError` | `ConnectionError` | the communicator is finished |
| `BackendError` | `RuntimeError` | the communicator is finished |

All derive from `meshring.MeshringError`.
"""


def page(messages: dict[str, str]) -> str:
    """The whole page."""
    text = [HEAD]
    for first, title in ((True, "On the host"), (False, "NCCL fails")):
        text.append(f"## {title}\n")
        for case in CASES:
            if (case.gpu is None) == first:
                text.append(f"### {case.title}\n\n{case.text}\n")
                text.append(f"`meshring run -n {case.ranks} program.py`\n")
                text.append(f"```python\n{case.program}```\n")
                text.append(f"```\n{messages[case.title]}\n```\n")
    return "\n".join(text).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page({case.title: run(case) for case in CASES}))
