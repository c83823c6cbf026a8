"""Exception tree, and the exit code of each class.

    CompressError                    every error raised on purpose; has .hint
    ├─ ConfigError          exit 2   the pipeline file or the command line is wrong
    │  ├─ ConfigSyntaxError          the YAML cannot be read
    │  ├─ ConfigValueError           a value, key or type is wrong
    │  ├─ UnknownName                a name is not registered
    │  └─ StageOrderError            the stages cannot run in this order
    ├─ StageError           exit 3   a stage could not do its work
    │  ├─ ModelError                 the factory, the forward pass or the outputs are not as needed
    │  ├─ DataError                  images or labels do not fit the model
    │  ├─ UntraceableModel           no channel graph could be built
    │  ├─ UnsupportedLayer           an edit or criterion cannot handle a layer
    │  ├─ BudgetUnreachable          the target cannot be met; the message states the best reachable
    │  ├─ NonFinite                  a weight, output or loss is NaN or infinite
    │  ├─ ExportFailed               torch or ONNX refused the export
    │  ├─ RankLost                   another process of a joint training has ended or does not answer
    │  └─ RebuildMismatch            replaying a recipe does not yield the saved network
    ├─ ArtifactError        exit 4   missing, corrupt or foreign file
    │  └─ RunLocked                  another process holds the run folder
    ├─ RuntimeUnavailable   exit 5   the requested execution provider is not available
    │  ├─ PackageMissing             a package is not installed that only some pipelines need
    │  ├─ DeviceFailed               the command that times files on a device fails or prints no milliseconds
    │  └─ NoSuchPlace                no machine has such a provider, or the runtime reads no ONNX files
    └─ InternalError        exit 70  our bug: an invariant is broken

A failed verification is no exception: the verdict is failed and the exit code is 1. Where no check failed but at least
one is inconclusive, the exit code is 6.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

T = TypeVar("T")
U = TypeVar("U")

VERDICT_FAILED_EXIT_CODE = 1
VERDICT_INCONCLUSIVE_EXIT_CODE = 6
OUTCOME_EXIT_CODES = {  # by `Verdict.outcome`
    "passed": 0,
    "failed": VERDICT_FAILED_EXIT_CODE,
    "inconclusive": VERDICT_INCONCLUSIVE_EXIT_CODE,
}
INTERRUPTED_EXIT_CODE = 130


class CompressError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: Condition that must hold, the value found, and its position.
        hint: Remedy, printed on a line of its own.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"


class ConfigError(CompressError):
    """The pipeline file or the command line is wrong."""

    exit_code = 2


class ConfigSyntaxError(ConfigError):
    """The YAML cannot be read."""


class ConfigValueError(ConfigError):
    """One or more values, keys or types are wrong; one line each."""


class UnknownName(ConfigError):
    """A name is not registered; names the choices and the closest match."""


class StageOrderError(ConfigError):
    """The stages cannot run in the order given."""


class StageError(CompressError):
    """A stage could not do its work."""

    exit_code = 3


class ModelError(StageError):
    """The factory, the forward pass or the outputs are not as they must be."""


class DataError(StageError):
    """Images or labels cannot be used with this model."""


class UntraceableModel(StageError):
    """No channel graph could be built for the model."""


class UnsupportedLayer(StageError):
    """An edit or a criterion cannot handle a layer."""


class BudgetUnreachable(StageError):
    """The target cannot be met; the message states the best reachable value and its limits.

    Attributes:
        best: Least reachable value, in the unit of the target; None if it is not one number.
    """

    def __init__(self, message: str, *, hint: str | None = None, best: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.best = best


WITHIN_HINT = "Lower the target, or leave the stage out."


NONE_LEFT_HINT = "Let exclude and residual: keep leave some; `compress inspect` lists the groups."


class AlreadyWithin(BudgetUnreachable):
    """The network meets the target already, without any removal."""


class NonFinite(StageError):
    """A weight, an output or a loss is NaN or infinite."""


class OutOfMemory(StageError):
    """A batch does not fit into memory."""


class ExportFailed(StageError):
    """torch or ONNX refused the export, or the file differs from the request."""


class RankLost(StageError):
    """Another process of a joint training has ended, or does not answer."""


class RebuildMismatch(StageError):
    """Replaying a recipe does not yield the saved network."""


class ArtifactError(CompressError):
    """A file is missing, corrupt, or no file of this program."""

    exit_code = 4


class RunLocked(ArtifactError):
    """Another process holds the run folder."""


class RuntimeUnavailable(CompressError):
    """The requested execution provider is not available."""

    exit_code = 5


class PackageMissing(RuntimeUnavailable):
    """An optional package is not installed; the hint is the command that installs it."""


class DeviceFailed(RuntimeUnavailable):
    """The command that times files on a device fails, hangs, or prints no milliseconds of the file."""


class NoSuchPlace(RuntimeUnavailable):
    """No machine can run the file so: the provider's name is unknown, or the runtime reads no ONNX files."""


class InternalError(CompressError):
    """An invariant of this program is broken: a bug, please report it."""

    exit_code = 70


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, NumPy, torch or ONNX Runtime reports a lack of memory."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        not isinstance(error, CompressError)
        and (type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _OUT_OF_MEMORY))
    )


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED", "bad_alloc",
                  "Failed to allocate memory", "bad allocation")  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return the first line with content of an error's message, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def translated(build: Callable[[Exception], Exception], *unchanged: type[BaseException]) -> Iterator[None]:
    """Translate errors of foreign code within this context into errors of this program.

    ONNX Runtime, onnx, protobuf, decoders of images and networks of users raise types of their own, down to plain
    Exception, so that no list of types would be complete. Errors of this program and lack of memory pass unchanged.

    Args:
        build: Function from a foreign error to the error to raise; the foreign error becomes its cause.
        unchanged: Further types that pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (CompressError, MemoryError, *unchanged)):
            raise
        raise build(error) from error


def attempt(call: Callable[[], T], otherwise: Callable[[Exception], U], *unchanged: type[BaseException]) -> T | U:
    """Return the result of foreign code, or of `otherwise` where it raises anything.

    Args:
        call: Function that runs the foreign code.
        otherwise: Function from the error to a replacement of the result.
        unchanged: Types of errors that pass.
    """
    try:
        return call()
    except Exception as error:
        if isinstance(error, unchanged):
            raise
        return otherwise(error)
