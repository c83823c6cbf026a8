"""Exit codes of commands, and the message for every error."""

import contextlib
import errno
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import ParamSpec

import typer

from compress.catalog import missing_package
from compress.cli.console import Console
from compress.errors import (
    INTERRUPTED_EXIT_CODE,
    OUTCOME_EXIT_CODES,
    ArtifactError,
    CompressError,
    InternalError,
    OutOfMemory,
    is_out_of_memory,
)
from compress.user_code import as_stage_error

BROKEN_PIPE_EXIT_CODE = 141
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP,
             errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ENXIO)  # fmt: skip
_GOES_ON = ("run", "sweep", "search", "profile")  # commands that keep every stage they complete

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command end with an exit code and a sentence, whatever it raises."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except SystemExit as error:  # of a parser of arguments, or of the user's code
            if as_stage_error(error) is None:
                raise
            raise typer.Exit(_report(error, command.__name__ in _GOES_ON)) from error
        except BrokenPipeError as error:
            with contextlib.suppress(OSError, ValueError):  # so that Python's own last flush has somewhere to go
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE_EXIT_CODE) from error
        except BaseException as error:  # the last place that can turn a traceback into a sentence
            raise typer.Exit(_report(error, command.__name__ in _GOES_ON)) from error

    return run


def raise_outcome(outcome: str) -> None:
    """End a command with the exit code of its verdict; return where that passed.

    Args:
        outcome: As in `Verdict.outcome`.
    """
    if code := OUTCOME_EXIT_CODES[outcome]:
        raise typer.Exit(code)


def _report(error: BaseException, goes_on: bool) -> int:
    """Print what ended a command and return its exit code; `goes_on`: it keeps the stages that it completed."""
    console = Console()
    error = as_stage_error(error) or error
    if isinstance(error, KeyboardInterrupt):
        kept = "the stages that were completed are kept, the same command goes on from there"
        console.print_failure(f"Interrupted; {kept if goes_on else 'the same command starts anew'}.")
        return INTERRUPTED_EXIT_CODE
    if is_out_of_memory(error):
        said = " ".join(str(error).split())[:300].rstrip(".")
        error = OutOfMemory(
            f"What was to be computed did not fit into memory{f': {said}' if said else ''}.",
            hint="Try a smaller batch size, or fewer or smaller images.",
        )
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) not in (
        "",
        "compress",
    ):
        error = missing_package([name], "This command")
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        where = f" '{error.filename}'" if error.filename else ""
        error = ArtifactError(f"The system refused to write or read{where}: {error.strerror}.")
    if isinstance(error, CompressError) and error.exit_code != InternalError.exit_code:
        console.print_error(error)
        return error.exit_code
    console.print_failure(
        f"Internal error of compress ({type(error).__name__}: {str(error).strip() or 'no message'}). "
        f"This is a bug, not your mistake: please report it with the file {_write_crash(error)}, which says where it "
        f"happened.{' The stages that were completed are kept.' if goes_on else ''}"
    )
    return InternalError.exit_code


def _write_crash(error: BaseException) -> str:
    """Write the traceback to a new file in the folder for temporary files; return its path."""
    prefix = time.strftime("compress-crash-%Y%m%d-%H%M%S-")
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix=prefix, suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(f"compress {package_version()}, Python {sys.version}\n{sys.argv}\n\n{text}")
    except OSError as refusal:
        return f"that could not be written ({refusal.strerror})"
    return path


def package_version() -> str:
    """Return the version of this program."""
    import compress

    return str(compress.__version__)
