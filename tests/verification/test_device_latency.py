"""Files timed in turn by a command: order, number of sittings, ratio and its interval."""

import random
from pathlib import Path

import pytest
from fixtures import RecordingProgress

from compress.errors import DataError, InternalError
from compress.progress import SilentProgress
from compress.verification.device_command import DeviceCommand, DeviceTimes
from compress.verification.device_latency import compare_on_device
from compress.verification.latency import Stopwatch
from compress.verification.measurement import Conditions, time_on_device

FILES = {"slim": Path("slim.onnx"), "baseline": Path("baseline.onnx")}


class Device:
    """A device with a clock, noise, and a speed that changes from call to call."""

    def __init__(self, noise: float = 0.0, seconds: float = 1.0, drift: float = 0.0) -> None:
        self.noise, self.seconds, self.drift = noise, seconds, drift
        self.calls: list[str] = []
        self.now = 0.0
        self.random = random.Random(0)

    def __call__(self, path: Path) -> DeviceTimes:
        self.calls.append(path.stem)
        self.now += self.seconds
        speed = (1 + self.drift) ** len(self.calls)
        base = {"slim": 6.0, "baseline": 10.0}[path.stem] * speed
        return DeviceTimes(tuple(base * self.random.gauss(1, self.noise) for _ in range(3)), "toy 1.0")

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.now, pytest.fail)


def test_files_are_timed_in_turn_and_compared() -> None:
    device = Device()
    found = compare_on_device(FILES, device, stopwatch=device.stopwatch)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(0.6)
    assert found.ratio.sittings == 6
    assert found.samples["slim"].p50 == 6.0
    assert len(found.samples["slim"].milliseconds) == 18
    assert found.runtime == "toy 1.0"
    assert [sorted(device.calls[place : place + 2]) for place in range(0, 12, 2)] == [["baseline", "slim"]] * 6
    assert device.calls[:12:2].count("slim") == 3, "each is first as often as the other"


def test_the_baseline_is_compared_with_itself() -> None:
    device = Device(noise=0.01)
    found = compare_on_device(FILES, device, stopwatch=device.stopwatch, has_control=True)
    assert found.ratio is not None
    assert found.ratio.control is not None
    assert found.ratio.control.value == pytest.approx(1, abs=0.02)
    assert set(found.samples) == {"slim", "baseline"}
    assert device.calls.count("baseline") == 2 * device.calls.count("slim")


def test_noise_asks_for_more_sittings_and_a_close_limit_for_six_more() -> None:
    device = Device(noise=0.08)
    found = compare_on_device(FILES, device, stopwatch=device.stopwatch)
    assert found.ratio is not None
    assert device.calls.count("slim") == 18
    assert found.ratio.low < 0.6 < found.ratio.high
    device, listener = Device(), RecordingProgress()
    found = compare_on_device(FILES, device, listener, stopwatch=device.stopwatch, is_close=lambda ratio: True)
    assert device.calls.count("slim") == 12
    assert listener.tasks == ["latency on the device", "latency on the device, close to a limit"]


def test_a_slow_device_gets_three_sittings() -> None:
    device = Device(noise=0.08, seconds=400.0)
    compare_on_device(FILES, device, stopwatch=device.stopwatch, is_close=lambda ratio: True)
    assert device.calls.count("slim") == 3


def test_a_device_that_slows_down_does_not_change_the_ratio() -> None:
    device = Device(drift=0.05)
    found = compare_on_device(FILES, device, stopwatch=device.stopwatch)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(0.6, rel=0.01)


def test_one_file_alone_has_no_ratio() -> None:
    found = compare_on_device({"slim": FILES["slim"]}, Device())
    assert found.ratio is None
    assert len(found.samples["slim"].sittings) == 6
    with pytest.raises(DataError, match="at least one model"):
        compare_on_device({}, Device())


def test_conditions_name_the_device_and_leave_it_out_here() -> None:
    conditions = Conditions(threads=64, batch_size=8, device=DeviceCommand(("x", "{model}"), "pi5"))
    assert str(conditions) == "device pi5, 64 threads, batch 8"
    assert conditions.here == Conditions(threads=1, batch_size=8)
    assert Conditions(threads=2).here == Conditions(threads=2)
    with pytest.raises(InternalError, match="name no device"):
        time_on_device(FILES["slim"], Conditions(), SilentProgress())
