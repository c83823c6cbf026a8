"""Cache keys of stages: everything that a stage's result depends on, and the part of it that changed.

A key is made of the stage's name and version, its settings, the digest of its input, the seed, the threads, the
versions of the libraries, and, where they matter, the contents of the images, the weights and the factory's file.

User code counts with its own file and every Python file that it imports, directly or not. Imports are read, not run:
the names in all `import` statements are looked up in a few folders. Names found in none of them belong to Python or to
an installed package. Code that imports by other means, or changes Python's search path, cannot be followed. Every
Python file of its folder then counts.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.catalog import NOTHING, RUNTIME_PACKAGES, STAGES, TORCH_MODEL, VERDICT, StageEntry
from compress.config.load import Pipeline
from compress.config.paths import PRETRAINED, UNTRAINED
from compress.config.schema.pipeline import QuantizeConfig
from compress.config.schema.task import DEFAULT_TASK, TaskConfig
from compress.config.schema.verify import DeployConfig
from compress.cost.conditions import deploy_conditions
from compress.errors import ArtifactError
from compress.storage.digest import digest_data, digest_evaluation, digest_file, digest_value

LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnxslim", "safetensors", "timm",
             "torch", "torchvision")  # fmt: skip
_FILES = {"rewind_to": "Checkpoint", "trained": "Weights"}  # setting of finetune -> its file
# settings without effect on results, or paths whose files count
FREE = ("save_minutes", "device", "compiled", "cached", *_FILES)
TORCH_PRUNING = "torch-pruning"


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a pipeline with everything its result depends on, except its input.

    Attributes:
        index: Position in the pipeline, from 0.
        entry: Declaration of the stage.
        config: Validated settings of the stage.
        values: The settings as plain values.
        fixed: Components of the key that are known before any stage has run.
    """

    index: int
    entry: StageEntry
    config: Any
    values: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)

    def components(self, input_digest: str) -> dict[str, Any]:
        """Return the components of the key: everything that the stage's result depends on."""
        return {**self.fixed, "input": input_digest}


def build_steps(pipeline: Pipeline) -> list[Step]:
    """Return the stages, with the components of their keys that do not depend on earlier stages."""
    config = pipeline.config
    resolved, folder = pipeline.resolved, pipeline.path.parent
    data = _data_component(resolved["data"], folder)
    task = _task_component(config.task, folder)
    libraries = {name: found for name in LIBRARIES if (found := package_version(name)) is not None}
    steps = []
    for index, (stage, values) in enumerate(zip(config.stages, resolved["stages"], strict=True)):
        entry = STAGES[stage.stage]
        counting = _what_counts(entry.name, values)
        if isinstance(values.get("criterion"), dict):
            counting["criterion"] = _criterion_component(values["criterion"], folder)
        fixed = {
            "stage": entry.name,
            "version": entry.version,
            "config": counting,
            "seed": config.seed,
            "threads": config.threads,
            "libraries": libraries | _torch_pruning_version(values) | _runtime_versions(values),
            "plugins": {name: _code_digest(name, folder) for name in config.plugins},
        }
        if entry.uses_data:
            fixed["data"] = data
            if task is not None:
                fixed["task"] = task
        if config.deploy is not None and needs_latency(stage):
            fixed["deploy"] = _deploy_component(config.deploy, config.int8)
        if config.deploy is not None and config.deploy.command is not None and entry.produces == VERDICT:
            fixed["deploy"] = asdict(deploy_conditions(config.deploy, config.int8))
        files = {
            key: _file_digest(Path(values[key]), what) for key, what in _FILES.items() if values.get(key) is not None
        }
        if files:
            fixed["files"] = files
        if entry.name == "finetune" and values["own"] is not None:
            counting["own"] = _reference_digest(values["own"], folder)
        if entry.produces == TORCH_MODEL and entry.consumes == NOTHING:
            fixed["files"] = _model_files(values, folder)
            if config.deploy is not None:
                fixed["precision"] = config.deploy.precision if config.int8 is None else "fp32"
            if config.deploy is not None and values["rewrites"] == "measured":  # measured where the model will run
                conditions = deploy_conditions(config.deploy, config.int8)
                fixed["deploy"] = {**asdict(conditions), "repeats": config.deploy.repeats}
        if values.get("quantization_aware") and config.quantize is not None:
            fixed["quantize"] = config.quantize.model_dump(mode="json", exclude={"stage", "images", "method", "format"})
        if entry.name == "quantize" and config.int8 is not None:
            fixed["precision"] = "int8"  # the baseline is quantised too
        if times_formats(stage):
            deploy = config.deploy or DeployConfig()
            fixed["deploy"] = {**asdict(deploy_conditions(deploy, config.int8)), "repeats": deploy.repeats}
        steps.append(Step(index, entry, stage, values, fixed))
    return steps


def _data_component(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the data section with the contents of its files in place of their paths."""
    sources = {part: data[part] for part in ("train", "validation", "evaluation") if isinstance(data[part], dict)}
    codes = {part: _reference_digest(one["own"], folder) for part, one in sources.items() if "own" in one}
    return {
        **data,
        **{part: digest_data(one) for part, one in sources.items()},
        **({"evaluation": digest_evaluation(data)} if isinstance(data["evaluation"], int) else {}),
        **({"code": codes} if codes else {}),
    }


def _task_component(task: TaskConfig, folder: Path) -> dict[str, Any] | None:
    """Return the task's component of a key; None for the default task, which older keys do not name."""
    if task == DEFAULT_TASK:
        return None
    values: dict[str, Any] = task.model_dump(mode="json", exclude_none=True)
    named = [key for key in ("own", "postprocess", "loss") if key in values]
    codes: dict[str, Any] = {key: _reference_digest(values[key], folder) for key in named}
    return values | codes


def _criterion_component(criterion: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of the user's importance, with the digest of its code instead of its path.

    Raises:
        ArtifactError: The file of the importance does not exist.
    """
    place = Path(criterion["torch_pruning"].rpartition(":")[0])
    if place.suffix == ".py" and not place.is_file():
        raise ArtifactError(f"Importance file '{place}' {_state(place)}.")
    return {**criterion, "torch_pruning": _reference_digest(criterion["torch_pruning"], folder)}


def _torch_pruning_version(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the version of torch-pruning if the stage's criterion is from that package, else an empty dict."""
    criterion = values.get("criterion")
    is_theirs = isinstance(criterion, dict) or (isinstance(criterion, str) and criterion.startswith("tp_"))
    return {TORCH_PRUNING: package_version(TORCH_PRUNING)} if is_theirs else {}


def _runtime_versions(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the versions of the packages of runtimes that the stage opens files in, besides ONNX Runtime's."""
    entries = [one if isinstance(one, Mapping) else {"runtime": one} for one in (values, *(values.get("also") or ()))]
    packages = {name for one in entries for name in RUNTIME_PACKAGES.get(str(one.get("runtime")), ())}
    return {name: package_version(name) for name in sorted(packages)}


def _reference_digest(reference: str, folder: Path) -> str:
    """Return the digest of the code behind a reference, and the name in it."""
    place, _, name = reference.rpartition(":")
    return f"{_code_digest(place, folder)}:{name}"


def needs_latency(stage: Any) -> bool:
    """Return whether the target in a stage's settings needs latencies."""
    return bool(getattr(getattr(stage, "target", None), "needs_latency", False))


def times_formats(stage: Any) -> bool:
    """Return whether a stage chooses the format of an INT8 file by its latency."""
    return isinstance(stage, QuantizeConfig) and stage.format == "auto"


def _deploy_component(deploy: DeployConfig, int8: QuantizeConfig | None) -> dict[str, Any]:
    """Return the component of latencies: the conditions on this machine, and the given latency table."""
    table = None
    if deploy.table is not None:
        if not Path(deploy.table).is_file():
            raise ArtifactError(f"Latency table '{deploy.table}' does not exist.")
        table = digest_file(Path(deploy.table))
    return {
        **asdict(deploy_conditions(deploy, int8)),
        "table": table,
        "accept_foreign_table": deploy.accept_foreign_table,
        "repeats": deploy.repeats,
        **({"variants": deploy.variants} if "variants" in deploy.model_dump() else {}),
    }


# settings added since a store was first written -> the default with which earlier results are the same
_ADDED = {"augmentation": {"resized_crop": 0.0, "policy": "none", "magnitude": 9, "erasing": 0.0}}
_ADDED_TO_STAGES: dict[str, dict[str, Any]] = {
    "finetune": {"own": None, "kwargs": {}, "trained": None, "quantization_aware": 0.0},
    "low_rank": {"repair": ["batch_norm"], "block_repair": None},
    "export": {"also": []},
    "quantize": {"format": "qdq"},
    "prune": {"only": [], "limits": {}, "block_repair": None, "merge": False},
    "slim": {"only": [], "limits": {}, "block_repair": None},
}


def _what_counts(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a stage's results depend on; files of weights count by content, not by path.

    The device and compilation of a training, the interval of its saved states, and whether outputs of the teacher are
    kept do not count.
    """
    added_here = _ADDED_TO_STAGES.get(stage, {})
    counting = {
        key: value
        for key, value in values.items()
        if key not in FREE and not (key in added_here and value == added_here[key])
    }
    for name in ("between", "training"):
        if isinstance(training := values.get(name), Mapping):
            counting[name] = _what_counts("finetune", training)
    if isinstance(distillation := counting.get("distillation"), Mapping):
        counting["distillation"] = {key: value for key, value in distillation.items() if key not in FREE}
    for name, defaults in _ADDED.items():
        if isinstance(section := counting.get(name), Mapping):
            added = {key for key, default in defaults.items() if section.get(key) == default}
            counting[name] = {key: value for key, value in section.items() if key not in added}
    if stage == "verify" and counting["robustness"] is not None:
        sources = counting["robustness"]["shifted"]
        digests = {name: digest_data(source) for name, source in sources.items()}
        counting["robustness"] = {**counting["robustness"], "shifted": digests}
    if stage != "load":
        return counting
    model = {key: value for key, value in values["model"].items() if key not in ("factory", "onnx")}
    return {**counting, "weights": None, "model": model}


def _model_files(values: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the digests of the weights and of the factory, or of the ONNX file that is both."""
    if "onnx" in values["model"]:
        return {"onnx": _onnx_digest(Path(values["model"]["onnx"]))}
    if values["weights"] in (PRETRAINED, UNTRAINED):  # library versions, the network's name and the seed identify them
        files = {"weights": values["weights"]}
    else:
        files = {"weights": _file_digest(Path(values["weights"]), "Weights file")}
    factory = values["model"].get("factory")
    if factory is not None:
        files["factory"] = _reference_digest(factory, folder)
    return files


def _file_digest(path: Path, what: str) -> str:
    if not path.is_file():
        raise ArtifactError(f"{what} '{path}' {_state(path)}.")
    return digest_file(path)


def _state(path: Path) -> str:
    """Return the reason why a path is no file."""
    return "is a folder, not a file" if path.is_dir() else "does not exist"


def _onnx_digest(path: Path) -> str:
    """Return the digest of an ONNX file, including the files beside it that hold its weights."""
    from compress.onnx_file.io import load_onnx, model_files, require_beside, require_external  # imports onnx

    files = model_files(path)
    if len(files) == 1:
        return digest_file(path)
    require_beside(load_onnx(path), path)
    require_external(load_onnx(path), path)
    return digest_value({file.relative_to(path.parent).as_posix(): digest_file(file) for file in files})


def _code_digest(place: str, folder: Path) -> str:
    """Return the digest of the user's Python files that a file or a module consists of, with those it imports.

    Imports are looked up beside the file, in the current folder, and in the pipeline's `folder`. A module itself is
    looked up in the last two and then in Python's search path.
    """
    here = [Path.cwd(), folder.absolute()]
    if place.endswith(".py"):
        whole, starts = Path(place).absolute().parent, [Path(place).absolute()]
        roots = [whole, *here]
    else:
        spec = PathFinder.find_spec(place.partition(".")[0], [str(Path.cwd()), str(folder), *sys.path])
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            return place
        origin = Path(spec.origin).absolute()
        is_package = origin.name == "__init__.py"
        whole = origin.parent
        roots = [whole.parent if is_package else whole, *here]
        if any(part in NO_CODE for part in origin.parts):  # an installed package is taken as it is
            starts, roots = list(python_files(whole)) if is_package else [origin], []
        else:
            starts = resolve(place.split("."), roots) or [origin]
    if not all(path.is_file() for path in starts):
        return place
    files = code_files(starts, roots, whole) if roots else starts
    return digest_value({_name_below(path, [whole, *roots]): digest_file(path) for path in files})


def _name_below(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return path.relative_to(root).as_posix() if root is not None else path.name


def explain(components: dict[str, Any], previous: list[dict[str, Any]], step: Step) -> tuple[str, ...]:
    """Return the reasons why a stage must run: the components of its key that differ from the pipeline's last run."""
    before = previous[step.index] if step.index < len(previous) else None
    if before is None or before["stage"] != step.entry.name:
        return ("runs for the first time",)
    changed = sorted(_differences(before["components"], components))
    if not changed:
        return ("its stored result is gone",)
    return tuple("its input changed" if name == "input" else f"{name} changed" for name in changed)


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return the dotted names of all values that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(set(before) | set(after))
        return [
            difference
            for name in names
            for difference in _differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
        ]
    return [] if before == after else [path.removeprefix("config.")]


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


NO_CODE = ("site-packages", "node_modules", "__pycache__")
_OURS = "compress"  # stage versions cover its changes
_BY_OTHER_MEANS = {"importlib", "runpy", "imp", "pkgutil", "site", "zipimport", "__import__", "exec", "eval"}


def code_files(starts: Sequence[Path], roots: Sequence[Path], whole: Path) -> list[Path]:
    """Return the files that some code consists of, including all that it imports, sorted.

    Args:
        starts: Files of the code itself.
        roots: Folders in which imported names are looked up, in this order.
        whole: Folder whose Python files all count if imports cannot be followed.
    """
    found: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        imported = _imported(path, roots)
        if imported is None:
            return sorted(found.union(waiting, python_files(whole)))
        waiting += imported
    return sorted(found)


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the .py files of a folder and its sub-folders, except hidden files, installed packages and runs' output.

    Broken links, such as the lock of an editor, are skipped.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            written_by_runs = (entry / ".store").is_dir() or (entry / "recipe.json").is_file()
            if not (entry.name in NO_CODE or written_by_runs):
                yield from python_files(entry)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


def _imported(path: Path, roots: Sequence[Path]) -> list[Path] | None:
    """Return the files that a file imports; None if its imports cannot be followed."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if any(map(_by_other_means, nodes)):
        return None
    files: list[Path] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            files += [file for alias in node.names for file in resolve(alias.name.split("."), roots)]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            places = [_ancestor(path, node.level)] if node.level else roots
            for alias in node.names:
                if alias.name == "*":  # may mean every module of a package
                    files += _all_of(base, places)
                files += resolve([*base, alias.name], places)
    return files


def _by_other_means(node: ast.AST) -> bool:
    """Return whether code imports by other means than `import` statements, or changes Python's search path."""
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] in _BY_OTHER_MEANS for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and (node.module or "").partition(".")[0] in {*_BY_OTHER_MEANS, "sys"}
    if isinstance(node, ast.Name):
        return node.id in _BY_OTHER_MEANS
    return isinstance(node, ast.Attribute) and node.attr == "path" and _is_name(node.value, "sys")


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _ancestor(path: Path, level: int) -> Path:
    """Return the folder that a relative import with `level` dots starts from."""
    return path.parents[min(level, len(path.parents)) - 1]


def resolve(parts: Sequence[str], roots: Sequence[Path]) -> list[Path]:
    """Return the files that the import of a dotted name runs: of its packages and of itself; [] if not found."""
    if parts[0] == _OURS:
        return []
    for root in roots:
        files: list[Path] = []
        folder = root
        for part in parts:
            package, module = folder / part / "__init__.py", folder / f"{part}.py"
            if package.is_file():
                files.append(package)
            elif module.is_file():
                files.append(module)
                break
            elif not (folder / part).is_dir():
                break  # the rest names something inside of a module
            folder = folder / part
        if files:
            return files
    return []


def _all_of(base: Sequence[str], roots: Sequence[Path]) -> list[Path]:
    for root in roots:
        folder = root.joinpath(*base)
        if base and folder.is_dir():
            return list(python_files(folder))
    return []
