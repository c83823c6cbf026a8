"""A measurement runs alone on its machine, other stages beside each other, and nobody waits for ever."""

import threading
import time
from pathlib import Path

import pytest
from smallrun import World

from compress.engine.timing_lock import TimingLock, Turns, default_folder, measures_latency
from compress.errors import ArtifactError

PAUSE_S = 0.3


class Diary:
    """Events in order; threads with locks of their own stand for processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries, self.notes = folder, [], []
        self.inside: set[str] = set()

    def stage(self, name: str, alone: bool, seconds: float) -> threading.Thread:
        def work() -> None:
            with TimingLock(self.folder).hold(alone, lambda text: self.notes.append(f"{name}: {text}")):
                self.inside.add(name)
                self.entries.append((name, frozenset(self.inside)))
                time.sleep(seconds)
                self.inside.discard(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


def test_a_measurement_is_alone_and_goes_before_stages_that_begin_later(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "lock")
    threads = [diary.stage("first", False, 3 * PAUSE_S)]
    time.sleep(PAUSE_S)
    threads.append(diary.stage("second", False, 3 * PAUSE_S))
    time.sleep(PAUSE_S)
    threads.append(diary.stage("timed", True, PAUSE_S))
    time.sleep(PAUSE_S)
    threads.append(diary.stage("late", False, PAUSE_S))
    for thread in threads:
        thread.join()
    assert [name for name, _ in diary.entries] == ["first", "second", "timed", "late"]
    assert diary.entries[1][1] == {"first", "second"}, "stages that compute share the machine"
    assert diary.entries[2][1] == {"timed"}
    assert [note.partition(":")[0] for note in diary.notes] == ["timed", "late"]
    assert diary.notes[0] == "timed: waits until other runs on this machine have ended their stages"


def test_a_stage_that_fails_releases_the_lock(tmp_path: Path) -> None:
    lock = TimingLock(tmp_path)
    with pytest.raises(ZeroDivisionError), lock.hold(True, pytest.fail):
        1 / 0  # noqa: B018
    with lock.hold(True, pytest.fail), Turns().hold(True, pytest.fail):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ArtifactError, match=r"The timing lock '.*file/lock' must be writable"),
        TimingLock(tmp_path / "file" / "lock").hold(False, pytest.fail),
    ):
        pass
    assert default_folder().name.startswith("compress-timing-")


def test_stages_that_measure_are_known_before_they_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    config = world.load(world.values()).config
    assert [measures_latency(config, index) for index in range(5)] == [False, False, False, False, True]
    values = world.values() | {"deploy": {"repeats": 5}}
    values["stages"][1]["target"] = {"latency": 0.6}
    config = world.load(values).config
    assert [measures_latency(config, index) for index in range(5)] == [True, True, False, False, True]


def test_a_format_chosen_by_latency_is_a_measurement(tmp_path: Path) -> None:
    world = World(tmp_path)
    values = world.values()
    values["stages"].insert(4, {"stage": "quantize", "images": 32, "format": "auto"})
    config = world.load(values).config
    assert [measures_latency(config, index) for index in range(6)] == [False, False, False, False, True, True]
