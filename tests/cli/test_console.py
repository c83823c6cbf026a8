"""What the console writes where: plain lines, terminals, quiet."""

import io
from dataclasses import replace

import pytest

from compress.cli.console import Console
from compress.errors import ConfigValueError
from compress.model.artifacts import CheckResult, ModelMetrics, Verdict


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Screen:
    """A console with streams to look at."""

    def __init__(self, quiet: bool = False, terminal: bool = False) -> None:
        kind = Terminal if terminal else io.StringIO
        self.out, self.err, self.clock = kind(), kind(), Clock()
        self.console = Console(quiet, self.out, self.err, self.clock)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def figures(scale: int) -> ModelMetrics:
    return ModelMetrics(
        1_000_000 * scale, 5_000 * scale, 40_000 * scale, {"top1": 0.95 + 0.01 * scale}, {"p50": 1.5 * scale}
    )


def verdict(*checks: CheckResult, required: tuple[str, ...] = ()) -> Verdict:
    return Verdict(checks, required, figures(1), figures(2))


PARITY = CheckResult("parity", "pass", 1.25e-6, 1e-3, "", "64 images")
SPEED = CheckResult("min_speedup", "fail", 1.1, 1.2, "x", "slower than asked")
SKIPPED = CheckResult("top1", "skipped", None, 0.01, "share", "no images")


def test_plain_task_writes_a_line_every_five_seconds_and_a_closing_one() -> None:
    screen = Screen()
    with screen.console.task("finetune", 10) as task:
        for step in range(10):
            screen.clock.now += 2.0
            task.advance(1, loss=f"0.{9 - step}")
    assert screen.lines == [
        "finetune: 3/10 (30 %), loss 0.7, 0:00:14 left",
        "finetune: 6/10 (60 %), loss 0.4, 0:00:08 left",
        "finetune: 9/10 (90 %), loss 0.1, 0:00:02 left",
        "finetune: done in 20.0 s",
    ]


def test_what_was_done_before_a_resume_does_not_count_as_speed() -> None:
    screen = Screen()
    with screen.console.task("finetune", 100) as task:
        task.advance(80)
        for _ in range(4):
            screen.clock.now += 6.0
            task.advance(1)
    assert screen.lines[:2] == ["finetune: 81/100 (81 %), 0:01:54 left", "finetune: 82/100 (82 %), 0:01:48 left"]


def test_plain_task_of_no_units_and_of_quick_ones_is_one_line() -> None:
    screen = Screen()
    with screen.console.task("empty", 0):
        pass
    with screen.console.task("quick", 1000) as task:
        for _ in range(1000):
            task.advance()
    assert screen.lines == ["empty: done in 0.0 s", "quick: done in 0.0 s"]


def test_task_that_fails_says_that_it_stopped() -> None:
    screen = Screen()
    with pytest.raises(KeyError, match="gone"), screen.console.task("export", 3):  # noqa: PT012
        screen.clock.now += 75
        raise KeyError("gone")
    assert screen.lines == ["export: stopped in 1 min 15 s"]


def test_terminal_draws_nested_tasks_and_leaves_closing_lines() -> None:
    screen = Screen(terminal=True)
    with screen.console.task("outer [a]", 2) as outer:
        outer.advance(loss="0.5")
        with screen.console.task("inner", 1) as inner:
            inner.advance()
            screen.console.warn("careful [b]")
    text = screen.out.getvalue()
    assert text.index("Warning: careful [b]") < text.index("inner: done in 0.0 s") < text.index("outer [a]: done in")
    assert "\x1b[?25h" in text  # the cursor is shown again
    screen.console.note("after")
    assert screen.out.getvalue().rstrip().endswith("after")


def test_quiet_prints_warnings_errors_and_verdict_only() -> None:
    screen = Screen(quiet=True)
    screen.console.note("hello")
    with screen.console.task("work", 1) as task:
        screen.clock.now += 60
        task.advance()
    assert screen.lines == []
    screen.console.warn("watch out")
    screen.console.print_error(ConfigValueError("a.yaml:1:1: wrong.", hint="mend it."))
    assert screen.err.getvalue() == "Warning: watch out\na.yaml:1:1: wrong.\nHint: mend it.\n"
    screen.console.print_verdict(verdict(PARITY))
    assert screen.lines[-1] == "PASSED: 1 check made, none failed."


def test_verdict_shows_every_check_and_both_networks() -> None:
    screen = Screen()
    screen.console.print_verdict(verdict(PARITY, SPEED, SKIPPED))
    assert screen.lines == [
        "Checks:",
        "  check        status      value  limit  unit",
        "  parity       pass     1.25e-06  0.001",
        "  min_speedup  fail          1.1    1.2  x",
        "  top1         skipped         -   0.01  share",
        "  min_speedup: slower than asked",
        "  top1: no images",
        "Before and after:",
        "  metric             baseline       slim  change",
        "  MACs              2,000,000  1,000,000  2.00x fewer",
        "  params               10,000      5,000  2.00x fewer",
        "  size (MB)             0.080      0.040  2.00x smaller",
        "  top1 (%)              97.00      96.00  -1.00 percentage points",
        "  latency p50 (ms)      3.000      1.500  2.00x faster",
        "FAILED: min_speedup failed, of 2 checks made.",
    ]


def test_lines_of_a_verdict_fit_eighty_columns() -> None:
    long = replace(SPEED, detail="seven sittings side by side " * 8)
    plain = [replace(PARITY, name=f"check_number_{number}", limit=None) for number in range(12)]
    screen = Screen()
    screen.console.print_verdict(verdict(PARITY, long, *plain))
    assert max(map(len, screen.lines)) < 80
    text = " ".join(line.strip() for line in screen.lines)
    assert "seven sittings side by side " * 7 in text, "nothing is cut off"
    assert "also passed: check_number_0, check_number_1, " in text


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (verdict(PARITY, PARITY), "PASSED: 2 checks made, none failed."),
        (verdict(), "FAILED: nothing was checked."),
        (verdict(SKIPPED), "FAILED: nothing was checked."),
        (verdict(PARITY, SKIPPED, required=("top1",)), "FAILED: top1 not made, of 1 check made."),
        (verdict(SPEED, SKIPPED, required=("top1",)), "FAILED: min_speedup failed and top1 not made, of 1 check made."),
    ],
)
def test_verdict_sentence_never_passes_what_was_not_checked(outcome: Verdict, sentence: str) -> None:
    screen = Screen()
    screen.console.print_verdict(outcome)
    assert screen.lines[-1] == sentence
    assert sentence.startswith("PASSED") == outcome.passed


def test_verdict_without_values_has_no_table_of_them() -> None:
    screen = Screen()
    screen.console.print_verdict(Verdict((PARITY,), (), None, None))
    assert "Before and after:" not in screen.lines


def test_tables_on_a_terminal_hold_the_same_cells_and_no_markup_is_read() -> None:
    screen = Screen(terminal=True)
    screen.console.print_table("layers", ("name", "MACs"), [("conv[red]", 12), ("fc", 3)])
    text = screen.out.getvalue()
    assert "conv[red]" in text
    assert "12" in text
    plain = Screen()
    plain.console.print_table("layers", ("name", "MACs"), [("conv[red]", 12), ("fc", 3)])
    assert plain.lines == ["layers:", "  name       MACs", "  conv[red]    12", "  fc            3"]


def test_plan_lists_status_and_reasons() -> None:
    screen = Screen()
    screen.console.print_plan([("load", "unchanged", ""), ("prune", "run", "target changed")])
    assert screen.lines[2:] == ["  load   unchanged", "  prune  run        target changed"]
