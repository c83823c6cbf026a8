"""Functions on networks in memory: inspect, prune, low_rank, finetune, export, save.

Each runs the stage of a pipeline with the same settings. A network given is not changed; a copy is returned.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.allocation.widths import Limits
from compress.api.data import LoaderSplits, Loss, resolve_task
from compress.api.lineage import Example, Lineage, lineage_of, open_lineage, publish, unwrap
from compress.api.settings import Listener, listener, read_settings
from compress.bundle import check
from compress.checkpoint.layout import save_checkpoint
from compress.checkpoint.rebuild import example_input
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.prune import PruneConfig
from compress.config.schema.training import FinetuneConfig
from compress.config.schema.verify import DeployConfig
from compress.data.batches import evaluation_batches
from compress.errors import ArtifactError, ConfigValueError, DataError, ExportFailed, ModelError
from compress.exporting.fidelity import file_error
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.inspection.overview import Overview, inspect_network
from compress.inspection.sensitivity import Sensitivity, measure_sensitivity
from compress.inspection.targets import Network
from compress.model.adapter import random_inputs
from compress.model.artifacts import FactorySpec, TorchModel
from compress.model.modes import eval_mode
from compress.networks.wiring import run_network
from compress.onnx_import.importer import build_imported
from compress.search.context import StageContext
from compress.search.export import OPSET, conditions_of, export_present
from compress.search.teacher import LoadedTeacher
from compress.stages.finetune import FinetuneStage
from compress.stages.load import check_labels, check_outputs
from compress.stages.low_rank import LowRankStage
from compress.stages.prune import PruneStage
from compress.storage.files import require_output
from compress.tasks.base import Task
from compress.tasks.outputs import plain

PARITY = 1e-3  # largest difference of an exported file from torch, over the largest output
_TARGETS = ("macs", "params", "latency", "latency_ms", "size_mb")
_COMPARED, _SEED = 4, 0


def inspect(
    model: nn.Module,
    example: Example | None = None,
    *,
    latency: bool = False,
    limits: Mapping[str, Any] | None = None,
    deploy: Mapping[str, Any] | None = None,
    progress: Listener = True,
) -> Overview:
    """Return the prunable channel groups of a network, the excluded ones with reasons, and its least MACs.

    Args:
        model: Any network; it is not changed.
        example: A tensor (N, ...) that the network is called with, or several in order or by name; not needed for a
            network that compress returned.
        latency: True times the network, and the narrowest one, in the target runtime (seconds).
        limits: `multiple_of`, `min_width` and `max_removed_ratio` of every channel group, as in `prune`.
        deploy: Target runtime: `provider`, `threads`, `batch_size` and others of the `deploy` section.
        progress: True prints progress and warnings, False nothing; or an object that receives them.

    Returns:
        An overview with `tables()`, `to_dict()` and `potential`; notebooks show it as tables.

    Raises:
        ModelError: The network does not run on the example, or returns something other than tensors.
        UntraceableModel: No channel graph could be built.
        ConfigValueError: A setting is wrong.
    """
    lineage = open_lineage(model, example)
    signature = lineage.model.signature
    try:
        bounds = Limits(**{"multiple_of": 8, **(limits or {})})
    except TypeError as error:
        raise ConfigValueError(
            f"inspect: limits must be multiple_of, min_width and max_removed_ratio, got {limits}."
        ) from error
    conditions = conditions_of(_deploy(deploy, "inspect"))
    network = Network(lineage.model.module, example_input(signature), signature, bounds, conditions)
    return inspect_network(type(unwrap(model)).__name__, network, latency, listener(progress))


def sensitivity(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Any,
    validation: Any = None,
    loss: Loss | None = None,
    task: Task | None = None,
    seed: int = 0,
    progress: Listener = True,
    **settings: Any,
) -> Sensitivity:
    """Return the rise of the loss over the width of each channel group, the other groups at full width.

    Args:
        model: As in `prune`.
        example: As there.
        data: As there.
        validation: As there; the loss is measured on these samples.
        loss: As there.
        task: As there.
        seed: As there.
        progress: As there.
        settings: Settings of the stage `prune`, such as `criterion` and `score_images`.

    Returns:
        Curves with `tables()`, `to_dict()` and `to_svg()`; notebooks show the picture.

    Raises:
        CompressError: As `prune`.
    """
    config = read_settings(PruneConfig, {"stage": "prune", "target": {"macs": 0.5}, **settings}, "sensitivity")
    lineage = open_lineage(model, example)
    with _context(lineage, data, validation, resolve_task(loss, task), seed, progress, None) as ctx:
        return measure_sensitivity(lineage.model, config, ctx)


def prune(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Any,
    validation: Any = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    size_mb: float | None = None,
    loss: Loss | None = None,
    task: Task | None = None,
    keep: Sequence[str] = (),
    deploy: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Listener = True,
    **settings: Any,
) -> nn.Module:
    """Return a copy of a network with fewer channels and blocks, within a budget, and repaired.

    Args:
        model: On any device, in any mode; it is not changed.
        example: A tensor (N, ...) that the network is called with, or several in order or by name; not needed for a
            network that compress returned.
        data: Loader of `(images, targets)`, `(inputs..., targets)`, mappings, or inputs alone; or a data set, or a
            tuple of tensors. Samples are as the network takes them. Without targets the baseline is imitated.
        validation: Loader, data set or tensors by which repairs are chosen; by default a tenth of `data`.
        macs: Kept ratio of the baseline's MACs, in (0, 1].
        params: Kept ratio of its params.
        latency: Kept ratio of its latency in the target runtime, measured.
        latency_ms: Latency in milliseconds.
        size_mb: Size of the ONNX file, in 10^6 bytes.
        loss: Mean loss of outputs and targets of a batch; by default cross-entropy for whole numbers.
        task: A `compress.Task` in place of `loss`.
        keep: Layers whose channels are kept; `*` matches any text.
        deploy: Target runtime: `provider`, `threads`, `batch_size` and others of the `deploy` section.
        seed: Of random choices.
        progress: True prints progress and warnings, False nothing; or an object that receives them.
        settings: Settings of the stage `prune`, such as `criterion` and `blocks`.

    Raises:
        BudgetUnreachable: The budget cannot be met, or nothing would be removed.
        ConfigValueError: A setting is wrong, or `keep` matches nothing.
        DataError: The data are not as the network takes them.
        ModelError, UntraceableModel, UnsupportedLayer: The network cannot be pruned.
    """
    values = (macs, params, latency, latency_ms, size_mb)
    target = {name: value for name, value in zip(_TARGETS, values, strict=True) if value is not None}
    if not target:
        raise ConfigValueError(f"prune: one of {', '.join(_TARGETS)} must be given.", hint="prune(..., macs=0.5)")
    kept = {"exclude": [*keep]} if keep else {}
    config = read_settings(PruneConfig, {"stage": "prune", "target": target, **kept, **settings}, "prune")
    lineage = open_lineage(model, example)
    with _context(lineage, data, validation, resolve_task(loss, task), seed, progress, deploy) as ctx:
        needs_file = config.target.needs_latency or config.target.size_mb is not None or config.damage == "sensitivity"
        if needs_file:
            _ensure_baseline_file(lineage, ctx)
        slim, _ = PruneStage(config).run(lineage.model, ctx)
    return publish(lineage, slim, model)


def low_rank(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Any,
    validation: Any = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    relative_error: float | None = None,
    loss: Loss | None = None,
    task: Task | None = None,
    deploy: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Listener = True,
    **settings: Any,
) -> nn.Module:
    """Return a copy of a network whose kernels are products of smaller ones where that is cheaper.

    Args:
        model: As in `prune`.
        example: As there.
        data: As there.
        validation: As there.
        macs: Kept ratio of the baseline's MACs; exactly one budget is given.
        params: Kept ratio of its params.
        latency: Kept ratio of its latency in the target runtime.
        latency_ms: Latency in milliseconds.
        relative_error: Bound on the relative error of every layer, in place of a budget.
        loss: As in `prune`.
        task: As there.
        deploy: As there.
        seed: As there.
        progress: As there.
        settings: Settings of the stage `low_rank`, such as `allocation` and `schemes`.

    Raises:
        CompressError: As `prune`.
    """
    budget = {"latency": latency, "latency_ms": latency_ms, "macs": macs, "params": params}
    target = {name: value for name, value in budget.items() if value is not None}
    values = {"stage": "low_rank", "target": target or None, "relative_error": relative_error, **settings}
    config = read_settings(LowRankConfig, values, "low_rank")
    lineage = open_lineage(model, example)
    with _context(lineage, data, validation, resolve_task(loss, task), seed, progress, deploy) as ctx:
        if config.target is not None and config.target.needs_latency:
            _ensure_baseline_file(lineage, ctx)
        slim, _ = LowRankStage(config).run(lineage.model, ctx)
    return publish(lineage, slim, model)


def finetune(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Any,
    validation: Any = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    task: Task | None = None,
    seed: int = 0,
    progress: Listener = True,
    **settings: Any,
) -> nn.Module:
    """Return a copy of a network, trained; the best epoch on validation is kept.

    Args:
        model: As in `prune`.
        example: As there.
        data: As there; training images.
        validation: Images by which the best epoch is chosen; by default a tenth of `data`.
        teacher: Network whose outputs are learned along with the targets, usually the baseline; `distillation` in
            `settings` has its weight and temperature.
        loss: As in `prune`.
        task: As there.
        seed: As there.
        progress: As there.
        settings: Settings of the stage `finetune`: `epochs` or `steps`, `learning_rate`, `batch_size` (by default that
            of the loader) and others.

    Raises:
        CompressError: As `prune`.
        NonFinite: A loss or weight becomes NaN or infinite.
    """
    values = dict(settings)
    if teacher is not None:
        values.setdefault("distillation", {})
    if isinstance(data, DataLoader) and data.batch_size is not None and "own" not in values:
        values.setdefault("batch_size", data.batch_size)
    config = read_settings(FinetuneConfig, {"stage": "finetune", **values}, "finetune")
    if config.weights == "rewound":
        raise ConfigValueError("finetune: weights must be inherited or random, rewinding needs a pipeline.")
    own = lineage = open_lineage(model, example)
    if teacher is not None:
        given = open_lineage(teacher, example_of(lineage))
        lineage = replace(lineage, baseline=given.model.module)
    with _context(lineage, data, validation, resolve_task(loss, task), seed, progress, None) as ctx:
        trained, _ = FinetuneStage(config).run(lineage.model, ctx)
    return publish(own, trained, model)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Example | None = None,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    simplify: bool = True,
    external_data: bool = False,
    tolerance: float = PARITY,
    classes: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Write a network as an ONNX file that passes the checker and computes what the network does.

    Args:
        model: As in `prune`.
        path: File to write, ending in .onnx.
        example: As there.
        opset: Version of the default operator set.
        dynamic_batch: True keeps the batch axis open.
        simplify: True lets onnxslim rewrite the graph.
        external_data: True writes weights into a second file.
        tolerance: Largest difference from torch on random inputs, over the largest output.
        classes: Class names for the metadata.
        force: True overwrites an existing file.

    Returns:
        The path.

    Raises:
        ExportFailed: torch or ONNX refused, or the file differs from the network.
        ConfigValueError: The path cannot be written.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise ConfigValueError(f"export: path must end in .onnx, got '{target}'.")
    if target.exists() and not force:
        raise ConfigValueError(f"export: '{target}' exists already.", hint="force=True overwrites it.")
    require_output("path", target, "ONNX file")
    lineage = open_lineage(model, example)
    module, signature = lineage.model.module, lineage.model.signature
    settings = ExportSettings(opset, dynamic_batch, simplify, external_data, lineage.model.rewrites)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".export-") as folder:
        made = Path(folder) / target.name
        export_onnx(
            module, signature, made, settings, preprocessing=lineage.model.preprocessing, classes=tuple(classes)
        )
        samples = random_inputs(module, example_input(signature), _COMPARED if dynamic_batch else 1, _SEED)
        with eval_mode(module):
            error = file_error(made, module, signature, samples)
        if not error <= tolerance:
            raise ExportFailed(f"ONNX output differs from PyTorch by {error:.2g} of the largest (limit {tolerance:g}).")
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, target.parent / file.name)
    return target


def save(
    model: nn.Module, folder: str | os.PathLike[str], factory: str | Callable[..., nn.Module] | None = None
) -> Path:
    """Write a slim network as recipe and weights, data only; `compress.load` reads it.

    Args:
        model: Returned by a function of this package.
        folder: Folder to fill; it must be new or empty.
        factory: Builds the baseline without arguments: "pkg.module:callable", "path/to/file.py:callable", or an
            importable function. None leaves it to `load(folder, factory=...)`.

    Returns:
        The folder.

    Raises:
        ModelError: The network has no recipe.
        ArtifactError: The folder has files, or its structure was changed.
    """
    if lineage_of(model) is None:
        raise ModelError(
            "save needs a network that compress has returned: this one has no recipe.",
            hint="torch.save(model.state_dict(), ...) saves any other network.",
        )
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"'{target}' must be a new or empty folder.")
    lineage = open_lineage(model, None)
    spec = replace(lineage.model.factory, reference=_reference(factory))
    save_checkpoint(replace(lineage.model, factory=spec), target)
    return target


def load_bundle(path: Path) -> nn.Module:
    """Return the torch network of a bundle's ONNX file, in eval mode; its digests are checked first.

    Raises:
        ArtifactError: The bundle is damaged, or not one.
        ModelError: The file holds an operator that cannot be imported.
    """
    try:
        content = check.read_content(path)
        check.check_integrity(content)
    except check.Stop as stop:
        raise ArtifactError(f"Bundle '{path}': {stop.detail}.") from stop
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        for name in content.keys() - {check.MANIFEST, check.SIGNATURE}:
            (Path(folder) / name).write_bytes(content[name])
        return build_imported(Path(folder) / check.MODEL, None).eval()


def example_of(lineage: Lineage) -> Any:
    """Return an example of a network's inputs: one tensor, or tensors by name."""
    specs = lineage.model.signature.inputs
    dtypes = [getattr(torch, spec.dtype) for spec in specs]
    values = [
        torch.zeros([1, *map(int, spec.shape[1:])], dtype=dtype) for spec, dtype in zip(specs, dtypes, strict=True)
    ]
    if not lineage.model.factory.inputs:
        return values[0]
    return {spec.name: value for spec, value in zip(specs, values, strict=True)}


def _reference(factory: str | Callable[..., nn.Module] | None) -> str:
    if factory is None or isinstance(factory, str):
        return factory or FactorySpec.UNKNOWN
    name = getattr(factory, "__qualname__", "")
    if not name or "<" in name:
        raise ConfigValueError(
            "save: factory must be importable by name, got a lambda or a nested function.",
            hint='factory="path/to/file.py:build"',
        )
    return f"{factory.__module__}:{name}"


@contextmanager
def _context(
    lineage: Lineage,
    data: Any,
    validation: Any,
    task: Task | None,
    seed: int,
    progress: Listener,
    deploy: Mapping[str, Any] | None,
) -> Iterator[StageContext]:
    """Yield the context of one stage, with a folder of its own; random numbers of torch stay as they are."""
    names = [spec.name for spec in lineage.model.signature.inputs]
    splits = LoaderSplits(data, names, task, validation)
    teacher = LoadedTeacher(lineage.baseline)
    splits.teacher = teacher
    _check_data(splits, lineage.model)
    with tempfile.TemporaryDirectory(prefix="compress-") as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        work = Path(folder)
        target = _deploy(deploy, "deploy")
        tables, quantize = work / "latency", QuantizeConfig(stage="quantize")
        yield StageContext(work, seed, splits, listener(progress), target, tables, teacher, quantize)


def _check_data(splits: LoaderSplits, model: TorchModel) -> None:
    """Refuse samples of other shapes than the network takes, and targets that do not fit its outputs."""
    wanted = tuple(example_input(model.signature).shape[1:])
    for split in (splits.calibration, splits.validation):
        samples, targets = next(evaluation_batches(split.first(2), 2))
        if tuple(samples.shape[1:]) != wanted:
            raise DataError(f"data must give samples of shape {wanted}, as example, got {tuple(samples.shape[1:])}.")
        returned = run_network(model.module, samples)
        check_outputs(plain(returned, [output.name for output in model.signature.outputs]), targets, split.objective)
        check_labels(split, model.signature)


def _deploy(values: Mapping[str, Any] | None, function: str) -> DeployConfig:
    return read_settings(DeployConfig, values or {}, function)


def _ensure_baseline_file(lineage: Lineage, ctx: StageContext) -> None:
    """Export the baseline, whose latency and size budgets are relative to, at its first use."""
    path = lineage.model.baseline.onnx_path
    if not path.is_file():
        whole: TorchModel = replace(lineage.model, module=lineage.baseline, recipe=lineage.model.recipe.of_baseline)
        export_present(whole, path, ctx)
