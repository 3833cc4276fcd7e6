"""validate() refuses what is wrong and says where."""

from __future__ import annotations

import pytest

from meshring import UsageError
from meshring.pipeline import PipelineSchedule

GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1"
SPLIT = "0F0,0I0,0W0\n1F0,1I0,1W0"
SENT = (
    "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
    "1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1,1SEND_B1"
)


@pytest.mark.parametrize("text", [GOOD, SPLIT, SENT, "0F0,0F1\n1F0,1F1"])
def test_good_ones_pass(text: str) -> None:
    report = PipelineSchedule.from_csv(text).validate()
    assert report.ok and not report.problems
    assert "runs" in str(report) and "live activations" in str(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("0F1", "0F0"), "stage 0, microbatch 0: 2 forwards"),
        (GOOD.replace("1B1", "1B0"), "stage 1, microbatch 1: 0 B, 0 I, 0 W for 1 F"),
        (GOOD.replace(",1F1,1B1", ""), "stage 1, microbatch 1: 0 forwards"),
        (GOOD.replace("1F1,1B1", "1B1,1F1"), "F does not stand before its backward"),
        (SPLIT.replace("1I0,1W0", "1W0,1I0"), "I does not stand before W"),
        (SPLIT.replace("1I0,1W0", "1I0"), "1 I, 0 W"),
        (SPLIT.replace("0F0,0I0", "0F0,0I0,0R0"), "R does not stand before its backward"),
        (SPLIT.replace("0F0", "0R0,0F0"), "F does not stand before R"),
        (SPLIT.replace("0F0", "0F0,0R0,0R0"), "2 recomputations"),
        (GOOD.replace("0B1", "0REDUCE_GRAD,0B1"), "stands before the stage's last backward"),
        (GOOD.replace("0B1", "0B1,0REDUCE_GRAD,0REDUCE_GRAD"), "2 REDUCE_GRAD"),
        (GOOD.replace("0B1", "0UNSHARD,0B1"), "0F0 stands where its stage is sharded"),
        (GOOD.replace("0F0", "0UNSHARD,0UNSHARD,0F0"), "changes nothing"),
        (GOOD.replace("0F1,0B0", "0B0,0F1").replace("1F0,1B0,1F1", "1F1,1F0,1B0"), "deadlock"),
        (SENT.replace("0SEND_F1,", ""), "0 sends, 1 needed"),
        (SENT.replace("1RECV_F1", "1RECV_F0"), "2 receives, 1 needed"),
        (SENT.replace("0SEND_F0,0F1,0SEND_F1", "0F1,0SEND_F1,0SEND_F0"), "give both ends the same"),
        (SENT.replace("0SEND_F0", "0SEND_F0:1"), "is no operation"),
    ],
)
def test_wrong_ones_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PipelineSchedule.from_csv(text).validate()


def test_prints_the_cycle_of_a_deadlock() -> None:
    schedule = PipelineSchedule.from_csv(SENT)
    assert schedule.validate("buffered/one").ok
    with pytest.raises(UsageError) as caught:
        schedule.validate("rendezvous/one")
    assert (
        "deadlock under rendezvous/one:\n"
        "  rank 0: 0SEND_F1 waits for rank 1: 1RECV_F1, "
        "which stands behind rank 1: 1SEND_B0\n"
        "  rank 1: 1SEND_B0 waits for rank 0: 0RECV_B0, "
        "which stands behind rank 0: 0SEND_F1" in str(caught.value)
    )
    report = schedule.validate()
    assert report.deadlocks["rendezvous/one"] and not report.deadlocks["rendezvous/pair"]


def test_a_group_resolves_that_deadlock() -> None:
    grouped = SENT.replace("0F1,0SEND_F1,0RECV_B0", "0F1,(0SEND_F1;0RECV_B0)GROUP").replace(
        "1SEND_B0,1RECV_F1", "(1SEND_B0;1RECV_F1)GROUP"
    )
    report = PipelineSchedule.from_csv(grouped).validate()
    assert not any(report.deadlocks.values())


def test_a_swapped_pair_of_receives_shows_its_cycle() -> None:
    lowered = PipelineSchedule(3, 3).lower("buffered/one")
    swapped = (
        lowered.to_csv()
        .replace("1RECV_F0", "?")
        .replace("1RECV_F1", "1RECV_F0")
        .replace("?", "1RECV_F1")
    )
    with pytest.raises(UsageError) as caught:
        PipelineSchedule.from_csv(swapped).validate()
    text = str(caught.value)
    assert "message 0 is sent by 0SEND_F0 and received by 1RECV_F1" in text
    assert "rank 1: 1F0 waits for rank 1: 1RECV_F0, which stands behind rank 1: 1F0" in text


def test_says_what_no_operation_makes() -> None:
    text = "0F0,0B0\n1F0,1B0\n2B0,2F0"
    with pytest.raises(UsageError, match="waits for"):
        PipelineSchedule.from_csv(text.replace("1F0,1B0", "1B0")).validate()
    with pytest.raises(UsageError, match="which no operation receives"):
        PipelineSchedule.from_csv(SENT.replace("1RECV_F0,", "")).validate()


def test_torchs_known_defects_are_not_ours() -> None:
    """Forwards count from 0 on every rank; a duplicated action is refused; GPipe is lowered."""
    assert PipelineSchedule(4, 8).ranks[3][0].microbatch == 0
    lowered = PipelineSchedule(4, 4, "gpipe").lower("rendezvous/one")
    twice = lowered.to_csv().replace("2F1,", "2F1,2F1,", 1)
    with pytest.raises(UsageError, match="2 forwards"):
        PipelineSchedule.from_csv(twice).validate()
