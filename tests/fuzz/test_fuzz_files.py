"""A sample of the damaged files of `onnx_files.py` and `images.py`; the full counts are `make fuzz`."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import images
import onnx_files
from outcomes import BAD, CRASH, HANG, guarded, run_apart, time_limit

SAMPLE = 40
DYING = """
import os, sys
sys.path.insert(0, {fuzz!r})
from outcomes import Outcome, main

def run_case(seed, case, folder):
    is_second = os.path.exists({mark!r})
    if case == 2 or (case == 1 and not is_second):
        open({mark!r}, "w").close()
        os.kill(os.getpid(), 9)
    return [Outcome(case, "x", "0")]

main(__file__, run_case, lambda seed, case: "x")
"""


@pytest.mark.timeout(1800)  # a case that hangs in foreign code is ended after minutes, twice
@pytest.mark.parametrize("kind", [onnx_files, images], ids=["onnx", "images"])
def test_damaged_files_end_with_a_documented_exit_code(kind: ModuleType) -> None:
    outcomes = run_apart(Path(str(kind.__file__)), SAMPLE, 0, 7, show=False)
    assert {one.case for one in outcomes} == set(range(SAMPLE))
    assert [one for one in outcomes if one.code in BAD] == []
    codes = {one.code for one in outcomes}
    assert {"0", "3"} <= codes  # some are taken, some refused: the damage is neither nothing nor everything


def test_a_wrong_result_and_a_hang_are_seen() -> None:
    assert guarded(0, "x", lambda: (0, "", "off by 1")).code == "wrong"

    def hang() -> tuple[int, str, str]:
        with time_limit(0.05):
            while True:
                pass

    assert guarded(0, "x", hang).code == HANG


def test_a_process_that_dies_is_a_crash_of_its_case_the_second_time(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(fuzz=str(Path(__file__).parent), mark=str(tmp_path / "seen")), encoding="utf-8")
    outcomes = run_apart(script, 4, 0, 7, show=False)
    assert [(one.case, one.code) for one in outcomes] == [(0, "0"), (1, "0"), (2, CRASH), (3, "0")]
    assert outcomes[2].said.startswith("exit -9")


def test_the_comparison_with_the_runtime_sees_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_files._outputs
    monkeypatch.setattr(onnx_files, "_outputs", lambda *given: [-one for one in right(*given)])
    (tmp_path / "m.onnx").write_bytes(onnx_files.bases()["chain"])
    assert onnx_files._import(tmp_path)[2].startswith("off by")
