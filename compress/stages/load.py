"""load: nothing -> TorchModel, with the baseline measured once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from compress.checkpoint.rebuild import (
    build_module,
    build_narrow,
    example_input,
    fitting_weights,
    initialized,
    load_strict,
    with_one_array,
    without_unread,
    write_weights,
)
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.schema.model import LoadConfig, Model
from compress.cost.macs import count_params, count_products, counts_agree, layer_macs
from compress.data.batches import evaluation_batches, random_seed
from compress.data.sources.classification import order_warning
from compress.data.splits import Split, known_labels
from compress.errors import DataError, InternalError, ModelError
from compress.model.adapter import INPUT_NAME, unpack_rows
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TorchModel
from compress.model.recipe import Narrow, Recipe, RemoveUnread
from compress.model.stage_records import LoadRecord, Rewrite
from compress.networks.batch_independence import IMAGES, require_batch_independence
from compress.networks.weights import Conversion, some
from compress.networks.wiring import notes_on, run_network, signature_of
from compress.networks.zoo import pretrained_state
from compress.onnx_file.io import load_onnx, read_inputs, read_metadata
from compress.onnx_import.importer import import_onnx
from compress.search.context import StageContext
from compress.search.diagnosis import IMAGES as JUDGED
from compress.search.diagnosis import describe_baseline
from compress.search.export import check_export, export_present, try_rewrites
from compress.search.teacher import LoadedTeacher
from compress.search.validation import chance_warning, compare_with_evaluation
from compress.tasks.base import Task
from compress.tasks.classification import Classification
from compress.tasks.outputs import plain
from compress.training.batch_norm import reestimate_batch_norm
from compress.verification.measurement import Conditions, measure_onnx

UNTRAINED_NOTE = (
    "The network is untrained (weights: none): its quality is that of a random initialisation, and no drop against it "
    "says anything."
)
FIXED_SEED = (
    "The initial weights of '{}' are the same for every seed: the factory fixes a seed of its own, or loads weights. "
    "weights: none then gives the same network in every run."
)


@dataclass(frozen=True)
class Opened:
    """A network that was built and tried on images, but not measured yet.

    Attributes:
        module: The network in the form that stages work with.
        spec: Factory of the network.
        recipe: Edits of the baseline: modules that no output reads, and narrow widths.
        signature: Inputs and outputs of the network.
        import_error: Error of a network from an ONNX file, over the largest output; None for another network.
        rounding_error: Difference of a quantised file to its float form, over the largest output; None for others.
    """

    module: nn.Module
    spec: FactorySpec
    recipe: Recipe
    signature: Signature
    import_error: float | None
    rounding_error: float | None = None


class LoadStage:
    """Stage that builds the network, loads its weights strictly, runs it on real images and measures the baseline."""

    def __init__(self, config: LoadConfig) -> None:
        self.config = config
        self.warnings: list[str] = []

    def run(self, artifact: None, ctx: StageContext) -> tuple[TorchModel, LoadRecord]:
        """Return the baseline.

        Raises:
            ModelError: The factory fails, or the network is not for the task and these images.
            ArtifactError: The weights cannot be read or do not fit.
            NonFinite: Weights or outputs are NaN or infinite.
            DataError: Targets do not fit the network.
        """
        opened = self.open(ctx)
        model, rewrites = self._measure(opened, ctx)
        metrics, metric = model.baseline.metrics, ctx.data.evaluation.task.main
        if self.is_untrained:
            self.warnings.append(UNTRAINED_NOTE)  # in the report only: it is no fault
            ctx.progress.note(UNTRAINED_NOTE)
        elif warning := chance_warning(metrics.quality[metric.name], ctx.data.evaluation):
            self._warn(ctx, warning)
            for reason in describe_baseline(opened.module, ctx.data.evaluation.first(JUDGED))[1:]:
                self._warn(ctx, reason)
        recipe, quality = opened.recipe, metrics.quality[metric.name]
        validation = None
        if not self.is_untrained:
            validation = compare_with_evaluation(opened.module, quality, ctx, partial(self._warn, ctx))
        record = LoadRecord(
            metric=metric,
            macs=metrics.macs,
            params=metrics.params,
            size_bytes=metrics.size_bytes,
            quality=quality,
            metrics=tuple(metrics.quality),
            layers=len(layer_macs(opened.module, example_input(opened.signature))),
            is_untrained=self.is_untrained,
            rewrites=tuple(rewrites),
            unread=tuple(path for edit in recipe.edits if isinstance(edit, RemoveUnread) for path in edit.modules),
            narrow=_lacking(recipe) if self.config.narrow else None,
            import_error=opened.import_error,
            rounding_error=opened.rounding_error,
            validation=validation,
            warnings=tuple(self.warnings),
        )
        ctx.progress.note(
            f"baseline: {metrics.macs:,} MACs, {metrics.params:,} params, {metric.words} "
            f"{metric.show(metrics.quality[metric.name])} on {len(ctx.data.evaluation)} evaluation images, measured on "
            "the ONNX file"
        )
        return model, record

    def open(self, ctx: StageContext) -> Opened:
        """Build the network, load its weights and try it on real images; nothing is exported or measured.

        Raises:
            As `run`.
        """
        spec = with_inputs(factory_spec(self.config.model), ctx.data.calibration)
        built = None if self.config.narrow else self._build(spec, ctx)
        import_error = None if built is None else _import_error(built, spec, ctx)
        ctx.data.check_classes()
        if warning := order_warning(ctx.data.classes):
            self._warn(ctx, warning)
        for split in (ctx.data.calibration, ctx.data.evaluation):
            check_inputs(split, spec)
        images, _ = next(evaluation_batches(ctx.data.calibration.first(2), 2, "nothing"))
        if built is None:
            module, recipe = self._build_narrow(spec, images, ctx)
        else:
            module, recipe = self._in_one_form(built, spec, images, ctx)
        if self.is_untrained:
            reestimate_batch_norm(module, ctx.data.calibration, ctx.progress)  # (0, 1) until then
        ctx.data.teacher = LoadedTeacher(module)
        signature = try_network(module, ctx.data.calibration, spec)
        several, _ = next(evaluation_batches(ctx.data.calibration.first(IMAGES), IMAGES, "nothing"))
        require_batch_independence(module, several)
        for split in (ctx.data.train, ctx.data.calibration, ctx.data.validation, ctx.data.evaluation):
            check_labels(split, signature)
        rounding = None if built is None else _rounding_error(built)
        return Opened(module, spec, recipe, signature, import_error, rounding)

    def _build(self, spec: FactorySpec, ctx: StageContext) -> nn.Module:
        """Return the network with its weights."""
        if spec.kind == "onnx":
            images, _ = next(evaluation_batches(ctx.data.calibration.first(2), 2, "nothing"))
            inputs = spec.input_specs()
            parts = [part.numpy() for part in unpack_rows(images, inputs)] if inputs else [images.numpy()]
            module: nn.Module = import_onnx(Path(spec.reference), spec.kwargs["inputs"], parts)
            check_precision(module)
            return module
        if self.config.weights is None:
            raise InternalError("A pipeline passed validation without weights.")
        if self.is_untrained:
            module, is_seeded = initialized(spec, random_seed(ctx.seed, "weights"))
            if not is_seeded:
                self._warn(ctx, FIXED_SEED.format(spec.reference))
        else:
            module = load_network(spec, self.config.weights, partial(self._tell_conversion, ctx))
        check_precision(module)
        return module

    @property
    def is_untrained(self) -> bool:
        """True if the network starts from a seeded initialisation."""
        return self.config.weights == UNTRAINED

    def _in_one_form(
        self, module: nn.Module, spec: FactorySpec, images: torch.Tensor, ctx: StageContext
    ) -> tuple[nn.Module, Recipe]:
        """Return a network in the form that the stages work with, and the edits that lead to it."""
        module = with_one_array(module, spec, images)
        for note in notes_on(module, images):
            self._warn(ctx, note)
        return self._without_unread(module, images, ctx)

    def _build_narrow(self, spec: FactorySpec, images: torch.Tensor, ctx: StageContext) -> tuple[nn.Module, Recipe]:
        """Return the network at the widths of its weights, and the edits that lead to it from the full network."""
        path = Path(self.config.weights or "")
        module, recipe, conversions = build_narrow(spec, path, images)
        for conversion in conversions:
            self._tell_conversion(ctx, conversion)
        check_precision(module)
        for note in notes_on(module, images):
            self._warn(ctx, note)
        lacking = _lacking(recipe)
        if lacking:
            count = f"{sum(lacking.values())} channels in {len(lacking)} channel groups"
            ctx.progress.note(
                f"narrow: '{path.name}' lacks {count} of the factory's network; baseline is the narrow one"
            )
            if norms := _guessed_norms(build_module(spec), module):
                self._warn(
                    ctx, f"narrow: a state dict does not tell the number of groups of a group norm; {some(norms)}."
                )
        else:
            self._warn(ctx, f"narrow: '{path.name}' is as wide as the factory's network; nothing was cut.")
        return module, recipe

    def _tell_conversion(self, ctx: StageContext, conversion: Conversion) -> None:
        if conversion.is_exact:
            ctx.progress.note(conversion.text)
        else:
            self._warn(ctx, conversion.text)

    def _warn(self, ctx: StageContext, text: str) -> None:
        """Warn in the log, and in the report."""
        ctx.progress.warn(text)
        self.warnings.append(text)

    def _without_unread(self, module: nn.Module, images: torch.Tensor, ctx: StageContext) -> tuple[nn.Module, Recipe]:
        """Return the network without parts that no output reads, and the edit that removes them."""
        slim, recipe = without_unread(module, images)
        for edit in recipe.edits:
            if isinstance(edit, RemoveUnread):
                count = count_params(module) - count_params(slim)
                ctx.progress.note(f"removed, as no output reads them: {some(list(edit.modules))} ({count:,} params)")
        return slim, recipe

    def _measure(self, opened: Opened, ctx: StageContext) -> tuple[TorchModel, list[Rewrite]]:
        """Export the network with the rewrites that speed it up, and measure the file; return model and rewrites."""
        module, spec, signature = opened.module, opened.spec, opened.signature
        path, weights = ctx.folder / "baseline.onnx", ctx.folder / "baseline.safetensors"
        write_weights(module, weights)
        example = example_input(signature)
        products = count_products(module, example)
        counted = sum(products.macs.values())
        baseline = Baseline(ModelMetrics(counted, count_params(module), 0, {}, {}), path, weights)
        precision = "fp16" if ctx.deploy is not None and ctx.deploy.precision == "fp16" else "fp32"
        model = TorchModel(
            module,
            spec,
            opened.recipe,
            signature,
            ctx.data.preprocessing,
            _classes(spec, ctx),
            baseline,
            precision=precision,
        )
        export_present(model, path, ctx)
        tried = try_rewrites(path, signature, self.config.rewrites, ctx)
        kept = tuple(one.rewrite for one in tried if one.is_kept)
        if kept:
            model = replace(model, rewrites=kept)
            export_present(model, path, ctx)
        if warning := check_export(model, path, ctx):
            self._warn(ctx, warning)
        metrics = measure_onnx(path, ctx.data.evaluation, Conditions(), reference=module, progress=ctx.progress)
        if not counts_agree(metrics.macs, counted, products.constant_macs):
            ctx.progress.warn(
                f"The network has {counted:,} MACs, its ONNX file {metrics.macs:,}: the exporter computes some of them "
                "in another way. Budgets count those of the network; verify compares the two."
            )
        return replace(model, baseline=replace(baseline, metrics=replace(metrics, macs=counted))), tried


def _lacking(recipe: Recipe) -> dict[str, int]:
    """Return channel group -> number of channels that the weights lack."""
    return {name: len(gone) for edit in recipe.edits if isinstance(edit, Narrow) for name, gone in edit.removed.items()}


def _guessed_norms(full: nn.Module, slim: nn.Module) -> list[str]:
    """Describe each group norm that is assumed to have fewer groups, since `prune` removes complete groups."""
    found = []
    for path, part in slim.named_modules():
        if isinstance(part, nn.GroupNorm):
            before = full.get_submodule(path)
            if isinstance(before, nn.GroupNorm) and before.num_groups != part.num_groups:
                found.append(f"{path} is taken to have {part.num_groups} of {before.num_groups}")
    return found


def _import_error(module: nn.Module, spec: FactorySpec, ctx: StageContext) -> float | None:
    """Return, and note, the error of a network from an ONNX file against ONNX Runtime's outputs of the file."""
    if not (spec.kind == "onnx" and isinstance(module, fx.GraphModule)):
        return None
    error: float = module.meta["import_error"]
    name, rounding = Path(spec.reference).name, _rounding_error(module)
    ctx.progress.note(f"imported: outputs are those of ONNX Runtime with '{name}' to {error:.1g} of the largest")
    if rounding is not None:
        ctx.progress.note(
            f"'{name}' is quantised: the baseline is its float form, whose outputs differ by up to {rounding:.1%} of "
            "the largest; a quantize stage rounds the slim network"
        )
    return error


def _rounding_error(module: nn.Module) -> float | None:
    """Return the difference of a quantised file to its float form, relative to the largest output; None for others."""
    error: float | None = module.meta.get("rounding_error") if isinstance(module, fx.GraphModule) else None
    return error


def _classes(spec: FactorySpec, ctx: StageContext) -> tuple[str, ...]:
    """Return the names of the classes: from the data, else from the ONNX file."""
    if ctx.data.classes or spec.kind != "onnx":
        return ctx.data.classes
    return read_metadata(load_onnx(Path(spec.reference))).classes


def factory_spec(model: Model) -> FactorySpec:
    """Return the factory that a `model:` section describes."""
    return FactorySpec.from_model(model.model_dump())


def load_network(spec: FactorySpec, weights: str, tell: Callable[[Conversion], None] | None = None) -> nn.Module:
    """Return the network with its weights, as its factory made it.

    Args:
        spec: Factory of the network.
        weights: Path of the weights, or "pretrained".
        tell: Function called with each conversion of weights to another type.

    Raises:
        ModelError: The factory fails, or the network computes something else with its pretrained weights.
        ArtifactError: The weights cannot be read or do not fit.
        NonFinite: A weight is NaN or infinite.
    """
    module = build_module(spec)
    if weights == PRETRAINED:
        source = f"The weights of {spec.kind} for '{spec.reference}'"
        conversions = load_strict(module, pretrained_state(spec), source)
        return _told(module, conversions, tell)
    state = fitting_weights(spec, Path(weights), module)
    return _told(module, load_strict(module, state, f"'{weights}'"), tell)


def _told(module: nn.Module, conversions: list[Conversion], tell: Callable[[Conversion], None] | None) -> nn.Module:
    for conversion in conversions:
        if tell is not None:
            tell(conversion)
    return module


def try_network(module: nn.Module, split: Split, spec: FactorySpec) -> Signature:
    """Run two real images through the network and return its signature.

    Raises:
        ModelError: The network does not run on them, has outputs that do not fit the task, or changes between runs.
        NonFinite: An output is NaN or infinite.
    """
    images, targets = next(evaluation_batches(split.first(2), 2))
    signature = signature_of(module, spec, images)
    returned = run_network(module, images)
    if len(signature.outputs) > 1 and isinstance(split.task, Classification):
        names = ", ".join(output.name for output in signature.outputs)
        raise ModelError(
            f"A classifier must return one (N, classes) tensor, the network returns {names}.",
            hint="Name the one to keep: model.outputs.",
        )
    check_outputs(plain(returned, [output.name for output in signature.outputs]), targets, split.objective)
    return signature


def check_outputs(returned: Any, targets: Any, task: Task) -> None:
    """Check that the outputs of a network fit the task.

    Raises:
        ModelError: The outputs do not fit the task.
        DataError: The targets do not fit the outputs.
    """
    task.check(returned, targets)


def check_precision(module: nn.Module) -> None:
    """Raise ModelError unless every floating-point weight is float32."""
    other = [f"{name} {value.dtype}" for name, value in module.named_parameters() if value.dtype != torch.float32]
    if other:
        raise ModelError(
            f"The network's weights must be float32, got {', '.join(other[:3])}.",
            hint="Let the factory return a float32 network.",
        )


def check_inputs(split: Split, spec: FactorySpec) -> None:
    """Raise DataError unless samples have the declared inputs of the network, in their order and shapes."""
    given: Mapping[str, tuple[int, ...]] = getattr(split.source, "inputs", {})
    wanted = {name: tuple(declared["shape"]) for name, declared in spec.inputs.items()}
    if given and tuple(given) != tuple(wanted):
        raise DataError(
            f"Samples of '{split.name}' must have the inputs of the network in their order "
            f"({', '.join(wanted) or 'model.inputs names none'}), got {', '.join(given)}."
        )
    shape = getattr(split.source, "shape", None)
    found = {next(iter(wanted), INPUT_NAME): shape} if shape is not None else given
    for name, sizes in found.items():
        if wanted and (len(found) != len(wanted) or tuple(sizes) != wanted[name]):
            raise DataError(
                f"Samples of '{split.name}' must be the shapes that the network takes "
                f"({', '.join(f'{one} {size}' for one, size in wanted.items())}), got {tuple(sizes)} for '{name}'.",
                hint="Check model.inputs, and what the data set's __getitem__ returns.",
            )


def with_inputs(spec: FactorySpec, split: Split) -> FactorySpec:
    """Return the factory with the network's only input declared, if samples are no images."""
    shape = getattr(split.source, "shape", None)
    if spec.inputs or shape is None:
        return spec
    name = INPUT_NAME
    if spec.kind == "onnx":
        taken = read_inputs(load_onnx(Path(spec.reference)))
        name = taken[0].name if len(taken) == 1 else name
    return replace(spec, inputs={name: {"shape": list(shape)}})


def check_labels(split: Split, signature: Signature) -> None:
    """Raise DataError unless every class label of the split is an output of the network."""
    labels = known_labels(split)
    if labels is None:
        return
    classes, largest = signature.outputs[0].shape[1], int(labels.max())
    if largest >= int(classes):
        raise DataError(
            f"Labels of '{split.name}' must be below the number of classes the network has ({classes}), got {largest}."
        )
