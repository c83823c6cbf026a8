"""finetune: TorchModel -> TorchModel with the same structure and better weights."""

from dataclasses import replace
from pathlib import Path

from compress.checkpoint.rebuild import reinitialized, rewound
from compress.config.schema.training import FinetuneConfig
from compress.data.batches import random_seed
from compress.errors import InternalError
from compress.model.artifacts import TorchModel
from compress.model.stage_records import FinetuneRecord, OwnTrainingRecord
from compress.search.context import StageContext
from compress.search.own_training import load_trained, train_by_user_code
from compress.search.training import train, training_epochs
from compress.search.validation import metric_of, validation_quality

STATE_FILE = "training_state.pt"


class FinetuneStage:
    """Stage that trains the network with a seeded loop and chooses the best epoch on the validation split."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[TorchModel, FinetuneRecord | OwnTrainingRecord]:
        """Return the trained network; a killed run resumes from its last state.

        Raises:
            ModelError: `weights` is random, and a parameter cannot be drawn anew.
            As `compress.checkpoint.rebuild.rewound` if `weights` is rewound.
            As `compress.training.loop.fit`.
        """
        config = self.config
        if config.trained is not None:
            return _trained_elsewhere(artifact, config, ctx)
        if config.weights == "random":
            artifact = replace(artifact, module=reinitialized(artifact.module, random_seed(ctx.seed, "weights")))
        elif config.weights == "rewound":
            artifact = _rewound(artifact, config, ctx)
        if config.own is not None:
            return _trained_elsewhere(artifact, config, ctx)
        if config.rewind_schedule == "tail":
            ctx.progress.note(_tail(config, len(ctx.data.train)))
        model, record = train(artifact, config, ctx, STATE_FILE, config.norms)
        epoch, schedule = config.rewind_epoch, config.rewind_schedule
        return model, FinetuneRecord(
            **vars(record), weights=config.weights, rewind_epoch=epoch, rewind_schedule=schedule
        )


def _trained_elsewhere(
    artifact: TorchModel, config: FinetuneConfig, ctx: StageContext
) -> tuple[TorchModel, OwnTrainingRecord]:
    """Return the network with weights that the user's code or another program has trained."""
    before = validation_quality(artifact.module, ctx)
    if config.trained is not None:
        module, source = load_trained(artifact, Path(config.trained)), f"'{config.trained}'"
    else:
        source = f"'{config.own}'"
        module = train_by_user_code(artifact, config.own or "", config.kwargs, ctx)
    after = validation_quality(module, ctx)
    metric = metric_of(ctx.data.validation)
    change = f"validation {metric.words} {metric.show(before)} -> {metric.show(after)}"
    warnings = []
    if metric.is_better(before, after):
        warnings.append(f"The weights of {source} are worse than those before: {change}. They are kept.")
        ctx.progress.warn(warnings[0])
    else:
        ctx.progress.note(f"weights of {source}: {change}")
    record = OwnTrainingRecord(
        metric=metric,
        validation_before=before,
        validation_after=after,
        own=config.own,
        weights=config.weights,
        warnings=tuple(warnings),
    )
    return replace(artifact, module=module), record


def _rewound(artifact: TorchModel, config: FinetuneConfig, ctx: StageContext) -> TorchModel:
    """Return the slim network with the weights and statistics of the checkpoint."""
    if config.rewind_to is None:
        raise InternalError("A pipeline passed validation without a checkpoint to rewind to.")
    path = Path(config.rewind_to)
    module, conversions = rewound(artifact.factory, artifact.recipe, artifact.signature, path)
    for conversion in conversions:
        (ctx.progress.note if conversion.is_exact else ctx.progress.warn)(conversion.text)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (module, artifact.module)]
    if shapes[0] != shapes[1]:
        raise InternalError("The network cut from the checkpoint has other shapes than the slim network.")
    epoch = "" if config.rewind_epoch is None else f", epoch {config.rewind_epoch:g}"
    ctx.progress.note(f"weights rewound to '{path.name}'{epoch}: the same channels and blocks are removed")
    return replace(artifact, module=module)


def _tail(config: FinetuneConfig, images: int) -> str:
    """Describe for the log the part of the original schedule that this training runs through."""
    if config.original is None or config.rewind_epoch is None:
        raise InternalError("A pipeline passed validation without the original schedule.")
    left, epochs = config.original.epochs - config.rewind_epoch, training_epochs(config, images)
    pace = "" if abs(left - epochs) <= 0.01 * left else f", run through in {epochs:g}"
    return (
        f"learning rate rewound to epoch {config.rewind_epoch:g} of {config.original.epochs:g}: the last {left:g} "
        f"epochs of the {config.schedule} schedule{pace}"
    )
