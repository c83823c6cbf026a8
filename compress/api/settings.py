"""Settings of the Python functions, checked by the schemas of pipeline files."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from compress.cli.console import Console
from compress.config.document import dump_document, parse_document
from compress.config.problems import as_error
from compress.config.schema.base import Section
from compress.config.sections import validate
from compress.errors import ConfigError, ConfigValueError, InternalError
from compress.progress import Progress, SilentProgress

S = TypeVar("S", bound=Section)
Listener = Progress | bool


def listener(progress: Listener) -> Progress:
    """Return a progress receiver: the console for True, a silent one for False."""
    if isinstance(progress, bool):
        return Console() if progress else SilentProgress()
    return progress


def read_settings(model: type[S], values: Mapping[str, Any], function: str) -> S:
    """Return typed settings.

    Args:
        model: Section that the settings belong to.
        values: Keyword arguments, plain values.
        function: Name of the function, for messages.

    Raises:
        ConfigValueError: Keys or values are wrong, one line each.
    """
    try:
        text = dump_document(plain_settings(values))
    except Exception as error:  # a YAML writer raises types of its own
        raise ConfigValueError(f"{function}: settings must be plain values, got {values!r}.") from error
    document = parse_document(text, function)
    config = validate(document, model)
    if config is None or document.problems:
        if not document.problems:
            raise InternalError(f"{function}: settings were refused without a reason.")
        raise _without_positions(as_error(document.problems), function)
    return config


def _without_positions(error: ConfigError, function: str) -> ConfigError:
    """Return an error whose lines name the function in place of lines of a file."""
    error.message = re.sub(rf"^{re.escape(function)}:\d+:\d+: ", f"{function}: ", error.message, flags=re.MULTILINE)
    return error


def plain_settings(values: Any) -> Any:
    """Return settings with lists in place of tuples and texts in place of paths."""
    if isinstance(values, Mapping):
        return {str(key): plain_settings(value) for key, value in values.items()}
    if isinstance(values, (list, tuple, set, frozenset)):
        return [plain_settings(value) for value in values]
    if hasattr(values, "__fspath__"):
        return str(values.__fspath__())
    return values
