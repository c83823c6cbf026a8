"""Rules for `load`, and for stages that use the weights, features or quality of the loaded network."""

from collections.abc import Iterator

from compress.catalog import GATED
from compress.config.defaults import is_untrained
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.problems import KeyPath, Problem
from compress.config.schema.base import Section
from compress.config.schema.data import UnlabelledSource
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.model import LoadConfig, OnnxFileModel
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.training import DistillationConfig, FinetuneConfig, TrainingConfig
from compress.config.schema.verify import GatesConfig, VerifyConfig
from compress.config.sections import Sections

_RELATIVE_GATES = ("max_drop", "max_rise", "max_drop_on")
_METRICS_TO_BASELINE = frozenset({"churn", "softmax_distance", "distance", "agreement", "cosine"})


def check_weights(sections: Sections) -> Iterator[Problem]:
    """A network needs weights, and an ONNX file brings its own."""
    for path, load in sections.of(LoadConfig):
        place, is_onnx = (*path, "weights"), isinstance(load.model, OnnxFileModel)
        if is_onnx and load.weights is not None:
            yield sections.document.problem(place, "must be left out: the ONNX file has its weights.")
        elif not is_onnx and load.weights is None and sections.document.is_valid(place):
            yield sections.document.problem(place, "is missing.")


def check_narrow_weights(sections: Sections) -> Iterator[Problem]:
    """The widths of a narrow network are read from a file of weights."""
    for path, load in sections.of(LoadConfig):
        if not load.narrow:
            continue
        if isinstance(load.model, OnnxFileModel):
            why = "an ONNX file has the widths it has, and its weights with them"
        elif load.weights in (PRETRAINED, UNTRAINED):
            why = f"the widths are read from a file of weights, got weights: {load.weights}"
        else:
            continue
        yield sections.document.problem((*path, "narrow"), f"must be left out: {why}.")


def check_feature_distillation(sections: Sections) -> Iterator[Problem]:
    """Feature maps are those of modules, which a network from an ONNX file does not have."""
    if not any(isinstance(load.model, OnnxFileModel) for _, load in sections.of(LoadConfig)):
        return
    for path, distillation in _distillations(sections):
        if distillation.features:
            text = (
                "must be left out with model.onnx: feature maps are those of parts of a network, and a file has single "
                "layers only."
            )
            yield sections.document.problem((*path, "features"), text)


def _distillations(sections: Sections) -> Iterator[tuple[KeyPath, DistillationConfig]]:
    for index, stage in enumerate(sections.stages):
        path, training = _training(stage)
        if training is not None and training.distillation is not None:
            yield ("stages", index, *path, "distillation"), training.distillation


def _training(stage: Section | None) -> tuple[KeyPath, TrainingConfig | None]:
    """Return the training settings of a stage, and their key path in it."""
    if isinstance(stage, FinetuneConfig):
        return (), stage
    if isinstance(stage, PruneConfig | LowRankConfig):
        return ("training",), stage.training
    if isinstance(stage, SlimConfig):
        return ("between",), stage.between
    return (), None


def check_rewinding(sections: Sections) -> Iterator[Problem]:
    """Rewinding needs a checkpoint of the unpruned network, with the same layers."""
    for path, finetune in sections.of(FinetuneConfig):
        if finetune.weights == "rewound":
            obstacle = _obstacle_to_rewinding(sections, int(path[-1]))
            if obstacle is not None:
                text, hint = obstacle
                yield sections.document.problem((*path, "weights"), f"must not be rewound {text}", hint)


def _obstacle_to_rewinding(sections: Sections, end: int) -> tuple[str, str | None] | None:
    """Return why the network cannot be rewound in stage `end`, with a hint; None if it can."""
    for index, stage in enumerate(sections.stages[:end]):
        if isinstance(stage, LoadConfig) and isinstance(stage.model, OnnxFileModel):
            return "with model.onnx: no checkpoint has the names of a file's layers.", "name the network's factory."
        if isinstance(stage, LoadConfig) and stage.narrow:
            text = "with narrow: a checkpoint of the unpruned network does not tell which of its channels were kept."
            return text, "set weights: inherited, or random."
        if sections.names[index] == "low_rank":
            return f"after low_rank (stages[{index}]): a checkpoint has no factors of its layers.", None
        moves: KeyPath = ("stages", index, "moves")
        if isinstance(stage, SlimConfig) and "ranks" in stage.moves and sections.document.is_valid(moves):
            text = f"after slim with ranks (stages[{index}]): a checkpoint has no factors of its layers."
            return text, f"set stages[{index}].moves: [channels, blocks]."
    return None


def check_untrained_teacher(sections: Sections) -> Iterator[Problem]:
    """Nothing can be learned from an untrained baseline."""
    if is_untrained(sections.stages):
        for path in _teachings(sections):
            text = "must be left out with weights: none: the baseline is untrained and teaches nothing."
            yield sections.document.problem(path, text)


def _teachings(sections: Sections) -> Iterator[KeyPath]:
    """Yield the settings that train on outputs of the baseline."""
    yield from (path for path, _ in _distillations(sections))
    if sections.data is not None and isinstance(sections.data.train, UnlabelledSource):
        yield ("data", "train", "unlabelled")
    task = sections.task
    if task is not None and (task.name == "embedding" or (task.name == "detection" and task.loss is None)):
        yield ("task",)


def check_untrained_gates(sections: Sections) -> Iterator[Problem]:
    """An untrained baseline is no reference: gates must hold absolute limits."""
    if is_untrained(sections.stages):
        for path, verify in sections.of(VerifyConfig):
            yield from _check_absolute(sections, (*path, "gates"), verify.gates)


def _check_absolute(sections: Sections, path: KeyPath, gates: GatesConfig) -> Iterator[Problem]:
    document, task = sections.document, sections.task
    limits = GATED.get(task.name or "") if task is not None else None
    kind = "max" if limits is not None and not limits["min"] else "min"
    wanted = ("min", "max") if limits is None else (kind,)
    hint = f"gates: {{{kind}: {{METRIC: LIMIT}}}} holds the file to a value of its own."
    relative: list[KeyPath] = [(*path, name) for name in _RELATIVE_GATES if getattr(gates, name)]
    for name, given in (("min", gates.min), ("max", gates.max)):
        relative += [(*path, name, metric) for metric in given if metric in _METRICS_TO_BASELINE]
    for place in relative:
        text = "must be left out with weights: none: an untrained baseline is no yardstick."
        yield document.problem(place, text, hint)
    is_valid = document.is_valid_itself(path) and all(document.is_valid((*path, name)) for name in wanted)
    if not relative and is_valid and not any(getattr(gates, name) for name in wanted):
        text = f"must hold {kind} with weights: none: else nothing says that the network learned."
        yield document.problem(path, text, hint)
