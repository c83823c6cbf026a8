"""Artifacts on disk: how each kind is written and read back.

    TorchModel   recipe.json  weights.safetensors  meta.json  baseline.json  baseline.onnx  baseline.safetensors
                 [structure.onnx]   if the network came as an ONNX file: that file without its weights
    slim/        recipe.json  weights.safetensors  meta.json  [factory.py]  [structure.onnx]  digests.json of all these
    OnnxModel    model.onnx [model.onnx.data]  [float.onnx [float.onnx.data]]  onnx.json  reference/ (a TorchModel)
                 [formats/]   further formats of model.onnx
    Verdict      verdict.json

Data only: nothing in these files is ever executed. The network's code comes from the factory.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.catalog import ONNX_MODEL, TORCH_MODEL, VERDICT
from compress.data.preprocessing import Preprocessing
from compress.errors import ArtifactError, InternalError
from compress.formats import FOLDER
from compress.model.artifacts import (
    Baseline,
    CheckResult,
    FactorySpec,
    ModelMetrics,
    OnnxModel,
    Signature,
    TorchModel,
    Verdict,
)
from compress.model.recipe import Recipe
from compress.storage.digest import add_digest, digest_file, read_record
from compress.tasks.base import Metric
from compress.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:
    from torch import nn

META_SCHEMA = 1
STRUCTURE_FILE = "structure.onnx"
DIGESTS_FILE, DIGESTS_SCHEMA = "digests.json", 1
VOLATILE = ("baseline.json",)  # measured times differ from run to run and are no part of a model


def save_artifact(artifact: TorchModel | OnnxModel | Verdict, folder: Path) -> None:
    """Write an artifact into an existing folder."""
    if isinstance(artifact, TorchModel):
        save_torch_model(artifact, folder)
    elif isinstance(artifact, OnnxModel):
        _save_onnx_model(artifact, folder)
    elif isinstance(artifact, Verdict):
        _write_json(folder / "verdict.json", asdict(artifact))
    else:
        raise InternalError(f"No layout on disk for {type(artifact).__name__}.")


def load_artifact(kind: str, folder: Path, factory: FactorySpec | None = None) -> TorchModel | OnnxModel | Verdict:
    """Read an artifact of a known kind from its folder.

    Args:
        kind: Kind of artifact, as in `catalog.py`.
        folder: Folder of the artifact.
        factory: Present factory of the baseline; by default the saved one.

    Raises:
        ArtifactError: A file is missing or malformed.
    """
    if kind == TORCH_MODEL:
        return load_torch_model(folder, factory)
    if kind == ONNX_MODEL:
        return _load_onnx_model(folder, factory)
    if kind == VERDICT:
        return _load_verdict(folder)
    raise InternalError(f"No artifact is of kind '{kind}'.")


def save_torch_model(model: TorchModel, folder: Path) -> None:
    """Write a `TorchModel`; the baseline's files are hard links if the file system allows them."""
    from compress.checkpoint.rebuild import write_weights  # imports torch

    (folder / "recipe.json").write_text(model.recipe.to_json(), encoding="utf-8")
    factory = model.factory
    if factory.kind == "onnx":
        from compress.onnx_file.structure import write_structure

        write_structure(Path(factory.reference), folder / STRUCTURE_FILE)
        factory = replace(factory, reference=STRUCTURE_FILE)
    _write_json(folder / "meta.json", _meta_of(model, factory))
    write_weights(model.module, folder / "weights.safetensors")
    _write_json(folder / "baseline.json", model.baseline.metrics.to_dict())
    _link(model.baseline.onnx_path, folder / "baseline.onnx")
    _link(model.baseline.weights_path, folder / "baseline.safetensors")


def load_torch_model(folder: Path, factory: FactorySpec | None = None) -> TorchModel:
    """Rebuild a `TorchModel` from its folder, with the given factory instead of the saved one."""
    from compress.checkpoint.rebuild import rebuild  # imports torch

    meta, recipe, saved_factory = _read_checkpoint(folder)
    factory = saved_factory if saved_factory.kind == "onnx" else _with_inputs(factory or saved_factory, saved_factory)
    signature = Signature.from_dict(meta["signature"])
    with _well_formed(folder / "baseline.json"):
        metrics = ModelMetrics(**_read_json(folder / "baseline.json"))
    with _well_formed(folder / "meta.json"):
        preprocessing, classes = Preprocessing.from_dict(meta["preprocessing"]), tuple(meta["classes"])
        rewrites, precision = tuple(meta.get("rewrites", ())), str(meta.get("precision", "fp32"))
    return TorchModel(
        module=rebuild(factory, recipe, signature, folder / "weights.safetensors"),
        factory=factory,
        recipe=recipe,
        signature=signature,
        preprocessing=preprocessing,
        classes=classes,
        baseline=Baseline(metrics, folder / "baseline.onnx", folder / "baseline.safetensors"),
        rewrites=rewrites,
        precision=precision,
    )


def write_slim(source: Path, target: Path, factory: FactorySpec) -> None:
    """Write the portable checkpoint of a stored `TorchModel`: recipe, weights, meta, and the factory's file if any.

    Args:
        source: Folder of the `TorchModel`.
        target: Folder to fill; created when it is missing.
        factory: Present factory of the baseline.
    """
    target.mkdir(parents=True, exist_ok=True)
    if factory.kind == "onnx":
        factory = replace(factory, reference=STRUCTURE_FILE)
        shutil.copyfile(source / STRUCTURE_FILE, target / STRUCTURE_FILE)
    saved = _read_json(source / "meta.json")
    meta = {**saved, "factory": asdict(_with_inputs(factory, FactorySpec.from_dict(saved["factory"])))}
    place, _, name = factory.reference.rpartition(":")
    if factory.kind == "factory" and place.endswith(".py"):
        shutil.copyfile(place, target / "factory.py")
        meta["factory"]["reference"] = f"factory.py:{name}"
    _write_json(target / "meta.json", meta)
    for file in ("recipe.json", "weights.safetensors"):
        shutil.copyfile(source / file, target / file)
    write_digests(target)


def save_checkpoint(model: TorchModel, folder: Path) -> None:
    """Write the portable checkpoint of a network in memory: recipe, weights and meta.

    Args:
        model: The network; its factory is written unchanged, and a file it names is not copied.
        folder: Folder to fill; created if it is missing.
    """
    from compress.checkpoint.rebuild import write_weights  # imports torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(model.recipe.to_json(), encoding="utf-8")
    _write_json(folder / "meta.json", _meta_of(model, model.factory))
    write_weights(model.module, folder / "weights.safetensors")
    write_digests(folder)


def _meta_of(model: TorchModel, factory: FactorySpec) -> dict[str, Any]:
    return {
        "schema": META_SCHEMA,
        "factory": asdict(factory),
        "signature": model.signature.to_dict(),
        "preprocessing": model.preprocessing.to_dict(),
        "classes": list(model.classes),
        "rewrites": list(model.rewrites),
        "precision": model.precision,
    }


def write_digests(folder: Path) -> None:
    """Write the digests of the present files of a slim checkpoint."""
    digests = {file.name: digest_file(file) for file in sorted(folder.iterdir()) if file.name != DIGESTS_FILE}
    _write_json(folder / DIGESTS_FILE, add_digest({"schema": DIGESTS_SCHEMA, "files": digests}))


def load_slim(
    folder: Path, factory: "str | Callable[..., nn.Module] | None" = None, own_class: bool = False
) -> "nn.Module":
    """Rebuild the slim network of a run: factory + recipe + weights, strict, in eval mode.

    Args:
        folder: A run folder, or the `slim` folder in it.
        factory: Factory of the baseline; by default the one that the checkpoint names. A callable gets the keyword
            arguments of the checkpoint.
        own_class: True returns an instance of the factory's own class, if that runs in training mode.

    Raises:
        ArtifactError: The folder holds no checkpoint, or a file in it is damaged.
        RebuildMismatch: The checkpoint does not fit the factory.
    """
    from compress.checkpoint.rebuild import rebuild
    from compress.model.adapter import as_users_own, example_input, with_own_forward  # imports torch

    folder = folder / "slim" if (folder / "slim").is_dir() else folder
    _check_digests(folder, unread=() if factory is None else ("factory.py",))
    meta, recipe, spec = _read_checkpoint(folder)
    signature, weights = Signature.from_dict(meta["signature"]), folder / "weights.safetensors"
    if callable(factory):
        name = getattr(factory, "__qualname__", type(factory).__name__)
        module = rebuild(replace(spec, reference=name), recipe, signature, weights, make=factory)
        return as_users_own(module, example_input(signature)) if own_class else with_own_forward(module)
    if factory is not None:
        spec = replace(spec, kind="factory", reference=factory)
    elif spec.kind == "factory" and spec.reference == FactorySpec.UNKNOWN:
        raise ArtifactError(
            f"'{folder}' names no factory: the network was saved as an object.",
            hint="compress.load(folder, factory=build), where build() returns the baseline network",
        )
    elif spec.reference.startswith("factory.py:"):
        spec = replace(spec, reference=f"{folder / spec.reference}")
    module = rebuild(spec, recipe, signature, weights)
    return as_users_own(module, example_input(signature)) if own_class else with_own_forward(module)


def _check_digests(folder: Path, unread: Container[str]) -> None:
    """Compare the files of a slim checkpoint with the digests beside them; older versions wrote none.

    Args:
        folder: Folder of the checkpoint.
        unread: Names of files to leave out.

    Raises:
        ArtifactError: A file is missing, damaged or edited.
    """
    path, hint = folder / DIGESTS_FILE, "Give the command of the run again; it lays out the checkpoint anew."
    if not path.exists():
        if (folder / "meta.json").is_file():
            warnings.warn(f"'{folder}' has no {DIGESTS_FILE}: damage of its files is not noticed.", stacklevel=4)
        return
    try:
        files = read_record(path)["files"]
        changed = [
            name for name, digest in files.items() if name not in unread and digest_file(folder / name) != digest
        ]
    except ArtifactError as error:
        raise ArtifactError(error.message, hint=hint) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"'{path}' lacks a value, or holds one of another kind: {error!r}", hint=hint) from error
    if changed:
        if changed == ["factory.py"]:
            hint = f"{hint} To use the changed code: compress.load(..., factory='{folder / 'factory.py'}:NAME')."
        names = ", ".join(f"'{folder / name}'" for name in changed)
        raise ArtifactError(f"{names} must be as the run wrote it, it was damaged or edited.", hint=hint)


def _with_inputs(factory: FactorySpec, saved: FactorySpec) -> FactorySpec:
    """Return a factory; if the pipeline declares no inputs, with the inputs that `load` found in the data."""
    return factory if factory.inputs else replace(factory, inputs=saved.inputs)


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], Recipe, FactorySpec]:
    meta = _read_json(folder / "meta.json")
    if meta.get("schema") != META_SCHEMA:
        raise ArtifactError(f"'{folder / 'meta.json'}' must have schema {META_SCHEMA}, got {meta.get('schema')}.")
    recipe = Recipe.from_json(_read_text(folder / "recipe.json"))
    with _well_formed(folder / "meta.json"):
        Signature.from_dict(meta["signature"])
        spec = FactorySpec.from_dict(meta["factory"])
        if spec.kind == "onnx":  # the saved path does not matter: nothing outside of the folder is needed
            spec = replace(spec, reference=str(folder / STRUCTURE_FILE))
    return meta, recipe, spec


def _save_onnx_model(model: OnnxModel, folder: Path) -> None:
    others = {"float_file": model.float_path, "int8_baseline_file": model.int8_baseline_path}
    present = {key: path for key, path in others.items() if path is not None}
    for path in (model.path, *present.values()):
        for file in path.parent.glob(f"{path.name}*"):
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)
    if (model.path.parent / FOLDER).is_dir() and model.path.parent.resolve() != folder.resolve():
        shutil.copytree(model.path.parent / FOLDER, folder / FOLDER, dirs_exist_ok=True)
    values = {"file": model.path.name, "opset": model.opset, "signature": model.signature.to_dict()}
    values |= {key: path.name for key, path in present.items()}
    _write_json(folder / "onnx.json", values)
    (folder / "reference").mkdir(exist_ok=True)
    save_torch_model(model.reference, folder / "reference")


def _load_onnx_model(folder: Path, factory: FactorySpec | None) -> OnnxModel:
    values = _read_json(folder / "onnx.json")
    return OnnxModel(
        path=folder / values["file"],
        opset=values["opset"],
        signature=Signature.from_dict(values["signature"]),
        reference=load_torch_model(folder / "reference", factory),
        float_path=folder / values["float_file"] if "float_file" in values else None,
        int8_baseline_path=folder / values["int8_baseline_file"] if "int8_baseline_file" in values else None,
    )


def _load_verdict(folder: Path) -> Verdict:
    values = _read_json(folder / "verdict.json")
    metric = values.get("metric") or (values["details"].get("quality") or {}).get(
        "metric"
    )  # an early file has no other
    return Verdict(
        checks=tuple(CheckResult(**check) for check in values["checks"]),
        required=tuple(values["required"]),
        slim=ModelMetrics(**values["slim"]) if values["slim"] else None,
        baseline=ModelMetrics(**values["baseline"]) if values["baseline"] else None,
        details=values["details"],
        metric=Metric(**metric) if metric else CLASSIFICATION.main,
    )


def _link(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # other device, or a file system without links
        shutil.copyfile(source, target)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' must be readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"'{path}' must hold a JSON object.")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' must be a readable text file: {error}") from error


@contextmanager
def _well_formed(path: Path) -> Iterator[None]:
    """Raise ArtifactError with the file's path if one of its values is missing or of another kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"'{path}' lacks a value, or holds one of another kind: {error!r}") from error
