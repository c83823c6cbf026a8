"""The timing program in C++: it builds, times a file, states its digest, and serves as the command of a device.

ONNXRUNTIME_ROOT names a folder with include/ and lib/ of ONNX Runtime; the Python package has no headers.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from exported import exported
from fixtures import RecordingProgress

import compress
from compress.storage.digest import digest_file
from compress.verification.device_command import DeviceCommand

SOURCE = Path(compress.__file__).parent / "bundle" / "native"
ROOT = os.environ.get("ONNXRUNTIME_ROOT", "")
HEADERS = [Path(folder) for folder in (f"{ROOT}/include", "/usr/include/onnxruntime", "/usr/local/include") if folder]
VALUES = {"threads": 1, "batch_size": 2, "repeats": 7}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs cmake and a C++ compiler")
    if not any((folder / "onnxruntime_c_api.h").is_file() for folder in HEADERS):
        pytest.skip("needs the headers of ONNX Runtime; ONNXRUNTIME_ROOT names its folder")
    build = tmp_path_factory.mktemp("build")
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(build), f"-DONNXRUNTIME_ROOT={ROOT}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra"],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", f"{ROOT}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}")
        yield str(build / "time_onnx")


@pytest.mark.parametrize("name", ["chain", "depthwise"])
def test_calls_are_timed_and_the_file_is_named_by_its_digest(program: str, name: str) -> None:
    path = exported(name)
    done = subprocess.run([program, str(path), "--calls=5", "--batch=3"], capture_output=True, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    assert len(values["milliseconds"]) == 5
    assert min(values["milliseconds"]) > 0
    assert values["sha256"] == digest_file(path)
    assert values["runtime"].startswith("onnxruntime ")


@pytest.mark.parametrize("file", ["{model}", "{stdin}"])
def test_it_is_the_command_of_a_device(program: str, file: str) -> None:
    arguments = (program, file, "--threads={threads}", "--batch={batch_size}", "--calls={repeats}")
    found = DeviceCommand(arguments, "this machine").time_file(exported("chain"), VALUES, RecordingProgress())
    assert len(found.milliseconds) == 7
    assert found.runtime.startswith("onnxruntime ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: time_onnx MODEL.onnx|-"),
        (["no_such_file.onnx"], "Model 'no_such_file.onnx' cannot be read."),
        (["a.onnx", "--calls=0"], "--calls must be a whole number from 1 to 1000000, got '0'."),
        (["a.onnx", "--threads=two"], "--threads must be a whole number"),
        (["a.onnx", "--fast"], "Unknown option '--fast'."),
        (["a.onnx", "b.onnx"], "One model must be given, got 'a.onnx' and 'b.onnx'."),
        ([__file__], "ONNX Runtime: "),
    ],
)
def test_faults_are_stated_on_the_error_output(program: str, arguments: list[str], said: str) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr


def test_the_sources_are_part_of_the_package() -> None:
    assert sorted(path.name for path in SOURCE.iterdir()) == ["CMakeLists.txt", "time_onnx.cpp"]
    settings = (Path(compress.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"native/*"' in settings
