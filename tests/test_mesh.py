"""DeviceMesh without processes: coordinates, layouts, slices, hosts, text, and what it refuses."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshring as mr
from meshring.topology import balanced_factors

CUBE = mr.DeviceMesh((2, 2, 2), ("pp", "dp", "tp"))
HOSTS = mr.Network(["a"] * 4 + ["b"] * 4, mr.Link(50e9, 1e-6), mr.Link(5e9, 1e-5))
S = mr.ModelParallelStrategy


def test_device_at_is_row_major_and_none_outside() -> None:
    for mesh in (
        mr.DeviceMesh([0, 1, 2, 3], mr.Grid2D(2, 2)),
        mr.DeviceMesh.from_strategy(S.TENSOR, device_ids=[0, 1, 2, 3]),
    ):
        places = [mesh.device_at([i, j]) for i in range(2) for j in range(2)]
        assert places == [0, 1, 2, 3]
        assert mesh.device_at([0, 2]) is None
        assert mesh.device_at([-1, 0]) is None
        assert mesh.topology == mr.Grid2D(2, 2)
        assert mesh.device_ids == (0, 1, 2, 3)
    assert mr.DeviceMesh([5, 7, 9], mr.Linear()).device_at([2]) == 9
    assert mr.DeviceMesh(range(8), mr.Grid3D(2, 2, 2)).device_at((1, 0, 1)) == 5


def test_presets_of_the_strategies() -> None:
    for n in (1, 2, 6, 8, 12, 30):
        line = mr.DeviceMesh.from_strategy(S.PIPELINE, n)
        assert (line.shape, line.topology) == ((n,), mr.Linear(n))
        rows, cols = mr.DeviceMesh.from_strategy(S.TENSOR, n).shape
        assert rows <= cols
        assert not any(n % r == 0 for r in range(rows + 1, int(n**0.5) + 1))
        hybrid = mr.DeviceMesh.from_strategy(S.HYBRID, n)
        assert hybrid.axis_names == ("pp", "dp", "tp")
        assert hybrid.size == n
    assert mr.DeviceMesh.from_strategy(S.HYBRID, 8).shape == (2, 2, 2)
    assert mr.DeviceMesh.from_strategy(S.HYBRID, 16, pipeline_depth=4).shape == (4, 2, 2)
    assert balanced_factors(64, 3) == (4, 4, 4)


@given(
    st.permutations(range(12)), st.sampled_from([(12,), (3, 4), (2, 3, 2), (1, 12), (2, 2, 3, 1)])
)
def test_coordinate_and_rank_at_are_inverse(ranks: list[int], shape: tuple[int, ...]) -> None:
    names = tuple("abcd"[: len(shape)])
    mesh = mr.DeviceMesh(shape, names, ranks=ranks)
    for at in itertools.product(*map(range, shape)):
        rank = mesh.rank_at(at)
        assert mesh.coordinate(rank) == at
        assert mesh.rank_at(dict(zip(names, at, strict=True))) == rank
        assert mesh.device_at(at) == rank
        assert rank in mesh
    assert 12 not in mesh
    assert -1 not in mesh


def test_neighbors() -> None:
    mesh = mr.DeviceMesh((2, 3), ("a", "b"))
    assert [mesh.neighbor("b", 1, rank=r) for r in range(6)] == [1, 2, None, 4, 5, None]
    assert [mesh.neighbor("b", -1, True, rank=r) for r in range(6)] == [2, 0, 1, 5, 3, 4]
    assert [mesh.neighbor("a", 1, rank=r) for r in range(6)] == [3, 4, 5, None, None, None]


def test_slices_and_other_layouts() -> None:
    assert CUBE["dp", "tp"].ranks.tolist() == [[0, 1], [2, 3]]
    assert CUBE["tp", "pp"].ranks.tolist() == [[0, 4], [1, 5]]
    assert CUBE.slice("dp", {"pp": 1, "tp": 1}).ranks.tolist() == [5, 7]
    assert CUBE.reorder("tp", "pp", "dp").ranks.tolist() == CUBE.ranks.transpose(2, 0, 1).tolist()
    assert CUBE.flatten().axis_names == ("pp_dp_tp",)
    assert CUBE.flatten("all").ranks.tolist() == list(range(8))
    merged = CUBE.merge(("tp", "pp"), "m")
    assert merged.axis_names == ("dp", "m")
    assert merged.ranks.tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert CUBE.flatten("x").split("x", (2, 4), ("a", "b")) == mr.DeviceMesh((2, 4), ("a", "b"))
    owned = mr.DeviceMesh((2, 2), ("a", "b"), device_ids=[6, 4, 2, 0])
    assert owned["b"].device_ids == (6, 4)
    assert owned.reorder("b", "a").device_ids == (6, 2, 4, 0)


def test_value_semantics() -> None:
    same = mr.DeviceMesh([2, 2, 2], ["pp", "dp", "tp"], ranks=np.arange(8).reshape(2, 2, 2))
    assert same == CUBE
    assert hash(same) == hash(CUBE)
    assert pickle.loads(pickle.dumps(CUBE)) == CUBE
    assert CUBE.reorder("tp", "dp", "pp") != CUBE
    assert mr.DeviceMesh((2, 2, 2), ("pp", "dp", "tp"), ranks=range(1, 9)) != CUBE
    assert mr.DeviceMesh((2, 2, 2), ("pp", "dp", "tp"), network=HOSTS) != CUBE
    assert CUBE != "mesh"
    with pytest.raises(AttributeError, match="immutable"):
        CUBE.network = HOSTS
    with pytest.raises(ValueError, match="read-only"):
        CUBE.ranks[0] = 1


def test_text_shows_the_grid() -> None:
    text = repr(CUBE)
    assert text.splitlines()[0] == "DeviceMesh(pp=2, dp=2, tp=2)"
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["tp=0", "tp=1"],
        ["dp=0", "4", "5"],
        ["dp=1", "6", "7"],
    ]
    assert repr(mr.DeviceMesh(3)).splitlines()[-1].split() == ["rank", "0", "1", "2"]
    big = repr(mr.DeviceMesh((50, 50, 40), ("a", "b", "c")))
    assert "99999" in big
    assert len(big.splitlines()) < 200
    page = mr.DeviceMesh((1, 2), ("a<b", "c"))._repr_html_()
    assert "a&lt;b=0" in page
    assert page.count("<td") == 2


def test_100_000_ranks_are_looked_up_without_a_search_through_them() -> None:
    order = np.random.default_rng(0).permutation(100_000)
    mesh = mr.DeviceMesh((10, 100, 100), ("pp", "dp", "tp"), ranks=order)
    for rank in range(0, 100_000, 997):
        assert mesh.rank_at(mesh.coordinate(rank)) == rank
    assert len({mesh, mesh.with_comm(None)}) == 1


def test_arrange_keeps_the_axis_that_talks_most_inside_a_host() -> None:
    hosts = mr.Network(["b", "a"] * 4)  # the launcher dealt the ranks out in turn
    for heavy, light in (("tp", "dp"), ("dp", "tp")):
        shape = (4, 2) if heavy == "dp" else (2, 4)
        mesh = mr.DeviceMesh.arrange(shape, ("dp", "tp"), hosts, {heavy: 100, light: 1})
        groups = mesh.ranks if heavy == "tp" else mesh.ranks.T
        assert all(len({hosts.hosts[r] for r in group}) == 1 for group in groups)
        assert mesh.link(light) is hosts.between
        assert f"Crosses hosts: {light}." in mesh.explain()


def test_explain_says_what_crosses() -> None:
    mesh = mr.DeviceMesh((2, 4), ("dp", "tp"), network=HOSTS)
    text = mesh.explain({"dp": 3.0, "tp": 700.0})
    dp, tp = (line.split() for line in text.splitlines()[2:4])
    assert dp[:4] == ["dp", "2", "0,", "4"]
    assert "4 of 4" in text
    assert dp[-1] == "3"
    assert tp[-1] == "0"
    assert mesh.link("tp") == HOSTS.inside
    assert mesh.link() == mesh.link("dp") == HOSTS.between
    assert "assumed" in CUBE.explain()


def test_hosts_are_found_in_a_matrix_of_links() -> None:
    rates = np.full((6, 6), 1e9)
    for group in ((0, 2, 4), (1, 3, 5)):
        for i, j in itertools.permutations(group, 2):
            rates[i, j] = 40e9
    network = mr.Network.from_links(rates, 2e-6)
    assert len(set(network.hosts)) == 2
    assert network.hosts[0] == network.hosts[2] == network.hosts[4] != network.hosts[1]
    assert (network.inside.bandwidth, network.between.bandwidth) == (40e9, 1e9)
    assert mr.Network.from_links([[0, 5], [5, 0]]).hosts[0] == 0
    assert "2 hosts" in repr(network)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no ranks": (lambda: mr.DeviceMesh((0, 2), ("a", "b")), "'shape'"),
    "a float": (lambda: mr.DeviceMesh((1.5,), ("a",)), "'shape'"),
    "a string": (lambda: mr.DeviceMesh("22", ("a", "b")), "'shape'"),
    "names missing": (lambda: mr.DeviceMesh((2, 2), ("a",)), "2 names are needed"),
    "no names": (lambda: mr.DeviceMesh((2, 2)), "2 names are needed"),
    "names repeat": (lambda: mr.DeviceMesh((2, 2), ("a", "a")), "repeat"),
    "ranks repeat": (lambda: mr.DeviceMesh(2, "a", ranks=[1, 1]), "different ranks"),
    "ranks of another shape": (lambda: mr.DeviceMesh(4, "a", ranks=[[0, 1], [2, 3]]), "shape"),
    "devices repeat": (lambda: mr.DeviceMesh([1, 1], mr.Linear()), "'device_ids'"),
    "topology too small": (lambda: mr.DeviceMesh([0, 1], mr.Grid2D(2, 2)), "'device_ids'"),
    "not a communicator": (lambda: mr.DeviceMesh(2, "a", 2), "'comm'"),  # type: ignore[arg-type]
    "axis unknown": (lambda: CUBE["ep"], "'ep'"),
    "axis twice": (lambda: CUBE["tp", "tp"], "each once"),
    "no place for the rest": (lambda: CUBE.slice("tp", {"pp": 0}), "'at'"),
    "place outside": (lambda: CUBE.slice("tp", {"pp": 0, "dp": 2}), "outside"),
    "coordinate too long": (lambda: CUBE.device_at((0, 0)), "3 axes"),
    "coordinate outside": (lambda: CUBE.rank_at((0, 0, 2)), "outside"),
    "coordinate lacks an axis": (lambda: CUBE.rank_at({"pp": 0}), "lacks"),
    "rank not on it": (lambda: CUBE.coordinate(8), "not on"),
    "no rank of this process": (lambda: CUBE.coordinate(), "no communicator"),
    "no communicator": (lambda: CUBE.comm("tp"), "no communicator"),
    "split": (lambda: CUBE.split("tp", (2, 2), ("a", "b")), "multiply to 4"),
    "reorder": (lambda: CUBE.reorder("tp", "dp"), "each of"),
    "merge": (lambda: CUBE.merge(()), "one or more"),
    "few hosts": (lambda: mr.DeviceMesh(9, "a", network=HOSTS), "'network'"),
    "hosts a string": (lambda: mr.Network("abc"), "'hosts'"),
    "links": (lambda: mr.Network.from_links([[0, 1], [2, 0]]), "symmetric"),
    "link": (lambda: mr.Link(0), "bandwidth > 0"),
    "traffic": (lambda: mr.DeviceMesh.arrange((8,), ("a",), HOSTS, {"b": 1}), "'traffic'"),
    "arrange": (lambda: mr.DeviceMesh.arrange((4,), ("a",), HOSTS, {}), "8 ranks"),
    "depth": (lambda: mr.DeviceMesh.from_strategy(S.HYBRID, 8, pipeline_depth=3), "divide 8"),
    "line": (lambda: mr.DeviceMesh.from_strategy(S.PIPELINE, 8, pipeline_depth=4), "8 stages"),
    "no depth": (lambda: mr.DeviceMesh.from_strategy(S.TENSOR, 8, pipeline_depth=4), "no stages"),
    "how many": (lambda: mr.DeviceMesh.from_strategy(S.TENSOR), "'num_devices'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_sentence(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(mr.UsageError) as caught:
        call()
    assert text in str(caught.value)
