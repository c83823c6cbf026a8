"""Packages that only some pipelines need, and how to install them.

Hints name these packages, never this program's extras: its name on the package index is somebody else's.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from compress.errors import PackageMissing

INSTALL = {
    "cryptography": "pip install 'cryptography>=43'",
    "pycocotools": "pip install 'pycocotools>=2.0.7'",
    "tensorboard": "pip install 'tensorboard>=2.18'",
    "timm": "pip install 'timm>=1.0.20'",
    "torchmetrics": "pip install 'torchmetrics>=1.6'",
}
DETECTION = ("torchmetrics", "pycocotools")


def require_packages(names: Iterable[str], what: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        names: Names that are imported.
        what: It is that needs them, for the message.

    Raises:
        PackageMissing: One is not.
    """
    missing = [name for name in names if not _is_there(name)]
    if missing:
        raise missing_package(missing, what)


def missing_package(names: Iterable[str], what: str) -> PackageMissing:
    """Return the error that says so, with the lines that install them."""
    names = list(names)
    are = "packages {}, which are" if len(names) > 1 else "package {}, which is"
    hint = "; ".join(INSTALL.get(name, f"pip install {name}") for name in names)
    return PackageMissing(f"{what} needs the {are.format(' and '.join(names))} not installed.", hint=hint)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a package that hides itself
        return False
