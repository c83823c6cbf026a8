"""Trial of a new pipeline before it is written: usual normalisations, and the checks of `validate --deep`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.config.load import Pipeline
from compress.engine.preflight import find_problems
from compress.errors import CompressError
from compress.progress import Progress

if TYPE_CHECKING:  # imports torch
    from torch import nn

_IMAGES = 128
_ENOUGH = 0.8  # share of right training images above which no other normalisation is tried


@dataclass(frozen=True)
class FoundNormalization:
    """Normalisation that a network is far better with than with the usual one.

    Attributes:
        settings: Keys of `data.preprocessing`.
        right: Number of training images that are right with it.
        before: Number that is right with the usual one.
        images: Number of images tried.
        words: The settings, for sentences.
    """

    settings: dict[str, Any]
    right: int
    before: int
    images: int
    words: str

    @property
    def origin(self) -> str:
        """Comment for the file."""
        return f"found by trial: {self.right} of {self.images} training images are right, {self.before} with the usual"

    @property
    def note(self) -> str:
        """Sentence for the user."""
        return (
            f"Preprocessing found by trial: {self.words}. {self.right} of {self.images} training images are right, "
            f"{self.before} with the usual values"
        )


def find_normalization(pipeline: Pipeline, module: "nn.Module") -> FoundNormalization | None:
    """Return a usual normalisation that a classifier is far better with than with the pipeline's, else None.

    Args:
        pipeline: Pipeline of a labelled classification task.
        module: The network with its weights.
    """
    from compress.data.from_config import Splits
    from compress.search.diagnosis import count_right, is_shown_better, usual_normalizations, with_normalization

    try:
        split = Splits(pipeline.config.data).calibration.first(_IMAGES)
        before = count_right(module, split)
        if before >= _ENOUGH * len(split):
            return None
        usual = usual_normalizations(split.preprocessing.channels == "L")[1:]
        tried = [(count_right(module, with_normalization(split, one)), one) for one in usual]
    except (CompressError, RuntimeError, ValueError, TypeError, AttributeError):
        return None  # the network does not run on these images; the checks that follow say why
    right, best = max(tried, key=lambda pair: pair[0])
    if not is_shown_better(right, before, len(split)):
        return None
    settings = {"mean": list(best.mean), "std": list(best.std), "scale": best.scale, "channels": best.channels}
    defaults = {"scale": 1 / 255, "channels": "RGB"}
    kept = {key: value for key, value in settings.items() if defaults.get(key) != value}
    return FoundNormalization(kept, right, before, len(split), best.words)


def try_pipeline(pipeline: Pipeline, progress: Progress) -> list[str]:
    """Open data, network and runtimes of a pipeline, and return warnings.

    Raises:
        CompressError: The first problem that would stop a run.
    """
    findings = find_problems(pipeline, progress)
    for one in findings:
        if one.error is not None:
            raise one.error
    return [f"{one.text}{f' {one.hint}' if one.hint else ''}" for one in findings]
