"""How much training a kill loses at most, by a clock that the test moves."""

import pytest

from src.training.checkpoint_schedule import CheckpointSchedule


def largest_loss(is_due, saving, clock, step_seconds, save_seconds, hours=10):
    """Return the most seconds of training that a kill at any moment loses, and the number of checkpoints.

    A save is written while training goes on, and published at the end of the first step after that.
    """
    published = pending = written = 0.0
    loss, num_saves = 0.0, 0
    while clock[0] < 3600 * hours:
        clock[0] += step_seconds
        loss = max(loss, clock[0] - published)  # killed just before the end of this step
        due = is_due()
        if pending and clock[0] >= written:
            published, pending = pending, 0.0
        if due:
            if pending:  # the next save waits for the one before
                clock[0] = written
                published = pending
            saving()
            num_saves += 1
            pending, written = clock[0], clock[0] + save_seconds
    return loss, num_saves


@pytest.mark.parametrize("minutes", [1.0, 20.0])
@pytest.mark.parametrize("step_seconds", [0.1, 2.0, 7.0])
@pytest.mark.parametrize("save_seconds", [0.1, 15.0, 25.0])
def test_a_kill_loses_at_most_the_configured_minutes(minutes, step_seconds, save_seconds):
    clock = [0.0]
    schedule = CheckpointSchedule(minutes, lambda: clock[0])

    def saving():
        schedule.saving()
        schedule.save_seconds = save_seconds

    hours = minutes / 2
    loss, num_saves = largest_loss(schedule.is_due, saving, clock, step_seconds, save_seconds, hours)
    # Half of the time is kept between saves, so that more is lost where a save and two steps take longer than that.
    assert loss <= max(60 * minutes, 30 * minutes + save_seconds + 2 * step_seconds) + 1e-6
    # Not much more often than it must be: a save and three steps before the end of the time.
    interval = max(60 * minutes - save_seconds - 3 * step_seconds, 30 * minutes)
    assert num_saves <= 3600 * hours / interval + 2


def test_a_schedule_that_ignores_what_a_save_takes_loses_more():
    """The negative control of the test above."""
    clock, last = [0.0], [0.0]
    loss, _ = largest_loss(
        lambda: clock[0] - last[0] >= 60, lambda: last.__setitem__(0, clock[0]), clock, 2.0, 15.0, hours=0.5
    )
    assert loss > 60 + 15


def test_with_zero_minutes_every_step_is_saved():
    schedule = CheckpointSchedule(0.0)
    assert [schedule.is_due() for _ in range(3)] == [True] * 3


def test_a_save_that_takes_longer_than_the_minutes_does_not_fill_the_training():
    clock = [0.0]
    schedule = CheckpointSchedule(10.0, lambda: clock[0])
    schedule.save_seconds = 3600.0
    schedule.saving()
    due = []
    for _ in range(120):
        clock[0] += 5.0
        due.append(schedule.is_due())
    assert due == [False] * 59 + [True] * 61
