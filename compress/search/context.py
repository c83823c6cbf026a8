"""What does a stage get besides its artifact, and what must it offer?

How does the untouched network come back, to be learned from?
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from compress.checkpoint.rebuild import apply_edits, build_untouched, example_input, load_strict, read_weights
from compress.config.schema.verify import DeployConfig
from compress.data.from_config import Splits
from compress.model.artifacts import TorchModel
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.search.parts import Parts


@dataclass(frozen=True)
class StageContext:
    """The surroundings of one run of one stage.

    Attributes:
        folder: A folder of the stage's own. It survives a kill and is handed to the same stage (same cache key)
            again, so training state lives there; it is removed when the stage is done.
        seed: Decides everything random.
        data: The splits, opened when first asked for.
        progress: Told about anything that takes long.
        deploy: Where the model will run; None where the pipeline does not say.
        latency_tables: A folder for tables of latencies, shared by all runs.
    """

    folder: Path
    seed: int
    data: Splits
    progress: Progress
    deploy: DeployConfig | None = None
    latency_tables: Path = Path()

    @cached_property
    def parts(self) -> "Parts":
        """The parts of the stage that are done; kept in its folder."""
        from compress.search.parts import Parts  # torch, which verification of a file does without

        return Parts(self.folder, self.progress)


Record = dict[str, Any]


class Stage(Protocol):
    """One step of a pipeline. Kind of input and output, version and summary are declared in `catalog.STAGES`."""

    def __init__(self, config: Any) -> None: ...

    def run(self, artifact: Any, ctx: StageContext) -> tuple[Any, Record]:
        """Return a new artifact and a JSON-ready record for the report; the input stays untouched."""
        ...


StageFactory = Callable[[Any], Stage]


def original_of(artifact: TorchModel) -> nn.Module:
    """Return the untouched network in eval mode, without gradients.

    Raises:
        ModelError: The factory fails.
        ArtifactError: The baseline's weights cannot be read or do not fit.
    """
    built = build_untouched(artifact.factory, artifact.signature)
    original = apply_edits(built, artifact.recipe.of_baseline, example_input(artifact.signature))
    load_strict(original, read_weights(artifact.baseline.weights_path), "The baseline's weights")
    return original.requires_grad_(False)
