"""Context of a stage, and the protocol that stages follow."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.verify import DeployConfig
from compress.data.splits import DataSplits, Teacher
from compress.model.stage_records import StageRecord
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.search.parts import Parts


@dataclass(frozen=True)
class StageContext:
    """Folder, data, listener and teacher of one run of one stage.

    Attributes:
        folder: Work folder of the stage, for training state. It survives a kill, and the same stage (same cache key)
            gets it again. It is removed when the stage is done.
        seed: Seed of all random numbers.
        data: Data splits, opened at first use.
        progress: Receives the progress of long operations.
        deploy: Target runtime; None if the pipeline names no runtime.
        latency_tables: Folder of latency tables, shared by all runs.
        teacher: The baseline as a distillation teacher; None if the stage's input is no `TorchModel`.
        quantize: Settings of the pipeline's `quantize` stage; None without one.
        joint: Returns the context manager for a numbered training of a stage that otherwise runs in one process. Other
            processes join that training by `Stage.train`.
        teacher_outputs: Folder of teachers' outputs, shared by all runs; None keeps none.
    """

    folder: Path
    seed: int
    data: DataSplits
    progress: Progress
    deploy: DeployConfig | None = None
    latency_tables: Path = Path()
    teacher: Teacher | None = None
    quantize: QuantizeConfig | None = None
    joint: Callable[[int], AbstractContextManager[Any]] = lambda _number: nullcontext()
    teacher_outputs: Path | None = None

    @property
    def int8(self) -> QuantizeConfig | None:
        """Settings of the INT8 files that latencies are measured on; None where files are timed as exported."""
        return self.quantize if self.deploy is not None and self.deploy.precision == "int8" else None

    @cached_property
    def parts(self) -> "Parts":
        """Finished parts of the stage, kept in its folder."""
        from compress.search.parts import Parts  # imports torch; verifying a file needs none

        return Parts(self.folder, self.progress)


class Stage(Protocol):
    """One step of a pipeline. Kind of input and output, version and summary are declared in `catalog.STAGES`."""

    def __init__(self, config: Any) -> None: ...

    def run(self, artifact: Any, ctx: StageContext) -> tuple[Any, StageRecord]:
        """Return a new artifact and a record for the report; the input is not changed."""
        ...


StageFactory = Callable[[Any], Stage]
