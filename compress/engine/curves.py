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
    """A progress listener that writes curves, and passes all other calls on to another listener.

    Args:
        listener: The other listener.
        writer: TensorBoard writer of the curves.
    """

    def __init__(self, listener: Progress, writer: "SummaryWriter") -> None:
        self._listener, self._writer = listener, writer

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Task]:
        """Open a task of the other listener."""
        with self._listener.task(label, total) as task:
            yield task

    def note(self, text: str) -> None:
        """Pass the note on."""
        self._listener.note(text)

    def warn(self, text: str) -> None:
        """Pass the warning on."""
        self._listener.warn(text)

    def curve(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Write one point of each curve."""
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
    """Write reported curves into a folder, within the context."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        yield CurveWriter(listener, writer)
