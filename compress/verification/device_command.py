"""Command that times an ONNX file on a device: any program that takes a file and prints milliseconds.

The program and its arguments are started as they are, without a shell. Its standard output ends with one of

    {"milliseconds": [3.1, 3.0, 3.2], "sha256": "9f86d0...", "runtime": "onnxruntime 1.23.2"}
    3.1 3.0 3.2

Only "milliseconds" is required: one number, or one for each call. "sha256" is the digest of the timed file, which is
compared with that of the given file. "runtime" names the runtime of the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from compress.config.schema.device_command import fill_placeholders, placeholders
from compress.config.schema.verify import DeployConfig
from compress.errors import DeviceFailed
from compress.onnx_file.io import model_files
from compress.progress import Progress
from compress.storage.digest import digest_file

_READ_BYTES = 4_000_000  # of the end of each output
_LONGEST_PAUSE_S = 30.0
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Printed times of one file.

    Attributes:
        milliseconds: Times of its calls, or one time that stands for all of them.
        runtime: Runtime of the device, as printed; "" if it is not.
    """

    milliseconds: tuple[float, ...]
    runtime: str = ""

    @property
    def p50(self) -> float:
        """Median in milliseconds."""
        return median(self.milliseconds)


@dataclass(frozen=True, slots=True)
class DeviceCommand:
    """Command that times files on a device.

    Attributes:
        arguments: Program and arguments, with placeholders (`config.schema.device_command`).
        device: Name of the device.
        folder: Folder that the program starts in; None for the current one.
        timeout_s: Seconds after which it is stopped.
        attempts: Attempts at a program that fails or is stopped.
    """

    arguments: tuple[str, ...]
    device: str
    folder: str | None = None
    timeout_s: float = 600.0
    attempts: int = 3

    def __str__(self) -> str:
        return shlex.join(self.arguments)

    def require_program(self) -> None:
        """Check that the program exists.

        Raises:
            DeviceFailed: It does not, or may not be executed.
        """
        program = self.arguments[0]
        found = shutil.which(os.path.join(self.folder or "", program) if os.path.dirname(program) else program)
        if found is None:
            raise DeviceFailed(
                f"{self._label}: program '{program}' is not found, or is not executable.",
                hint=f"Relative paths start in '{self.folder or os.getcwd()}' (deploy.command_folder).",
            )

    def time_file(
        self,
        path: Path,
        values: Mapping[str, object],
        progress: Progress,
        wait: Callable[[float], None] = time.sleep,
    ) -> DeviceTimes:
        """Run the command on a file and return the printed times.

        A command that exits with an error or runs into the time-out is tried again, after a pause that doubles.

        Args:
            path: The .onnx file.
            values: Values of the placeholders besides those of the file.
            progress: Receives a warning for each attempt that fails.
            wait: Function that sleeps for a number of seconds.

        Raises:
            DeviceFailed: All attempts fail, no milliseconds are printed, or those of another file.
        """
        self.require_program()
        arguments = self._fill(path, values)
        for attempt in range(1, self.attempts + 1):
            try:
                output = self._run(arguments, path)
                break
            except _Attempt as failed:
                if attempt == self.attempts:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    raise DeviceFailed(
                        f"{self._label} was tried {times}: {failed}",
                        hint="What was measured is kept: the same command line continues where this run stopped.",
                    ) from None
                progress.warn(f"{self._label}, attempt {attempt} of {self.attempts}: {failed}")
                wait(min(2.0 ** (attempt - 1), _LONGEST_PAUSE_S))
        return self._read(output, path)

    @property
    def _label(self) -> str:
        return f"Command of the device '{self.device}'"

    def _fill(self, path: Path, values: Mapping[str, object]) -> list[str]:
        """Return the arguments for one file.

        Raises:
            DeviceFailed: The file has external data, which standard input cannot carry.
        """
        if "model" not in placeholders(self.arguments) and len(model_files(path)) > 1:
            raise DeviceFailed(
                f"{self._label}: '{path}' has its weights in a second file, which {{stdin}} cannot send."
            )
        return fill_placeholders(self.arguments, {**values, "model": path.absolute(), "stdin": "-"})

    def _run(self, arguments: list[str], path: Path) -> str:
        """Run the program once and return its standard output."""
        with contextlib.ExitStack() as stack:
            has_input = "stdin" in placeholders(self.arguments)
            given: Any = stack.enter_context(path.open("rb")) if has_input else subprocess.DEVNULL
            output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            try:
                process = subprocess.Popen(
                    arguments, stdin=given, stdout=output, stderr=errors, cwd=self.folder, start_new_session=True
                )
            except OSError as error:
                raise DeviceFailed(f"{self._label} cannot be started: {error.strerror or error}.") from error
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise _Attempt(f"no answer within {self.timeout_s:g} s (deploy.timeout_s).") from None
            finally:
                _stop(process)
            if code != 0:
                how = f"exit code {code}" if code > 0 else f"ended by signal {-code}"
                raise _Attempt(f"{how}; {_quote(_end_of(errors), 'its error output')}")
            return _end_of(output)

    def _read(self, output: str, path: Path) -> DeviceTimes:
        """Return the times in the output of the program."""
        try:
            times, digest = parse_times(output)
        except ValueError as error:
            raise DeviceFailed(
                f"{self._label} must print milliseconds: {error}",
                hint='The last line is a JSON object such as {"milliseconds": [3.1, 3.0]}, or holds numbers only.',
            ) from None
        present = digest_file(path) if digest else ""
        if digest != present:
            raise DeviceFailed(
                f"{self._label} timed another file: it states the sha256 {digest[:16]}..., that of '{path.name}' is "
                f"{present[:16]}...",
                hint="An earlier copy on the device, or an upload that failed, are the usual reasons.",
            )
        return times


def device_of(deploy: DeployConfig | None) -> DeviceCommand | None:
    """Return the command that times files on a device; None where they are timed on this machine."""
    if deploy is None or deploy.command is None:
        return None
    return DeviceCommand(deploy.command, deploy.device or "", deploy.command_folder, deploy.timeout_s, deploy.attempts)


class _Attempt(Exception):
    """Failure of one attempt."""


def parse_times(output: str) -> tuple[DeviceTimes, str]:
    r"""Return the times at the end of an output, and the digest of the timed file ("" if not printed).

    Args:
        output: Standard output of a program; its last line is a JSON object, or its last lines hold numbers only.

    Raises:
        ValueError: There are no times, or one is not finite and above 0; the message ends with a full stop.

    >>> parse_times("loading\n3.5 3.25\n3.75")[0].milliseconds
    (3.5, 3.25, 3.75)
    >>> parse_times('{"milliseconds": 3.5, "runtime": "ncnn"}')[0]
    DeviceTimes(milliseconds=(3.5,), runtime='ncnn')
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        raise ValueError("it printed nothing.")
    if lines[-1].startswith("{"):
        return _parse_object(lines[-1])
    numbers: list[str] = []
    for line in reversed(lines):
        words = line.replace(",", " ").split()
        if not all(_NUMBER.fullmatch(word) for word in words):
            break
        numbers = words + numbers
    if not numbers:
        raise ValueError(f"its last line is '{_shortened(lines[-1])}'.")
    return DeviceTimes(tuple(_checked(float(number)) for number in numbers)), ""


def _parse_object(line: str) -> tuple[DeviceTimes, str]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"its last line is no JSON object ({error}).") from error
    found = values.get("milliseconds")
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in found):
        raise ValueError(f"'milliseconds' must be a number or a list of numbers, got '{_shortened(line)}'.")
    digest, runtime = values.get("sha256"), values.get("runtime")
    return DeviceTimes(tuple(map(_checked, found)), str(runtime or "")), str(digest or "").strip().lower()


def _checked(value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"times are finite and above 0, it printed {value:g}.")
    return float(value)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a program with all processes that it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _READ_BYTES))
    return file.read().decode("utf-8", "replace")


def _quote(text: str, what: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{what} ends with: {_shortened(' / '.join(lines[-3:]), 400)}" if lines else f"{what} is empty."


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
