"""Early stop of a run whose finished stages show that it cannot pass its gates."""

import math
from collections.abc import Sequence
from typing import Any

from compress.config.load import Pipeline
from compress.config.schema.verify import VerifyConfig
from compress.report.build import StageRun
from compress.report.model import Stage
from compress.report.records import EditRecord, LoadRecord

MARGIN = 3.0  # standard errors by which the validation metric must miss a gate of the evaluation split
_CUTTING = ("prune", "slim", "low_rank")


def list_stops(pipeline: Pipeline) -> list[int]:
    """Return the numbers of stages after which a run is judged: after the last cut, and before the export."""
    names = [stage.stage for stage in pipeline.config.stages]
    cuts = [index + 1 for index, name in enumerate(names) if name in _CUTTING]
    return sorted({*cuts[-1:], names.index("export")})


def find_hopeless(pipeline: Pipeline, stages: Sequence[StageRun]) -> str | None:
    """Return the reason why a run cannot pass any more; None if it still can.

    MACs and params are exact. The drop of the primary metric is that on the validation split, and must miss its gate by
    three standard errors.

    Args:
        pipeline: The pipeline.
        stages: Outcomes of its first stages.
    """
    verify = pipeline.config.stages[-1]
    if not isinstance(verify, VerifyConfig) or not stages:
        return None
    read = [Stage.model_validate({"stage": one.stage, "record": one.record}).record for one in stages]
    edits = [record for record in read if isinstance(record, EditRecord)]
    if edits:
        for name, limit in (("macs", verify.gates.max_macs), ("params", verify.gates.max_params)):
            value = getattr(edits[-1], name).after
            if limit is not None and value is not None and value > limit:
                return f"{value:,.0f} {name} exceed the gate of {limit:,}"
    names = [stage.stage for stage in pipeline.config.stages]
    return _find_drop(pipeline, verify, read) if len(stages) >= names.index("export") else None


def _find_drop(pipeline: Pipeline, verify: VerifyConfig, read: Sequence[Any]) -> str | None:
    """Return the reason why the primary metric cannot keep its gate; None if it can, or too little is known."""
    images = pipeline.config.data.validation
    first = read[0]
    if not isinstance(images, int) or not isinstance(first, LoadRecord) or not first.metric.is_share:
        return None
    metric = first.metric
    limit = verify.gates.max_drop.get(metric.name)
    changes = [record.validation for record in read if record.validation.is_known]
    before = next((one.before for one in changes if one.before is not None), None)
    after = changes[-1].after if changes else None
    if limit is None or before is None or after is None or not metric.higher_is_better:
        return None
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / images)
    if before - after <= limit + MARGIN * error:
        return None
    return (
        f"{metric.words} drops by {100 * (before - after):.2f} percentage points on {images} validation images, the "
        f"gate is {100 * limit:g} and three standard errors are {100 * MARGIN * error:.2f}"
    )
