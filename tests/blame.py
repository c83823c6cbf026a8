"""Code that is said to lie in the package, for tests of what is blamed on it and what on code of the user's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import compress


def in_package(code: str, **names: Any) -> Callable[..., Any]:
    """Return a function with this body; its frame names a file of the package."""
    made = dict(names)
    exec(compile(f"def run(*_):\n    {code}\n", str(Path(compress.__file__).with_name("made_up.py")), "exec"), made)
    run: Callable[..., Any] = made["run"]
    return run


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises as code of the package would."""
    return in_package("raise error", error=error)
