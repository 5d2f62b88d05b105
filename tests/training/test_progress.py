"""Time without pauses, and the line that a run prints where there is no terminal."""

import io

import rich.console

from gfa_jax.training import progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_paused_time_does_not_count():
    clock = Clock()
    chrono = progress.Chrono(clock)
    clock.now += 3
    with chrono.paused():
        clock.now += 50
        assert chrono.seconds == 3
    clock.now += 2
    assert chrono.seconds == 5


def test_a_pause_that_fails_still_ends():
    clock = Clock()
    chrono = progress.Chrono(clock)
    try:
        with chrono.paused():
            clock.now += 10
            raise KeyError
    except KeyError:
        clock.now += 1
    assert chrono.seconds == 1


def test_eta_counts_only_the_work_of_this_run():
    clock = Clock()
    console = rich.console.Console(file=io.StringIO(), width=200)
    shown = progress.Progress("train", total=100, done=40, console=console, line_every=0)
    shown.chrono = progress.Chrono(clock)
    clock.now += 10
    shown.update(50, "loss 1.0")
    text = console.file.getvalue()
    assert "train 50/100" in text
    assert "ETA 0:50" in text
    assert "loss 1.0" in text
    shown.close()


def test_formatting_of_seconds():
    assert progress.format_seconds(59.6) == "1:00"
    assert progress.format_seconds(3723) == "1:02:03"
