"""Context of a stage, and the protocol that stages follow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.config.schema.verify import DeployConfig
from compress.data.splits import DataSplits, Teacher
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.search.parts import Parts


@dataclass(frozen=True)
class StageContext:
    """Folder, data, listener and teacher of one run of one stage.

    Attributes:
        folder: A folder of the stage's own. It survives a kill and is handed to the same stage (same cache key)
            again, so training state lives there; it is removed when the stage is done.
        seed: Seed of all random numbers.
        data: The splits, opened when first asked for.
        progress: Receives the progress of long operations.
        deploy: Target runtime; None where the pipeline names none.
        latency_tables: A folder for tables of latencies, shared by all runs.
        teacher: The baseline, to be learned from; None before there is one.
    """

    folder: Path
    seed: int
    data: DataSplits
    progress: Progress
    deploy: DeployConfig | None = None
    latency_tables: Path = Path()
    teacher: Teacher | None = None

    @cached_property
    def parts(self) -> "Parts":
        """Finished parts of the stage, kept in its folder."""
        from compress.search.parts import Parts  # torch, which verification of a file does without

        return Parts(self.folder, self.progress)


Record = dict[str, Any]


class Stage(Protocol):
    """One step of a pipeline. Kind of input and output, version and summary are declared in `catalog.STAGES`."""

    def __init__(self, config: Any) -> None: ...

    def run(self, artifact: Any, ctx: StageContext) -> tuple[Any, Record]:
        """Return a new artifact and a JSON-ready record for the report; the input is not changed."""
        ...


StageFactory = Callable[[Any], Stage]
