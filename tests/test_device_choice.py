"""Whether NCCL is used: the same answer on every rank, from what all ranks have."""

from __future__ import annotations

from typing import Any

import pytest

from meshring import device


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    good = {"backend": "nccl", "why_off": "", "name": "A GPU", "nccl": 23203, "sharing": False}
    return [good | {"device": i, "uuid": f"{i}"} | change for i, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (({}, {}), ()),
        (({}, {"uuid": "0"}), ("ranks 0 and 1 share one GPU (A GPU)", "docs/nccl.md")),
        (({"sharing": True}, {"sharing": True, "uuid": "0"}), ()),
        (({"sharing": True}, {"uuid": "0"}), ("ranks 0 and 1 share one GPU",)),
        (({}, {"nccl": 22703}), ("different versions of NCCL", "rank 0 23203, rank 1 22703")),
        (({}, {"why_off": "no driver"}), ("no driver",)),
    ],
)
def test_all_ranks_decide_the_same(
    changes: tuple[dict[str, Any], ...], words: tuple[str, ...]
) -> None:
    for me in range(len(changes)):
        why = device._why_off(rows(*changes), me)
        assert bool(why) == bool(words)
        for word in words:
            assert word in why


def test_the_variables_are_read_on_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    gpu = {"index": 0, "name": "A GPU", "uuid": "0"}
    monkeypatch.setattr(device._core, "cuda_devices", lambda: [gpu])
    monkeypatch.setattr(device.nccl, "library", lambda: device.nccl.Library("", "", 23203, ""))
    for name in device._SHARING:
        monkeypatch.delenv(name, raising=False)
    assert device.readiness(3)["sharing"] is False
    monkeypatch.setenv("NCCL_HOSTID", "rank0")
    assert device.readiness(3)["sharing"] is True
