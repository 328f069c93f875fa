"""When a plan is made again: measured far from estimated, long enough, and ever more rarely where plans flap."""
from __future__ import annotations

from genie_dynamo.passes.drift import BOUND, CALLS, FIRST_WAIT_S, MAX_WAIT_S, Drift, Membership


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def watched(est_s: float = 1.0) -> tuple[Drift, Clock]:
    clock = Clock()
    drift = Drift(clock)
    drift.planned({"w0": est_s, "w1": est_s}, changed=False)
    return drift, clock


def calls(drift: Drift, *, w0: float, w1: float = 1.0, count: int = CALLS) -> None:
    for _ in range(count):
        drift.observe({"w0": w0, "w1": w1})


def test_a_plan_that_does_as_estimated_is_left_alone() -> None:
    drift, clock = watched()
    clock.now_s += 10 * FIRST_WAIT_S
    calls(drift, w0=BOUND * 0.99, w1=1 / BOUND * 1.01)
    assert not drift.due() and drift.slowness == {}


def test_a_worker_slower_than_estimated_is_corrected_once_enough_calls_say_so() -> None:
    drift, clock = watched()
    clock.now_s += 2 * FIRST_WAIT_S
    calls(drift, w0=3.0, count=CALLS - 1)
    assert not drift.due()
    calls(drift, w0=3.0, count=1)
    assert drift.due() and drift.slowness["w0"] == 3.0 and drift.slowness["w1"] == 1.0
    # The next plan is estimated with the correction, and the same times are as expected then.
    drift.planned({"w0": 3.0, "w1": 1.0}, changed=False)
    clock.now_s += 1000
    calls(drift, w0=3.0)
    assert not drift.due()


def test_one_call_that_was_disturbed_changes_nothing() -> None:
    drift, clock = watched()
    clock.now_s += 2 * FIRST_WAIT_S
    calls(drift, w0=1.0, count=CALLS - 2)
    calls(drift, w0=50.0, count=2)
    assert not drift.due()


def test_faster_than_estimated_counts_too() -> None:
    drift, clock = watched()
    clock.now_s += 2 * FIRST_WAIT_S
    calls(drift, w0=0.2)
    assert drift.due() and drift.slowness["w0"] == 0.2


def test_nothing_is_looked_at_before_its_time() -> None:
    drift, clock = watched()
    calls(drift, w0=9.0)
    assert not drift.due()
    clock.now_s += FIRST_WAIT_S
    assert drift.due()


def test_plans_that_flap_are_made_ever_more_rarely_and_a_plan_that_holds_brings_the_first_wait_back() -> None:
    """A worker that is slow whenever work is put on it: each plan is wrong as soon as it is made."""
    drift, clock = watched()
    changes, started_s = 0, clock.now_s
    while clock.now_s < started_s + 3600:
        clock.now_s += 1.0
        calls(drift, w0=10.0 if changes % 2 == 0 else 0.1)
        if drift.due():
            changes += 1
            drift.planned({"w0": 1.0, "w1": 1.0}, changed=True)
    # 5 + 10 + 20 + ... : within an hour about log2(3600 / 5) changes, then one in ten minutes.
    assert 5 <= changes <= 14
    clock.now_s += 5 * MAX_WAIT_S
    calls(drift, w0=10.0)
    assert drift.due()
    drift.planned({"w0": 1.0, "w1": 1.0}, changed=True)
    calls(drift, w0=10.0)
    clock.now_s += FIRST_WAIT_S
    assert drift.due()


def test_a_new_plan_has_to_be_better_by_a_margin() -> None:
    assert not Drift.better(0.95, 1.0) and Drift.better(0.89, 1.0) and Drift.better(5.0, None)


def test_workers_that_come_are_planned_with_at_once_and_those_that_come_and_go_ever_more_rarely() -> None:
    clock = Clock()
    members = Membership(clock)
    assert members.settled("w0") and members.settled("w0 w1"), "the first look, and the first change"
    plans, incarnation, planned = 0, 0, ""
    started_s = clock.now_s
    while clock.now_s < started_s + 3600:
        clock.now_s += 1.0
        if clock.now_s % 10 == 0:
            incarnation += 1
        key = f"w0 w1.{incarnation}"
        if members.settled(key) and planned != key:
            plans, planned = plans + 1, key
    assert 1 <= plans <= 8, "of 360 incarnations"
    clock.now_s += 5 * MAX_WAIT_S
    assert members.settled(f"w0 w1.{incarnation}") and members.settled("w0"), "it has been quiet: at once again"
