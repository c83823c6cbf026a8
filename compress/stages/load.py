"""load: nothing -> TorchModel, with the baseline measured once."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifacts import Baseline, FactorySpec, Figures, Signature, TensorSpec, TorchModel
from compress.building import build_module, load_strict, read_weights, write_weights
from compress.config.schema import FactoryModel, LoadConfig, Model
from compress.cost.macs import count_macs, count_params, layer_macs
from compress.data.batches import evaluation_batches
from compress.data.splits import Split, known_labels
from compress.errors import DataError, ModelError, NonFinite
from compress.recipe import Recipe
from compress.stages.context import Record, StageContext
from compress.stages.exporting import export_present, try_rewrites
from compress.stages.measured import stated
from compress.tasks.base import Task
from compress.tasks.classification import Classification
from compress.tasks.outputs import named, plain
from compress.verification.measuring import Conditions, measure_onnx

INPUT_NAME, OUTPUT_NAME = "images", "logits"


class LoadStage:
    """Build the network, load its weights strictly, try it on real images, measure the baseline."""

    def __init__(self, config: LoadConfig) -> None:
        self.config = config

    def run(self, artifact: None, ctx: StageContext) -> tuple[TorchModel, Record]:
        """Return the untouched network.

        Raises:
            ModelError: The factory fails, or the network is not for the task and these images.
            ArtifactError: The weights cannot be read or do not fit.
            NonFinite: Weights or outputs are NaN or infinite.
            DataError: Targets do not fit the network.
        """
        spec = factory_spec(self.config.model)
        module = build_module(spec)
        load_strict(module, read_weights(Path(self.config.weights)), f"'{self.config.weights}'")
        check_precision(module)
        ctx.data.check_classes()
        ctx.data.make_original = lambda: copy.deepcopy(module)
        signature = try_network(module, ctx.data.calibration)
        for split in (ctx.data.train, ctx.data.calibration, ctx.data.validation, ctx.data.evaluation):
            check_labels(split, signature)
        model, rewrites = self._measure(module, spec, signature, ctx)
        figures, metric = model.baseline.figures, ctx.data.evaluation.task.main
        record = {
            "macs": figures.macs,
            "params": figures.params,
            "size_bytes": figures.size_bytes,
            metric.name: figures.quality[metric.name],
            **stated(metric),
            "layers": len(layer_macs(module, _example(signature))),
            "rewrites": rewrites,
        }
        ctx.progress.note(
            f"baseline: {figures.macs:,} MACs, {figures.params:,} params, {metric.words} "
            f"{metric.show(figures.quality[metric.name])} on {len(ctx.data.evaluation)} evaluation images, measured on "
            "the ONNX file"
        )
        return model, record

    def _measure(
        self, module: nn.Module, spec: FactorySpec, signature: Signature, ctx: StageContext
    ) -> tuple[TorchModel, list[Record]]:
        """Export the network as it runs best, measure the file, and return the model and what was tried."""
        path, weights = ctx.folder / "baseline.onnx", ctx.folder / "baseline.safetensors"
        write_weights(module, weights)
        example = _example(signature)
        counted = count_macs(module, example)
        baseline = Baseline(Figures(counted, count_params(module), 0, {}, {}), path, weights)
        precision = "fp32" if ctx.deploy is None else ctx.deploy.precision
        model = TorchModel(
            module, spec, Recipe(), signature, ctx.data.preprocessing, ctx.data.classes, baseline, precision=precision
        )
        export_present(model, path, ctx)
        tried = try_rewrites(path, signature, self.config.rewrites, ctx)
        kept = tuple(record["rewrite"] for record in tried if record["is_kept"])
        if kept:
            model = replace(model, rewrites=kept)
            export_present(model, path, ctx)
        figures = measure_onnx(path, ctx.data.evaluation, Conditions(), reference=module, progress=ctx.progress)
        if counted != figures.macs:
            ctx.progress.warn(
                f"The network's convolution and linear layers have {counted:,} MACs, its ONNX file {figures.macs:,}: "
                "the rest is done outside of layers, cannot be cut, and is left out of every budget."
            )
        return replace(model, baseline=replace(baseline, figures=replace(figures, macs=counted))), tried


def factory_spec(model: Model) -> FactorySpec:
    """Return how a `model:` section says the network is built."""
    if isinstance(model, FactoryModel):
        return FactorySpec("factory", model.factory, dict(model.kwargs))
    return FactorySpec("torchvision", model.torchvision, dict(model.kwargs))


def try_network(module: nn.Module, split: Split) -> Signature:
    """Run two real images through the network and return its signature.

    Raises:
        ModelError: The network does not run on them, or does not return what the task needs.
        NonFinite: An output is NaN or infinite.
    """
    images, targets = next(evaluation_batches(split.first(2), 2))
    try:
        with torch.no_grad():
            returned = module(images)
    except Exception as error:  # the user's code: its error is shown, ours is around it
        raise ModelError(
            f"The network must run on images of shape {tuple(images.shape)}, got {type(error).__name__}: {error}",
            hint="Check data.preprocessing (resize, crop, channels, layout) and model.kwargs.",
        ) from error
    check_outputs(returned, targets, split.lesson)
    outputs = named(returned, getattr(module, "output_names", (OUTPUT_NAME,)))
    if not all(one.isfinite().all() for one in outputs.values()):
        raise NonFinite("The network's outputs must be finite, got NaN or infinity on real images.")
    return Signature(
        inputs=(TensorSpec(INPUT_NAME, ("batch", *images.shape[1:])),),
        outputs=tuple(TensorSpec(name, ("batch", *one.shape[1:])) for name, one in outputs.items()),
    )


def check_outputs(returned: Any, targets: Any, task: Task) -> None:
    """Check that what a network returns is what the task needs.

    Raises:
        ModelError: It is not.
        DataError: The targets are not what the network can say.
    """
    if isinstance(task, Classification):  # which says better what a classifier must return
        task.check(returned, targets)
    else:
        task.check(plain(returned), targets)


def check_precision(module: nn.Module) -> None:
    """Raise ModelError unless every floating-point weight is float32."""
    other = [f"{name} {value.dtype}" for name, value in module.named_parameters() if value.dtype != torch.float32]
    if other:
        raise ModelError(
            f"The network's weights must be float32, got {', '.join(other[:3])}.",
            hint="Let the factory return a float32 network.",
        )


def check_labels(split: Split, signature: Signature) -> None:
    """Raise DataError unless every label of the split is an output of the network, where labels are classes."""
    labels = known_labels(split)
    if labels is None:
        return
    classes, largest = signature.outputs[0].shape[1], int(labels.max())
    if largest >= int(classes):
        raise DataError(
            f"Labels of '{split.name}' must be below the number of classes the network has ({classes}), got {largest}."
        )


def _example(signature: Signature) -> Tensor:
    return torch.zeros([1, *(int(size) for size in signature.inputs[0].shape[1:])])
