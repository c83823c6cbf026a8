"""Training curves as TensorBoard event files, written while the training runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.catalog import missing_package
from compress.progress import Progress, Task

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class CurveWriter:
    """A listener that writes curves, and passes everything on to another one.

    Args:
        listener: The other one.
        writer: Where curves go.
    """

    def __init__(self, listener: Progress, writer: "SummaryWriter") -> None:
        self._listener, self._writer = listener, writer

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Open a task of the other listener."""
        with self._listener.task(label, total) as task:
            yield task

    def note(self, text: str) -> None:
        """Pass it on."""
        self._listener.note(text)

    def warn(self, text: str) -> None:
        """Pass it on."""
        self._listener.warn(text)

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Write points of curves."""
        for what, value in values.items():
            self._writer.add_scalar(f"{name}/{what}", value, step)


def require_tensorboard() -> None:
    """Check that event files can be written.

    Raises:
        PackageMissing: The package tensorboard is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise missing_package(["tensorboard"], "--tensorboard") from error


@contextmanager
def written_curves(listener: Progress, folder: Path) -> Iterator[CurveWriter]:
    """Write reported curves into a folder, while it lasts."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        yield CurveWriter(listener, writer)
