"""A command that times files on a device: output formats, failures, time-outs, and the digest of the timed file."""

import json
import os
import sys
import time
from pathlib import Path

import device
import onnx
import pytest
from exported import exported
from fixtures import RecordingProgress
from onnx.external_data_helper import convert_model_to_external_data

from compress.config.schema.verify import DeployConfig
from compress.errors import DeviceFailed, RuntimeUnavailable
from compress.storage.digest import digest_file
from compress.verification.device_command import DeviceCommand, DeviceTimes, device_of, parse_times

SCRIPT = str(Path(device.__file__))
PYTHON = (sys.executable, "-S", "-E")
VALUES = {"threads": 2, "batch_size": 1, "repeats": 7}


def command(*arguments: str, **settings: object) -> DeviceCommand:
    return DeviceCommand((*PYTHON, *arguments), "pi5", **settings)  # type: ignore[arg-type]


def code(text: str, **settings: object) -> DeviceCommand:
    return command("-c", text, "{model}", **settings)


def timed(one: DeviceCommand, path: Path | None = None) -> tuple[DeviceTimes, RecordingProgress, list[float]]:
    listener, pauses = RecordingProgress(), list[float]()
    return one.time_file(path or exported("chain"), VALUES, listener, pauses.append), listener, pauses


@pytest.mark.parametrize("arguments", [("{model}",), ("{stdin}",), ("{model}", "--json"), ("{stdin}", "--json")])
def test_milliseconds_are_read_from_both_formats_and_files_are_sent_both_ways(arguments: tuple[str, ...]) -> None:
    found, listener, _ = timed(command(SCRIPT, *arguments))
    assert found.milliseconds == (device.milliseconds(exported("chain").read_bytes()),) * 3
    assert found.runtime == ("simulated 1.0" if "--json" in arguments else "")
    assert listener.warnings == []


def test_placeholders_are_filled_and_no_shell_reads_the_arguments(tmp_path: Path) -> None:
    text = "import sys, json; print(json.dumps({'milliseconds': 1, 'runtime': ' '.join(sys.argv[1:])}))"
    one = command("-c", text, "{model}", "--threads={threads}", "{batch_size}x{repeats}", "$HOME; rm *", "{}")
    found, _, _ = timed(one)
    assert found.runtime == f"{exported('chain').absolute()} --threads=2 1x7 $HOME; rm * {{}}"
    assert str(one).endswith("'$HOME; rm *' '{}'")


def test_relative_programs_start_in_the_folder_of_the_pipeline(tmp_path: Path) -> None:
    script = tmp_path / "time.sh"
    script.write_text("#!/bin/sh\npwd >&2\necho 4.5\n")
    script.chmod(0o755)
    found, _, _ = timed(DeviceCommand(("./time.sh", "{model}"), "pi5", str(tmp_path)))
    assert found == DeviceTimes((4.5,))
    script.chmod(0o644)
    with pytest.raises(DeviceFailed, match=r"device 'pi5': program '\./time\.sh' is not found, or is not executable"):
        timed(DeviceCommand(("./time.sh", "{model}"), "pi5", str(tmp_path)))


def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(RuntimeUnavailable, match="program 'no_such_program' is not found") as caught:
        timed(DeviceCommand(("no_such_program", "{model}"), "pi5", "/somewhere"))
    assert "'/somewhere'" in str(caught.value.hint)


def test_a_program_that_is_no_program_cannot_be_started(tmp_path: Path) -> None:
    script = tmp_path / "time"
    script.write_bytes(b"\x7fELF nonsense")
    script.chmod(0o755)
    with pytest.raises(DeviceFailed, match="Command of the device 'pi5' cannot be started: Exec format error"):
        timed(DeviceCommand((str(script), "{model}"), "pi5"))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "it printed nothing"),
        ("no time today", "its last line is 'no time today'"),
        ("3.5\nMedian: 3.5 ms", "its last line is 'Median: 3.5 ms'"),
        ("nan", "times are finite and above 0, it printed nan"),
        ("3.5 inf", "it printed inf"),
        ("-3.5", "it printed -3.5"),
        ("0", "it printed 0"),
        ('{"milliseconds": []}', "'milliseconds' must be a number or a list of numbers"),
        ('{"ms": 3}', "'milliseconds' must be a number or a list of numbers"),
        ('{"milliseconds": [1, "2"]}', "'milliseconds' must be a number or a list of numbers"),
        ('{"milliseconds": [true]}', "'milliseconds' must be a number or a list of numbers"),
        ('{"milliseconds": NaN}', "it printed nan"),
        ('{"milliseconds": [1.5', "its last line is no JSON object"),
    ],
)
def test_output_without_times_is_refused_with_its_last_line(output: str, said: str) -> None:
    with pytest.raises(DeviceFailed, match="Command of the device 'pi5' must print milliseconds") as caught:
        timed(code(f"print({output!r})"))
    assert said in caught.value.message
    assert "last line is a JSON object" in str(caught.value.hint)


def test_all_lines_of_numbers_at_the_end_are_times() -> None:
    assert parse_times("200 calls\n1e0, 2.5\n\n.5\n")[0].milliseconds == (1.0, 2.5, 0.5)


def test_a_failure_is_tried_again_and_its_error_output_is_shown() -> None:
    failing = "import sys; sys.stderr.write('a\\nb\\nssh: connect to host pi: refused\\n'); sys.exit(255)"
    listener, pauses = RecordingProgress(), list[float]()
    with pytest.raises(DeviceFailed, match="tried 3 times: exit code 255; its error output ends with: a / b / ssh"):
        code(failing).time_file(exported("chain"), VALUES, listener, pauses.append)
    assert pauses == [1.0, 2.0]
    assert [warning.partition(":")[0] for warning in listener.warnings] == [
        f"Command of the device 'pi5', attempt {number} of 3" for number in (1, 2)
    ]


def test_a_connection_that_comes_back_is_used(tmp_path: Path) -> None:
    mark = tmp_path / "seen"
    flaky = f"import os, sys; p={str(mark)!r}; s=os.path.exists(p); open(p, 'a'); sys.exit(255) if not s else print(2)"
    found, listener, pauses = timed(code(flaky))
    assert found == DeviceTimes((2.0,))
    assert len(listener.warnings) == len(pauses) == 1


def test_output_that_is_wrong_is_not_tried_again() -> None:
    listener = RecordingProgress()
    with pytest.raises(DeviceFailed, match="must print milliseconds"):
        code("print('x')").time_file(exported("chain"), VALUES, listener, pytest.fail)
    assert listener.warnings == []


def test_a_signal_is_named() -> None:
    with pytest.raises(DeviceFailed, match="tried once: ended by signal 9; its error output is empty"):
        timed(code("import os; os.kill(os.getpid(), 9)", attempts=1))


def test_a_program_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    hanging = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(DeviceFailed, match=r"tried once: no answer within 3 s \(deploy.timeout_s\)"):
        timed(code(hanging, timeout_s=3.0, attempts=1))
    assert time.monotonic() - started < 30
    child = int(mark.read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the child of the program still runs")


def test_the_digest_of_another_file_is_refused() -> None:
    def said(digest: str) -> DeviceCommand:
        return code(f"print({json.dumps({'milliseconds': 1, 'sha256': digest})!r})")

    path = exported("chain")
    assert timed(said(digest_file(path)))[0] == timed(said(f" {digest_file(path).upper()}\n"))[0] == DeviceTimes((1.0,))
    with pytest.raises(DeviceFailed, match=r"timed another file: it states the sha256 ababab\w+\.\.\., that of 'chain"):
        timed(said("ab" * 32))


def test_weights_in_a_second_file_cannot_be_sent_on_standard_input(tmp_path: Path) -> None:
    model = onnx.load(exported("chain"))
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save_model(model, tmp_path / "model.onnx")
    with pytest.raises(DeviceFailed, match=r"has its weights in a second file, which \{stdin\} cannot send"):
        timed(command(SCRIPT, "{stdin}"), tmp_path / "model.onnx")


def test_the_settings_are_those_of_the_deployment() -> None:
    deploy = DeployConfig(
        command=("x", "{model}"), device="pi5", timeout_s=5.0, attempts=2, command_folder="/there", variants=20
    )
    assert device_of(deploy) == DeviceCommand(("x", "{model}"), "pi5", "/there", 5.0, 2)
    assert device_of(DeployConfig()) is None
    assert device_of(None) is None
