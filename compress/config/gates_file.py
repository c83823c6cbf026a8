"""How does a file of gates become checked settings, for verifying a file that no pipeline made?"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.config.document import GATES, parse_document, read_document
from compress.config.messages import translate
from compress.config.overrides import apply_overrides
from compress.config.paths import resolve_gate_paths
from compress.config.problems import as_error
from compress.config.rules.gates import check_gates
from compress.config.schema.verify import GatesFile
from compress.errors import ConfigError

_TEST_IMAGES = ("t10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte")
_HINT = "an .npz with x and y, a folder with test.npz or test/, MNIST's IDX files, or one sub-folder for each class"


def load_gates(path: Path | None, data: Path | None = None, overrides: Sequence[str] = ()) -> GatesFile:
    """Read and check a file of gates; no data is opened.

    Args:
        path: The YAML file; None for the defaults, which hold the file to what is always checked.
        data: Images and labels, which go before what the file says.
        overrides: "key=value" each, applied in order before anything is checked.

    Raises:
        ConfigError: The file is missing, or `data` is not recognised.
        ConfigSyntaxError: The YAML is at fault.
        ConfigValueError: Keys, values or overrides are wrong, one line each.
    """
    document = parse_document("{}", "--set", GATES) if path is None else read_document(path, GATES)
    if not isinstance(document.value, dict):
        raise as_error(document.problems)
    apply_overrides(document, overrides)
    document.problems += check_gates(document)
    try:
        checked = GatesFile.model_validate(document.value)
    except ValidationError as error:
        found = (translate(detail, document, GatesFile) for detail in error.errors(include_url=False))
        document.problems += [problem for problem in found if problem is not None]
        raise as_error(document.problems) from error
    if document.problems:
        raise as_error(document.problems)
    values = checked.model_dump(mode="json")
    resolve_gate_paths(values, document, Path() if path is None else path.absolute().parent)
    if data is not None:
        values["evaluation"] = find_images(data)
    if values["evaluation"] is None:
        where = "--data must be given" if path is None else f"{path}: evaluation must be given, or --data"
        raise ConfigError(f"{where}: a file is verified on images and their labels.", hint=f"--data takes {_HINT}.")
    return GatesFile.model_validate(values)


def find_images(path: Path) -> dict[str, Any]:
    """Return the source that a path stands for, as in a pipeline file, with absolute paths.

    Raises:
        ConfigError: There is nothing, or nothing that is recognised.
    """
    path = Path(path).expanduser().absolute()
    if path.is_file() and path.suffix == ".npz":
        return {"arrays": str(path)}
    if path.is_dir():
        for name in _TEST_IMAGES:
            if (path / name).is_file():
                labels = re.sub("images-idx3", "labels-idx1", name)
                return {"idx": str(path / name), "labels": str(path / labels)}
        if (path / "test.npz").is_file():
            return {"arrays": str(path / "test.npz")}
        for name in ("test", "val"):
            if (path / name).is_dir():
                return {"folder": str(path / name)}
        if any(entry.is_dir() for entry in path.iterdir()):
            return {"folder": str(path)}
    got = "does not exist" if not path.exists() else "is nothing of the kind"
    raise ConfigError(f"--data must be images with labels, '{path}' {got}.", hint=f"It takes {_HINT}.")
