"""The examples of commands on the page of latency budgets run, with programs that stand for adb and OpenVINO."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import device
import pytest
from exported import exported
from fixtures import RecordingProgress

from compress.verification.device_command import DeviceCommand, parse_times

PAGE = Path(__file__).parents[2] / "docs" / "latency-budgets.md"
VALUES = {"threads": 2, "batch_size": 1, "repeats": 5}
ADB = """#!/bin/sh
case "$1" in
  push) cp "$2" "$PHONE/$(basename "$3")" ;;
  shell) echo "$2" > "$PHONE/said"; exec {python} -S -E {script} "$PHONE/model.onnx" --json ;;
esac
"""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_script_for_a_phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = _blocks("bash")
    for name, text in (
        ("time_on_phone.sh", script),
        ("adb", ADB.format(python=sys.executable, script=device.__file__)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(tmp_path))
    (arguments,) = re.findall(r"`command: \[(\./time_on_phone.*?)\]`", PAGE.read_text(encoding="utf-8"))
    command = DeviceCommand(tuple(arguments.replace('"', "").split(", ")), "phone", str(tmp_path))
    found = command.time_file(exported("chain"), VALUES, RecordingProgress())
    assert found.milliseconds == (device.milliseconds(exported("chain").read_bytes()),) * 3
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said.strip() == ("cd /data/local/tmp && LD_LIBRARY_PATH=. ./time_onnx model.onnx --threads=2 --calls=5")


def test_the_script_for_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (script,) = _blocks("python")
    (tmp_path / "time_openvino.py").write_text(script, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "time_openvino.py"), str(exported("chain")), "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, digest = parse_times(done.stdout)
    assert len(found.milliseconds) == 5
    assert found.runtime.startswith("openvino ")
    assert len(digest) == 64


def test_the_shown_outputs_are_read() -> None:
    (shown,) = _blocks("json")
    (numbers,) = [block for block in _blocks("text") if block[0].isdigit()]
    assert parse_times(shown)[0].milliseconds == parse_times(numbers)[0].milliseconds == (3.104, 3.098, 3.112)
    assert set(json.loads(shown)) == {"milliseconds", "sha256", "runtime"}
