"""Plans, without processes: nobody receives an element twice or one that it has; text and time."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import meshring as mr
from meshring.exchange import Exchange, elements
from meshring.partition import Box
from meshring.planner import plan_between

R, S0, S1 = mr.Replicate(), mr.Shard(0), mr.Shard(1)
P = mr.Partial()
MESHES = {
    "8": mr.DeviceMesh(8, "a"),
    "2x4": mr.DeviceMesh((2, 4), ("a", "b")),
    "2x2x2": mr.DeviceMesh((2, 2, 2), ("a", "b", "c")),
}
SHAPES = [(8, 16), (9, 7), (1, 3), (0, 4)]


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(s, e) for s, e in box)


def check_exchange(source: mr.Sharding, target: mr.Sharding) -> None:
    """Every element wanted comes once, from a rank that has it; both sides agree."""
    exchange = Exchange(source, target)
    totals = exchange.totals()
    received = dict(zip(exchange.ranks().ravel().tolist(), totals.received.ravel(), strict=True))
    sent = dict(zip(exchange.ranks().ravel().tolist(), totals.sent.ravel(), strict=True))
    messages = dict(zip(exchange.ranks().ravel().tolist(), totals.messages.ravel(), strict=True))
    ways: set[tuple[int, int, Box]] = set()
    for rank in received:
        count = np.zeros(source.shape, int)
        kept = exchange.kept(rank)
        if kept is not None:
            count[at(kept)] += 1
        for peer, box in exchange.receives(rank):
            count[at(box)] += 1
            ways.add((peer, rank, box))
            assert all(
                s >= t and e <= f for (s, e), (t, f) in zip(box, source.box(peer), strict=True)
            )
        wanted = np.zeros(source.shape, int)
        if rank in target.mesh:
            wanted[target.region(rank)] = 1
        assert (count == wanted).all()
        held = np.zeros(source.shape, int)
        if rank in source.mesh:
            held[source.region(rank)] = 1
        assert received[rank] == (wanted & ~held).sum()  # the lower bound
    back = {(rank, peer, box) for rank in received for peer, box in exchange.sends(rank)}
    assert back == ways
    for rank in received:
        mine = [box for source_rank, _, box in ways if source_rank == rank]
        assert sent[rank] == sum(map(elements, mine))
        assert messages[rank] == len(mine)


@pytest.mark.parametrize("name", MESHES)
def test_received_bytes_of_all_pairs_are_the_lower_bound(name: str) -> None:
    mesh = MESHES[name]
    for shape in SHAPES:
        for source, target in itertools.product(
            itertools.product((R, S0, S1), repeat=mesh.ndim), repeat=2
        ):
            start, end = mr.Sharding(mesh, shape, source), mr.Sharding(mesh, shape, target)
            if shape == (9, 7):
                check_exchange(start, end)
            plan = plan_between(start, end, "f8")
            for rank, got in zip(plan.ranks, plan.received_bytes, strict=True):
                wanted, held = np.zeros(shape, bool), np.zeros(shape, bool)
                wanted[end.region(rank)] = held[start.region(rank)] = True
                assert got == 8 * (wanted & ~held).sum(), (source, target, rank)
            assert sum(plan.sent_bytes) == sum(plan.received_bytes)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_splits_and_orders(shape: tuple[int, int]) -> None:
    mesh = mr.DeviceMesh((2, 4), ("a", "b"), ranks=[7, 1, 3, 0, 2, 6, 5, 4])
    first = (shape[0], *(0,) * 3)
    kinds = (R, S0, S1, mr.Shard(0, "ceil"), mr.Shard(0, sizes=first))
    shardings = [mr.Sharding(mesh, shape, (p, q)) for p in (R, S1) for q in kinds]
    shardings += [mr.Sharding(mesh, shape, (S0, S0), order) for order in ((0, 1), (1, 0))]
    for start, end in itertools.product(shardings, repeat=2):
        check_exchange(start, end)


def test_between_meshes() -> None:
    left = mr.DeviceMesh((2, 2), ("a", "b"), ranks=[0, 1, 2, 3])
    for ranks in ([4, 5, 6], [3, 2, 1], [6, 0, 2]):
        right = mr.DeviceMesh(3, "c", ranks=ranks)
        for p in itertools.product((R, S0, S1), repeat=2):
            for q in (R, S0, S1):
                check_exchange(mr.Sharding(left, (9, 7), p), mr.Sharding(right, (9, 7), q))
                check_exchange(mr.Sharding(right, (9, 7), q), mr.Sharding(left, (9, 7), p))


def test_collectives_are_used_where_they_are_as_cheap() -> None:
    mesh = MESHES["2x4"]

    def kinds(source: mr.plan, target: object) -> list[str]:
        return [s.kind for s in mr.plan(mesh, (8, 16), source, target).steps]  # type: ignore[arg-type]

    assert kinds((R, S0), (R, S1)) == ["all_to_all"]
    assert kinds((S0, S1), (S0, R)) == ["all_gather"]
    assert kinds((S0, S1), (R, R)) == ["all_gather", "all_gather"]
    assert kinds((S0, S0), (R, R)) == ["all_gather", "all_gather"]
    assert kinds((R, R), (S0, S1)) == ["local"]
    assert kinds((S0, R), (R, S1)) == ["local", "all_gather"]
    assert kinds((S0, R), (R, S0)) == ["exchange"]
    assert kinds((P, S0), (R, S0)) == ["all_reduce"]
    assert kinds((P, S0), (S1, S0)) == ["reduce_scatter"]
    assert kinds((P, P), (S0, S1)) == ["reduce_scatter", "reduce_scatter"]
    assert kinds((R, P), (R, P)) == []
    assert kinds((S0, P), (S1, P)) == ["all_to_all"]
    assert kinds((R, R), (R, P)) == ["local"]


@pytest.mark.parametrize("name", MESHES)
def test_partial_costs_no_more_than_reduce_scatter_and_the_rest(name: str) -> None:
    mesh = MESHES[name]
    shape = (16, 8)
    for source, target in itertools.product(
        itertools.product((P, S0, S1), repeat=mesh.ndim),
        itertools.product((R, S0, S1), repeat=mesh.ndim),
    ):
        if P not in source:
            continue
        plan = mr.plan(mesh, shape, source, target)
        bounds = []
        for along in itertools.product((0, 1), repeat=source.count(P)):
            choice = iter(along)
            landing = [mr.Shard(next(choice)) if p == P else p for p in source]
            partials = [m for m, p in enumerate(source) if p == P]
            order = [m for m in range(mesh.ndim) if m not in partials] + partials
            landed = mr.Sharding(mesh, shape, landing, order)
            bound = np.array(plan_between(landed, mr.Sharding(mesh, shape, target)).received_bytes)
            size = mr.Sharding(mesh, shape, [R if p == P else p for p in source]).local_shape(0)
            held = int(np.prod(size)) * 4
            for m in partials:  # reduce_scatter receives (n - 1) parts of 1/n
                bound += held // mesh.shape[m] * (mesh.shape[m] - 1)
                held //= mesh.shape[m]
            bounds.append(bound.sum())
        assert sum(plan.received_bytes) <= max(bounds)


def test_plans_print_and_are_json() -> None:
    network = mr.Network(["a", "a", "b", "b"], mr.Link(50e9, 1e-6), mr.Link(1e9, 1e-5))
    mesh = mr.DeviceMesh((2, 2), ("dp", "tp"), network=network)
    plan = mr.plan(mesh, (1000, 1000), {"dp": 0}, None)
    data = json.loads(plan.to_json())
    assert data["received_bytes"] == [2_000_000] * 4
    assert data["mesh"] == {"dp": 2, "tp": 2}
    assert [s["kind"] for s in data["steps"]] == ["all_gather"]
    assert data["seconds"] == pytest.approx(1e-5 + 2e6 / 1e9)
    assert "all_gather along dp" in str(plan)
    inside = mr.plan(mesh, (1000, 1000), {"tp": 0}, None)
    assert inside.seconds == pytest.approx(1e-6 + 2e6 / 50e9)
    assert "nothing to do" in str(mr.plan(mesh, (4,), None, None))
    other = mr.DeviceMesh(2, "x", ranks=[4, 5])
    across = json.loads(mr.plan(mesh, (8,), {"tp": 0}, 0, target_mesh=other).to_json())
    assert across["ranks"] == [0, 1, 2, 3, 4, 5]
    assert across["received_bytes"] == [0, 0, 0, 0, 16, 16]


def test_both_ways_of_counting_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = mr.DeviceMesh((2, 4), ("a", "b"), ranks=[7, 1, 3, 0, 2, 6, 5, 4])
    pairs = list(itertools.product(itertools.product((R, S0, S1), repeat=2), repeat=2))
    ways = [Exchange(mr.Sharding(mesh, (9, 7), p), mr.Sharding(mesh, (9, 7), q)) for p, q in pairs]
    dense = [way.totals() for way in ways]
    monkeypatch.setattr("meshring.exchange._MAX_PAIRS", 0)
    for way, want in zip(ways, dense, strict=True):
        for got, expected in zip(way.totals(), want, strict=True):
            assert (got == expected).all()


def test_plan_of_20_000_ranks_that_cut_one_axis() -> None:
    mesh = mr.DeviceMesh((20, 1000), ("a", "b"))
    plan = mr.plan(mesh, (20_011,), (S0, R), (R, S0))
    assert sum(plan.received_bytes) > 0
    own = Exchange(plan.source, plan.target)
    assert plan.received_bytes[12_345] == 4 * sum(elements(b) for _, b in own.receives(12_345))


def test_plan_of_1024_ranks_has_every_rank_s_bytes() -> None:
    mesh = mr.DeviceMesh((8, 8, 16), ("pp", "dp", "tp"))
    plan = mr.plan(mesh, (1003, 4096), (S0, S0, S1), (S1, S0, S0))
    exchange = Exchange(plan.source, plan.target)
    for rank in (0, 511, 1023):
        received = sum(elements(box) for _, box in exchange.receives(rank))
        sent = sum(elements(box) for _, box in exchange.sends(rank))
        assert plan.received_bytes[rank] == 4 * received
        assert plan.sent_bytes[rank] == 4 * sent


def test_shapes_that_differ_are_refused() -> None:
    mesh = MESHES["8"]
    with pytest.raises(mr.UsageError, match="differ"):
        plan_between(mr.Sharding(mesh, (4,)), mr.Sharding(mesh, (5,)))
