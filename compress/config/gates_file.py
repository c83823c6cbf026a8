"""How does a file of gates become checked settings, for verifying a file that no pipeline made?"""

import re
from collections.abc import Sequence
from pathlib import Path

from compress.config.document import GATES, Document, parse_document, read_document
from compress.config.overrides import apply_overrides
from compress.config.paths import resolve_paths
from compress.config.problems import as_error
from compress.config.rules.gates import check_limits
from compress.config.rules.stages import compared_with_itself
from compress.config.schema.data import ArraysSource, FolderSource, IdxSource
from compress.config.schema.verify import GatesFile
from compress.config.sections import read_valid, validate
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
    gates = resolve_paths(_checked(document), document, Path() if path is None else path.absolute().parent)
    if data is not None:
        gates = gates.model_copy(update={"evaluation": find_images(data)})
    if gates.evaluation is None:
        where = "--data must be given" if path is None else f"{path}: evaluation must be given, or --data"
        raise ConfigError(f"{where}: a file is verified on images and their labels.", hint=f"--data takes {_HINT}.")
    return gates


def _checked(document: Document) -> GatesFile:
    """Return the typed settings, or raise all problems of the document as one error."""
    checked = validate(document, GatesFile)
    gates = read_valid(document, (), GatesFile) if checked is None else checked
    if gates is not None:
        task = gates.task if document.is_valid(("task",)) else None
        document.problems += check_limits(document, ("gates",), gates.gates, task)
        document.problems += compared_with_itself(document, (), gates)
    if checked is None or document.problems:
        raise as_error(document.problems)
    return checked


def find_images(path: Path) -> ArraysSource | IdxSource | FolderSource:
    """Return the source that a path stands for, as in a pipeline file, with absolute paths.

    Raises:
        ConfigError: There is nothing, or nothing that is recognised.
    """
    path = Path(path).expanduser().absolute()
    if path.is_file() and path.suffix == ".npz":
        return ArraysSource(arrays=str(path))
    if path.is_dir():
        for name in _TEST_IMAGES:
            if (path / name).is_file():
                labels = re.sub("images-idx3", "labels-idx1", name)
                return IdxSource(idx=str(path / name), labels=str(path / labels))
        if (path / "test.npz").is_file():
            return ArraysSource(arrays=str(path / "test.npz"))
        for name in ("test", "val"):
            if (path / name).is_dir():
                return FolderSource(folder=str(path / name))
        if any(entry.is_dir() for entry in path.iterdir()):
            return FolderSource(folder=str(path))
    got = "does not exist" if not path.exists() else "is nothing of the kind"
    raise ConfigError(f"--data must be images with labels, '{path}' {got}.", hint=f"It takes {_HINT}.")
