"""Checks at the end of the suite that the tests left nothing behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

SESSION = "MRTEST_SESSION"  # in the environment of this process and all that it starts
os.environ[SESSION] = uuid.uuid4().hex

settings.register_profile("meshring", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("meshring")


def _started_by_tests() -> list[str]:
    wanted = f"{SESSION}={os.environ[SESSION]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()[:200]!r}")
        except OSError:
            continue
    return found


def _shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir() if "meshring" in p.name}


def _descriptors() -> list[str]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except OSError:
            continue
    return [f for f in found if "meshring" in f or "pidfd" in f]


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = _shared_memory()
    yield
    assert _started_by_tests() == []
    assert _shared_memory() <= before
    assert _descriptors() == []
