"""Latency in blocks and sittings: orders, statistics and intervals, on simulated machines with a clock of their own."""

import gc
import itertools
import math
import random
import re
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compress.verification.call_blocks as blocks
import compress.verification.measurement as measuring
from compress.bundle import check
from compress.errors import DataError
from compress.progress import SilentProgress
from compress.verification.call_blocks import (
    alternate,
    count_sittings,
    median_of_blocks,
    plan_blocks,
    time_block,
    time_in_blocks,
    timed_positions,
)
from compress.verification.gates import Gates
from compress.verification.latency import (
    Calls,
    Comparison,
    LatencyRatio,
    LatencySample,
    Stopwatch,
    compare_latency,
    estimate_ratio,
    measure_latency,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from simulated_machine import SimulatedMachine, no_inputs  # it lies beside the benchmarks, outside the package

sys.path.pop(0)


def compare(machine, models, **options):
    return compare_latency(models, no_inputs, Calls(3, 100), stopwatch=machine.stopwatch, **options)


def opened(log):
    return [line.removeprefix("open ") for line in log if line.startswith("open ")]


# blocks


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 8, 9, 100])
def test_blocks_hold_all_calls_and_are_of_nearly_the_same_size(calls):
    sizes = plan_blocks(calls)
    assert sum(sizes) == calls
    assert len(sizes) == max(1, min(4, calls // 2))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("opening_s", "count"), [(0.0, 6), (0.01, 6), (20 / 6, 6), (3.4, 5), (7.0, 2), (20.0, 1), (500.0, 1)]
)
def test_what_takes_long_to_open_is_opened_less_often(opening_s, count):
    assert count_sittings(opening_s) == count


def test_a_block_leaves_out_its_first_call():
    now, took = [0.0], iter([0.5, 0.001, 0.002, 0.003])

    def call():
        now[0] += next(took)

    assert time_block(call, 3, lambda: now[0]) == pytest.approx([1.0, 2.0, 3.0])


def test_the_value_of_a_sitting_is_the_median_of_its_blocks_medians():
    assert median_of_blocks([[1.0, 1.0, 9.0], [2.0, 2.0], [30.0, 40.0]]) == 2.0
    assert median_of_blocks([[1.0, 3.0], [4.0, 6.0]]) == 3.5


def test_every_second_order_is_the_one_before_it_reversed():
    orders = list(itertools.islice(alternate("abc", 0), 40))
    for order, back in zip(orders[::2], orders[1::2], strict=True):
        assert sorted(order) == list("abc")
        assert back == order[::-1]
    assert len(set(orders[::2])) > 3
    assert orders == list(itertools.islice(alternate("abc", 0), 40))
    assert orders != list(itertools.islice(alternate("abc", 1), 40))


@pytest.mark.parametrize("labels", ["a", "ab", "abc", "abcd"])
@pytest.mark.parametrize("seed", range(5))
def test_in_every_2n_orders_each_label_stands_at_each_place_twice(labels, seed):
    count = 2 * len(labels)
    orders = alternate(labels, seed)
    for _ in range(4):
        some = list(itertools.islice(orders, count))
        for place in range(len(labels)):
            assert Counter(order[place] for order in some) == dict.fromkeys(labels, 2)


def test_timed_positions_are_those_of_the_calls_that_count():
    made, clock = [], [0.0]

    def call():
        made.append(clock[0])
        clock[0] += 1 + len(made)

    sizes = plan_blocks(11)
    blocks = time_in_blocks({"a": call}, sizes, alternate(["a"], 0), lambda: clock[0])["a"]
    took = np.diff([*made, clock[0]]) * 1e3
    assert [ms for block in blocks for ms in block] == pytest.approx(took[timed_positions(sizes)])


def test_garbage_is_not_collected_within_calls_and_is_again_after_them():
    seen = []
    time_in_blocks({"a": lambda: seen.append(gc.isenabled())}, [2], alternate(["a"], 0), lambda: 0.0)
    assert seen == [False] * 3
    assert gc.isenabled()
    gc.disable()
    try:
        time_in_blocks({"a": list}, [1], alternate(["a"], 0), lambda: 0.0)
        assert not gc.isenabled()
    finally:
        gc.enable()

    def fails():
        raise ValueError("no call")

    with pytest.raises(ValueError, match="no call"):
        time_in_blocks({"a": fails}, [1], alternate(["a"], 0), lambda: 0.0)
    assert gc.isenabled()


# one sitting of open models


def test_open_models_are_timed_in_blocks_whose_order_alternates():
    machine = SimulatedMachine.quiet()
    with machine.model("a", 1.0)() as a, machine.model("b", 1.0)() as b:
        samples = measure_latency({"a": a, "b": b}, dict.fromkeys("ab", no_inputs(a)), warmup=2, repeats=4)
    calls = "".join(line for line in machine.log if len(line) == 1)
    assert calls[:4] == "abab"
    assert calls[4:] in ("aaabbbbbbaaa", "bbbaaaaaabbb"), "a call that does not count, two that do"
    assert [len(sample.milliseconds) for sample in samples.values()] == [4, 4]
    assert all(value > 0 for value in samples["a"].milliseconds)


class Heard(SilentProgress):
    """Remembers the tasks, and how far each came."""

    def __init__(self):
        self.tasks = []

    @contextmanager
    def task(self, label, total):
        self.tasks.append([label, total, 0])
        yield SimpleNamespace(advance=self.advance)

    def advance(self, steps=1):
        self.tasks[-1][2] += steps


def test_progress_is_told_of_all_there_is_to_do():
    machine, progress = SimulatedMachine.quiet(), Heard()
    with machine.model("a", 1.0)() as a:
        measure_latency({"a": a}, {"a": no_inputs(a)}, 3, 8, progress)
    assert progress.tasks == [["latency", 3 + 4, 3 + 4]]
    progress = Heard()
    machine = SimulatedMachine.quiet(session=0.2)
    models = {name: machine.model(name, 1.0) for name in "ab"}
    compare(machine, models, progress=progress, is_close=lambda _ratio: True)
    assert progress.tasks == [
        ["latency", 6, 6],
        ["latency, for longer", 6, 6],
        ["latency, for longer", 6, 6],
        ["latency, with pauses", 6, 6],
    ]


def test_latency_refuses_to_measure_nothing():
    with pytest.raises(DataError, match="at least one model and call, got 0 and 5"):
        measure_latency({}, {}, 0, 5)
    with pytest.raises(DataError, match="got 1 and 0"):
        compare_latency({"a": SimulatedMachine().model("a", 1.0)}, no_inputs, Calls(0, 0))


# samples


def test_p95_needs_twenty_calls():
    sample = LatencySample(tuple(float(value) for value in range(1, 101)))
    wanted = {"p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01}
    assert sample.to_metrics() == {name: pytest.approx(value) for name, value in wanted.items()}
    for count, names in (
        (9, {"p50"}),
        (10, {"p50", "p90"}),
        (20, {"p50", "p90", "p95"}),
        (99, {"p50", "p90", "p95"}),
        (100, {"p50", "p90", "p95", "p99"}),
    ):
        assert set(LatencySample((1.0,) * count).to_metrics()) == names


def test_p50_is_the_median_of_the_sittings():
    sample = LatencySample((1.0, 1.0, 1.0, 2.0, 5.0), (1.0, 2.0, 5.0))
    assert sample.p50 == sample.to_metrics()["p50"] == 2.0


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says():
    source = random.Random(0)
    for count in (6, 12, 60):
        held = 0
        for _ in range(500):
            values = tuple(source.expovariate(1.0) for _ in range(count))
            low, high = LatencySample(values, values).p50_interval
            held += low <= math.log(2) <= high
        assert 0.93 <= held / 500 <= 0.99, count
    assert LatencySample((3.0, 1.0, 2.0)).p50_interval == (1.0, 3.0)
    assert LatencySample((), tuple(map(float, range(1, 7)))).p50_interval == (1.0, 6.0)
    assert LatencySample((), tuple(map(float, range(1, 13)))).p50_interval == (3.0, 10.0)


def test_few_sittings_have_a_wide_interval_and_one_alone_a_guess():
    low, high = LatencySample((), (1.0, 1.1)).p50_interval
    middle, half = math.log(1.1) / 2, 12.7062 * math.log(1.1) / 2
    assert (low, high) == (pytest.approx(math.exp(middle - half), 1e-4), pytest.approx(math.exp(middle + half), 1e-4))
    assert LatencySample((), (2.0,)).p50_interval == pytest.approx((2 / 1.05, 2.1))
    low, high = LatencySample((), (1.0, 1.0, 1.0, 1.0, 3.0)).p50_interval
    assert low < 1.0 < 3.0 <= high, "never narrower than the sittings themselves"


# ratios


def test_the_interval_of_a_ratio_is_students_t_of_the_logarithms():
    ratio = estimate_ratio([0.5, 0.5 * math.e**0.02])
    assert ratio.value == pytest.approx(0.5 * math.e**0.01)
    assert ratio.error == pytest.approx(0.01)
    assert math.log(ratio.high / ratio.value) == pytest.approx(12.7062 * 0.01, 1e-4)
    assert ratio.low * ratio.high == pytest.approx(ratio.value**2)
    assert (ratio.sittings, ratio.control) == (2, None)
    six = estimate_ratio([1.0, 1.0, 1.0, 1.03, 1.03, 1.03])
    assert six.error == pytest.approx(math.log(1.03) / 2 * math.sqrt(6 / 5) / math.sqrt(6))
    assert math.log(six.high / six.value) == pytest.approx(2.57058 * six.error, 1e-4)


def test_a_ratio_is_no_surer_than_the_same_file_against_itself():
    ratios = [0.5, 0.501, 0.499, 0.5, 0.5, 0.5]
    alone = estimate_ratio(ratios)
    narrow = LatencyRatio(1.0, 0.9999, 1.0001, 1e-5)
    assert estimate_ratio(ratios, control=narrow).high == alone.high
    wide = estimate_ratio(ratios, control=LatencyRatio(1.0, 0.98, 1.02, 0.01))
    assert wide.high / wide.low == pytest.approx(1.02 / 0.98)
    off = estimate_ratio(ratios, control=LatencyRatio(0.95, 0.9499, 0.9501, 1e-5))
    assert off.high / off.value == pytest.approx(1 / 0.95)
    assert off.value / off.low == pytest.approx(1 / 0.95)
    assert (off.value, off.error) == (alone.value, alone.error)


def test_one_sitting_alone_is_not_taken_to_be_sure():
    alike = estimate_ratio([0.8], [0.8] * 4)
    assert (alike.sittings, alike.value) == (1, pytest.approx(0.8))
    assert (alike.low, alike.high) == (pytest.approx(0.8 / 1.05), pytest.approx(0.84))
    assert alike.error == 0.025
    apart = estimate_ratio([0.8], [0.7, 0.9, 0.6, 1.0])
    assert apart.high > 1.0
    assert apart.error > 0.05
    assert estimate_ratio([0.8]).high == pytest.approx(0.84)


def test_a_quiet_machine_gives_the_ratio_itself():
    machine = SimulatedMachine.quiet()
    found = compare(machine, {"slim": machine.model("slim", 1.0), "baseline": machine.model("baseline", 4.0)})
    assert found.ratio == LatencyRatio(*[pytest.approx(0.25)] * 3, pytest.approx(0.0), 6, None)
    assert found.samples["slim"].sittings == pytest.approx((1.0,) * 6)
    assert found.samples["baseline"].p50 == pytest.approx(4.0)
    assert set(found.samples) == {"slim", "baseline"}


def test_every_timed_call_follows_one_of_the_same_model():
    machine = SimulatedMachine.quiet(cold=0.5)
    found = compare(machine, {"a": machine.model("a", 1.0), "b": machine.model("b", 1.0)}, has_control=True)
    for sample in found.samples.values():
        assert sample.milliseconds == pytest.approx([1.0] * len(sample.milliseconds))


def test_the_order_of_opening_does_not_decide():
    machine = SimulatedMachine.quiet(first_opened=0.05)
    found = compare(machine, {"a": machine.model("a", 1.0), "b": machine.model("b", 1.0)})
    assert found.ratio.value == pytest.approx(1.0, abs=1e-9)
    order = opened(machine.log)
    assert Counter(order[::2]) == {"a": len(order) // 4, "b": len(order) // 4}
    assert found.ratio.low < 1.0 < found.ratio.high, "what it is not sure of is in the interval"


def test_a_machine_that_changes_its_speed_within_a_sitting_does_not_spoil_the_ratio():
    """Two blocks of a round are neighbours in time; medians over the whole sitting would be of different speeds."""
    exact = 0
    for seed in range(10):
        machine = SimulatedMachine.quiet(slow=2.0, dwell_s=1.5, seed=seed)
        found = compare(machine, {"a": machine.model("a", 5.0), "b": machine.model("b", 10.0)})
        assert len({round(value, 6) for value in found.samples["a"].milliseconds}) > 1, "it did change"
        exact += found.ratio.value == pytest.approx(0.5, rel=1e-6)
    assert exact >= 8


def test_the_control_is_the_second_model_opened_once_more():
    machine = SimulatedMachine.quiet(session=0.01, seed=3)
    models = {"slim": machine.model("slim", 1.0), "baseline": machine.model("baseline", 2.0)}
    found = compare(machine, models, has_control=True)
    control = found.ratio.control
    assert control is not None
    assert control.value != 1.0
    assert control.value == pytest.approx(1.0, abs=0.03)
    assert Counter(opened(machine.log)) == {"slim": found.ratio.sittings, "baseline": 2 * found.ratio.sittings}
    assert set(found.samples) == {"slim", "baseline"}
    assert re.fullmatch(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", str(control))


def test_one_model_alone_is_opened_six_times_and_compared_with_nothing():
    machine = SimulatedMachine.quiet()
    found = compare(machine, {"file": machine.model("file", 2.0)}, has_control=True)
    assert found.ratio is None
    assert len(found.samples["file"].sittings) == len(opened(machine.log)) == 6


@pytest.mark.parametrize(("milliseconds", "share"), [(0.1, 5.0), (20.0, 1.0), (40.0, 0.5), (1000.0, 0.2)])
def test_fast_models_are_called_more_often(milliseconds, share):
    machine = SimulatedMachine.quiet()
    models = {name: machine.model(name, milliseconds) for name in "ab"}
    found = compare(machine, models)
    assert len(found.samples["a"].milliseconds) == 6 * math.ceil(share * 100 / 6)
    more = compare_latency(models, no_inputs, Calls(1, 310), stopwatch=machine.stopwatch).samples["a"]
    assert len(more.milliseconds) == 6 * math.ceil(share * 310 / 6)


def test_a_slow_model_alone_gets_the_calls_that_were_asked_for():
    machine = SimulatedMachine.quiet()
    found = compare_latency({"a": machine.model("a", 200.0)}, no_inputs, Calls(1, 102), stopwatch=machine.stopwatch)
    assert len(found.samples["a"].milliseconds) == 102


def test_calls_before_the_blocks_are_as_asked_and_few_of_slow_models_when_they_are_opened_again():
    def calls_of_each_sitting(milliseconds, warmup):
        machine = SimulatedMachine.quiet()
        compare_latency(
            {"a": machine.model("a", milliseconds)}, no_inputs, Calls(warmup, 6), stopwatch=machine.stopwatch
        )
        text = "".join("|" if line.startswith("open") else "." for line in machine.log)
        return [len(part) for part in text.split("|")[1:]]

    first, *others = calls_of_each_sitting(1000.0, 10)
    blocks = 1 + 1  # one call that does not count, one that does
    assert (first, others) == (10 + blocks, [1 + blocks] * 5)
    first, *others = calls_of_each_sitting(20.0, 10)
    assert (first - others[0], len(set(others))) == (10 - 2, 1)
    first, *others = calls_of_each_sitting(0.1, 10)
    assert {first, *others} == {first}
    assert calls_of_each_sitting(1000.0, 0)[0] == 1 + blocks


@pytest.mark.parametrize(("session", "sittings"), [(0.0, {6}), (0.01, {6}), (0.03, {12, 18}), (0.2, {18})])
def test_a_ratio_is_measured_longer_where_sittings_differ(session, sittings):
    for seed in range(5):
        machine = SimulatedMachine.quiet(session=session, seed=seed)
        ratio = compare(machine, {"a": machine.model("a", 1.0), "b": machine.model("b", 1.0)}).ratio
        assert ratio.sittings in sittings
        assert ratio.error <= 0.01 or ratio.sittings == 18


@pytest.mark.parametrize(("open_s", "sittings"), [(0.1, 6), (2.0, 5), (5.0, 2), (30.0, 1)])
def test_models_that_are_slow_to_open_have_fewer_sittings_and_say_so(open_s, sittings):
    machine = SimulatedMachine.quiet(open_s=open_s, session=0.001)
    models = {"a": machine.model("a", 1.0), "b": machine.model("b", 1.0)}
    found = compare(machine, models, is_close=lambda _ratio: True)
    assert found.ratio.sittings == (7 if sittings == 6 else sittings), "nor are more made for a close limit"
    assert len(found.samples["a"].milliseconds) >= 500, "the calls are made all the same"
    (gate,) = Gates(min_speedup=0.5).check_speed(found.samples["a"], found.ratio, "1 thread")
    assert ("opening takes too long for more" in gate.detail) == (sittings == 1)
    if sittings == 1:
        assert found.ratio.high / found.ratio.value == pytest.approx(1.05)


def test_a_close_ratio_is_measured_in_sittings_with_pauses_and_those_at_once_count_as_one():
    machine, asked = SimulatedMachine.quiet(slow=1.5, dwell_s=4.0, seed=1), []
    waited = []

    def wait(seconds):
        waited.append(seconds)
        machine.advance(seconds)

    def is_close(ratio):
        asked.append(ratio)
        return True

    models = {"slim": machine.model("slim", 1.0, reaction=1.4), "baseline": machine.model("baseline", 2.0)}
    watch = Stopwatch(lambda: machine.now, wait)
    found = compare_latency(models, no_inputs, Calls(1, 10), is_close=is_close, stopwatch=watch)
    (first,) = asked
    assert waited == [3.0] * 6
    assert first.sittings == 6
    assert found.ratio.sittings == 7
    assert len(found.samples["slim"].sittings) == 12
    states = {0.5, 0.5 * 1.5**0.4}
    assert any(first.value == pytest.approx(state) for state in states), "one state of the machine is seen at once"
    assert min(states) < found.ratio.value < max(states)
    assert found.ratio.low < machine.true_ratio((1.0, 1.4), (2.0, 1.0)) < found.ratio.high


def test_a_file_against_itself_is_as_fast_whatever_is_named_first():
    ratios, held = {"ab": [], "ba": []}, 0
    for seed in range(60):
        machine = SimulatedMachine(seed=seed)
        order = "ab" if seed % 2 else "ba"
        found = compare(machine, {name: machine.model(name, 0.5) for name in order}, has_control=True)
        ratios[order].append(found.ratio.value)
        held += found.ratio.low <= 1 <= found.ratio.high
    for order, values in ratios.items():
        assert np.median(values) == pytest.approx(1.0, abs=0.003), order
    assert held >= 57


@pytest.mark.parametrize("true_speedup", [1.3 * 1.05, 1.3 / 1.05])
def test_the_verdict_on_speed_is_the_same_each_time(true_speedup):
    """Ten verifications on a noisy machine, five percent away from the gate."""
    gates, verdicts = Gates(min_speedup=1.3), set()
    for seed in range(10):
        machine = SimulatedMachine(seed=seed, jitter=0.1)
        models = {"slim": machine.model("slim", 1.0), "baseline": machine.model("baseline", true_speedup)}
        found = compare(machine, models, has_control=True, is_close=gates.is_close_to_speed)
        (gate,) = gates.check_speed(found.samples["slim"], found.ratio, "")
        verdicts.add(gate.status)
    assert verdicts == {"pass" if true_speedup > 1.3 else "fail"}


# the check that a bundle carries


def test_the_check_of_a_bundle_holds_the_same_arithmetic_word_for_word():
    def shared(module):
        text = Path(module.__file__).read_text(encoding="utf-8")
        (part,) = re.findall(r"# -- begin of the arithmetic shared .*?# -- end of the arithmetic shared ", text, re.S)
        return part

    assert shared(check) == shared(blocks)


@pytest.mark.parametrize(("milliseconds", "open_s"), [(0.3, 0.01), (0.3, 5.5), (30.0, 0.01)])
def test_the_check_of_a_bundle_measures_the_same_on_the_same_machine(milliseconds, open_s):
    """Both do the same at the same time: every call, and so all noise, is the same."""
    verifying, checking = (SimulatedMachine(seed=7, open_s=open_s) for _ in range(2))
    sample = compare_latency(
        {"file": verifying.model("file", milliseconds)}, no_inputs, Calls(10, 60), stopwatch=verifying.stopwatch
    ).samples["file"]
    sessions = []

    def next_call():
        while sessions:
            sessions.pop().__exit__(None, None, None)
        sessions.append(checking.model("file", milliseconds)().__enter__())
        return lambda _inputs: sessions[0].run(no_inputs(sessions[0]))

    found = check.measure_latency(next_call, open_s, None, len(sample.milliseconds), lambda: checking.now)
    assert checking.log == verifying.log
    assert tuple(found) == pytest.approx(sample.sittings, rel=1e-9)
    assert len(found) == count_sittings(open_s)


@pytest.mark.parametrize("repeats", [1, 4, 50])
def test_the_check_of_a_bundle_makes_as_many_calls_as_it_is_asked_for(repeats):
    made = []
    found = check.measure_latency(lambda: made.append, 0.0, "inputs", repeats, lambda: len(made) / 1e3)
    assert len(found) == min(6, repeats)
    parts = [repeats // len(found) + (number < repeats % len(found)) for number in range(len(found))]
    assert len(made) == 10 * len(found) + sum(len(plan_blocks(calls)) + calls for calls in parts)
    assert found == pytest.approx([1.0] * len(found))


# what is said


def test_a_noisy_machine_is_warned_of(monkeypatch):
    def found(error, sittings=18):
        timed = LatencySample((1.0,) * 90)
        return Comparison({"file": timed, "reference": timed}, LatencyRatio(0.5, 0.4, 0.6, error, sittings))

    progress, warnings = SilentProgress(), []
    monkeypatch.setattr(progress, "warn", warnings.append)
    for comparison in (found(0.0149), found(0.0151), found(0.025, 1)):
        monkeypatch.setattr(measuring, "time_files", lambda *_others, one=comparison: one)
        assert measuring.measure_ratio(Path("a"), Path("b"), None, measuring.Conditions(), progress) == 0.5
    first, second = warnings
    assert "A latency of 0.500 of another's is known to within 1.5% of it only, after 90 calls in 18 sittings" in first
    assert "raise deploy.repeats (100 now)" in first
    assert "after 90 calls in 1 sitting:" in second


def test_a_gate_on_speed_states_the_baseline_against_itself():
    control = LatencyRatio(1.001, 0.998, 1.004, 0.001)
    ratio = LatencyRatio(0.5, 0.49, 0.51, 0.004, 6, control)
    sample = LatencySample((1.0,), (0.9, 1.0, 1.1))
    speed, latency = Gates(min_speedup=1.5, max_latency_ms=2.0).check_speed(sample, ratio, "1 thread")
    assert speed.detail == (
        "6 sittings side by side (1 thread); the baseline against itself in the same run: 1.001 (0.998 to 1.004); "
        "with 95 % confidence from 1.9608 to 2.0408"
    )
    assert latency.detail.startswith("median of 3 sittings (1 thread)")
    assert latency.value == 1.0
