"""A sample of the damaged files of `onnx_files.py` and `images.py`; the full counts are `make fuzz`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import images
import onnx_files
from outcomes import BAD, HANG, guarded, time_limit

SAMPLE = 40


@pytest.mark.parametrize("kind", [onnx_files, images], ids=["onnx", "images"])
def test_damaged_files_end_with_a_documented_exit_code(kind: object, tmp_path: Path) -> None:
    outcomes = [one for case in range(SAMPLE) for one in kind.run_case(7, case, tmp_path)]  # type: ignore[attr-defined]
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


def test_the_comparison_with_the_runtime_sees_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_files._outputs
    monkeypatch.setattr(onnx_files, "_outputs", lambda *given: [-one for one in right(*given)])
    (tmp_path / "m.onnx").write_bytes(onnx_files.bases()["chain"])
    assert onnx_files._import(tmp_path)[2].startswith("off by")
