import io

import pytest
from rich.console import Console

from loopwise.train.progress import Progress, Status, compact_count, compact_losses, compact_time, render


def test_the_whole_line():
    status = Status(
        step=1200,
        steps=5000,
        losses=[3.31, 3.12, 3.054, 3.0106],
        mean_exit=2.4,
        tokens_per_second=12_345.0,
        peak_share=0.634,
        learning_rate=3e-4,
        skipped=2,
        stage="stage I",
    )
    assert render(status, 250.2) == (
        "stage I · step 1,200/5,000 · loss 3.310 3.120 3.054 3.011 · exit 2.40 · 12.3k tok/s · 63% of peak · "
        "lr 3.0e-04 · skipped 2 · 4m10s left"
    )


def test_what_is_unknown_is_left_out():
    assert render(Status(step=0, steps=10, losses=[2.0]), None) == "step 0/10 · loss 2.000"


def test_many_loops_are_shortened():
    assert compact_losses([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == "1.000 2.000 3.000 4.000 5.000 6.000"
    assert compact_losses([float(loop) for loop in range(1, 33)]) == "1.000 2.000 3.000 4.000 … 32.000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.0, "12"), (999.4, "999"), (999.96, "1.0k"), (123_456.0, "123.5k"), (999_960.0, "1.0M"), (2e9, "2.0G")],
)
def test_counts(value, text):
    assert compact_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.6, "1m00s"), (250.0, "4m10s"), (11_100.0, "3h05m"), (187_200.0, "2d04h")],
)
def test_times(seconds, text):
    assert compact_time(seconds) == text


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def drive(progress, clock, seconds):
    with progress:
        for step in range(1, 11):
            clock.now += seconds
            progress.update(Status(step=step, steps=10, losses=[1.0 / step]))
            if step == 5:
                progress.note("saved [step 5]")


def test_a_log_file_gets_plain_lines_now_and_then():
    clock, out = Clock(), io.StringIO()
    drive(Progress(console=Console(file=out, width=20), every=30.0, clock=clock), clock, 10.0)
    assert out.getvalue() == (
        "step 1/10 · loss 1.000\n"
        "step 4/10 · loss 0.250 · 1m00s left\n"
        "saved [step 5]\n"
        "step 7/10 · loss 0.143 · 30s left\n"
        "step 10/10 · loss 0.100 · 0s left\n"
    )


def test_an_interrupted_run_leaves_its_last_status():
    clock, out = Clock(), io.StringIO()
    with Progress(console=Console(file=out), every=30.0, clock=clock) as progress:
        for step in (3, 4):
            clock.now += 1.0
            progress.update(Status(step=step, steps=10, losses=[1.0]))
    assert out.getvalue().splitlines()[-1] == "step 4/10 · loss 1.000 · 6s left"


def test_a_terminal_redraws_one_line_in_place():
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    drive(Progress(console=console, clock=clock), clock, 1.0)
    shown = out.getvalue()
    assert "\x1b[2K" in shown
    assert "step 10/10 · loss 0.100" in shown
    # Only the note and the last status move on to a new line.
    assert shown.count("\n") == 2
