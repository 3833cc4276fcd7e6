"""Pictures and traces: complete, well-formed, and legible for few and for many ranks."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import meshring as mr
from meshring.pipeline import picture
from meshring.pipeline.action import OpKind
from meshring.pipeline.timeline import EVENT

SVG = "{http://www.w3.org/2000/svg}"


def timeline(p: int, m: int, kind: str = "1f1b", **costs: float) -> mr.Timeline:
    return mr.PipelineSchedule(p, m, kind, num_ranks=p).simulate(**(costs or {"forward": 1.0}))


def words(path: Path) -> list[str]:
    return [node.text or "" for node in ET.parse(path).iter(f"{SVG}text")]


def boxes(t: mr.Timeline) -> list[tuple[str, np.ndarray]]:
    return picture.draw([t]).boxes


def test_svg_holds_every_operation_once(tmp_path: Path) -> None:
    t = timeline(4, 8)
    path = t.save(tmp_path / "a.svg")
    texts = words(path)
    for microbatch in range(8):
        numbers = [w for w in texts if w == str(microbatch)]
        assert len(numbers) >= 8, "a forward and a backward on each of four ranks"
    assert {"forward", "backward", "rank 0", "rank 3"} <= set(texts)
    assert any("bubble (makespan) 9 = 27.3%" in w and "bubble (span) 9" in w for w in texts)
    drawn = sum(len(b) for c, b in boxes(t) if c == picture.COLOURS[OpKind.FORWARD])
    assert drawn == 32 + 1, "and one in the legend"


def test_boxes_lie_where_the_events_are() -> None:
    t = timeline(4, 8)
    plot = 1200 - picture.LEFT - picture.RIGHT
    (first, *_) = [b for c, b in boxes(t) if c == picture.COLOURS[OpKind.BACKWARD]]
    rows = t.compute(0)
    rows = rows[rows["kind"] == OpKind.BACKWARD]
    assert np.allclose(first[:, 0], picture.LEFT + rows["start"] / t.makespan * plot)
    assert np.allclose(first[:, 2], 2 / t.makespan * plot, atol=0.7)


def test_64_ranks_have_rows_and_names_that_do_not_collide() -> None:
    drawing = picture.draw([timeline(64, 64)])
    names = [w for w in drawing.words if w.text.startswith("rank ")]
    assert len(names) == 64 and min(w.size for w in names) >= 6
    gaps = np.diff([w.y for w in names])
    assert gaps.min() >= max(w.size for w in names)
    assert drawing.height < 900


def test_1000_ranks_still_make_a_picture() -> None:
    events = np.zeros(1000, EVENT)
    events["rank"], events["end"] = np.arange(1000), 1.0
    drawing = picture.draw([mr.Timeline(1000, events)])
    assert drawing.height < 2000
    names = [w for w in drawing.words if w.text.startswith("rank ")]
    assert np.diff([w.y for w in names]).min() >= max(w.size for w in names)


def test_operations_finer_than_pixels_are_mixed_not_hidden() -> None:
    t = timeline(2, 3000)
    drawing = picture.draw([t])
    assert sum(len(b) for _, b in drawing.boxes) < 6000
    assert any("mixed colours" in w.text for w in drawing.words)
    colours = {c for c, _ in drawing.boxes}
    assert len(colours) > 4


def test_one_scale_and_colours_side_by_side(tmp_path: Path) -> None:
    one, two = timeline(2, 4), timeline(2, 4, forward=2.0)
    drawing = picture.draw([one, two])
    backs = [c for c, _ in drawing.boxes].index(picture.IDLE)
    assert backs == 0
    rows = [b[0] for c, b in drawing.boxes if c == picture.IDLE]
    assert rows[2][2] == pytest.approx(2 * rows[0][2]), "the same scale of time"
    path = one.save(tmp_path / "two.svg", beside=[two])
    assert words(path).count("rank 0") == 2


def test_overlapped_pairs_share_the_row() -> None:
    t = timeline(4, 10, "dualpipe")
    tall = {float(h) for c, b in boxes(t) for h in np.unique(b[:, 3]) if c != picture.IDLE}
    assert len(tall) >= 3, "whole rows, half rows, the legend"


def test_png_is_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="PNG needs matplotlib: pip install 'meshring[plot]'")
    from matplotlib.image import imread

    pixels = imread(timeline(4, 8, forward=1.0, comm=0.1).save(tmp_path / "a.png"))
    blue = np.array([0x3B, 0x75, 0xAF]) / 255
    share = (np.abs(pixels[..., :3] - blue) < 0.02).all(axis=-1).mean()
    assert 0.05 < share < 0.4


def test_png_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.collections", None)
    with pytest.raises(mr.UsageError, match=r"meshring\[plot\]"):
        timeline(2, 2).save(tmp_path / "a.png")


def test_trace_has_lanes_events_and_arrows(tmp_path: Path) -> None:
    schedule = mr.PipelineSchedule(4, 8).lower("buffered/pair")
    t = schedule.simulate(forward=1.0, backward=2.0, comm=0.25)
    data = json.loads(t.save(tmp_path / "a.trace").read_text())["traceEvents"]
    runs = [e for e in data if e["ph"] == "X"]
    assert len(runs) == t.events.size
    forward = next(e for e in runs if e["name"] == "1F0")
    assert forward["ts"] == pytest.approx(1250) and forward["dur"] == pytest.approx(1000)
    assert forward["args"] == {"stage": 1, "rank": 1, "microbatch": 0}
    names = {e["args"]["name"] for e in data if e["name"] == "thread_name"}
    assert {"rank 0 compute", "rank 3 send", "rank 3 receive"} <= names
    starts = {e["id"]: e for e in data if e["ph"] == "s"}
    ends = {e["id"]: e for e in data if e["ph"] == "f"}
    assert len(starts) == len(ends) == 2 * 3 * 8 and set(starts) == set(ends)
    assert all(ends[i]["ts"] > starts[i]["ts"] for i in starts)


def test_measured_seconds_become_microseconds(tmp_path: Path) -> None:
    events = np.zeros(1, EVENT)
    events["start"], events["end"] = 5.0, 5.002
    t = mr.Timeline(1, events, unit="s")
    data = json.loads(t.save(tmp_path / "a.json").read_text())["traceEvents"]
    (run,) = [e for e in data if e["ph"] == "X"]
    assert run["ts"] == 0 and run["dur"] == pytest.approx(2000)


def test_text_shows_every_operation_in_order() -> None:
    lines = timeline(4, 4).text(120).splitlines()
    assert lines[0].startswith("rank 0 F0") and len(lines) == 5
    for line in lines[:4]:
        for microbatch in range(4):
            assert f"F{microbatch}" in line and f"B{microbatch}" in line
        assert len(line) <= 120
    assert "bubble by makespan 9" in lines[4] and "by span 9" in lines[4]
    coloured = timeline(4, 4).text(120, colour=True)
    assert "\x1b[48;2;" in coloured and "F0" in coloured


def test_text_of_many_ranks_and_of_nothing() -> None:
    assert len(timeline(64, 64).text().splitlines()) == 65
    dense = timeline(2, 3000).text(80).splitlines()
    assert all(len(line) <= 80 for line in dense[:2])
    assert mr.Timeline(2, np.zeros(0, EVENT)).text().startswith("rank 0 ....")


def test_small_letters_for_every_second_stage() -> None:
    text = _interleaved().text(200)
    assert "F0" in text and "f0" in text


def _interleaved() -> mr.Timeline:
    return mr.PipelineSchedule(8, 4, "interleaved-1f1b", num_ranks=4).simulate()


def test_notebooks_get_svg() -> None:
    assert ET.fromstring(timeline(2, 2)._repr_svg_()).tag == f"{SVG}svg"


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.jpeg"])
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(mr.UsageError, match=r"\.svg, \.png"):
        timeline(2, 2).save(tmp_path / name)
    with pytest.raises(mr.UsageError, match="is no directory; create it"):
        timeline(2, 2).save(tmp_path / "no" / "a.svg")
    with pytest.raises(mr.UsageError, match="width"):
        timeline(2, 2).save(tmp_path / "a.svg", width=1)
