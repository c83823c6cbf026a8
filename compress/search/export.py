"""Export within a stage: the present network as a file, its fidelity, and rewrites that speed it up."""

import tempfile
from pathlib import Path

from compress.config.schema.verify import DeployConfig
from compress.data.batches import evaluation_batches
from compress.errors import ConfigValueError, ExportFailed, InternalError
from compress.exporting.fidelity import file_error, first_difference
from compress.exporting.rewrite import REWRITES
from compress.exporting.settings import ExportSettings
from compress.exporting.simplify import find_difference
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TorchModel
from compress.model.modes import eval_mode
from compress.model.stage_records import Rewrite
from compress.onnx_file.io import ONE_FILE_LIMIT_BYTES, load_onnx, save_onnx
from compress.search.context import StageContext
from compress.search.deployed_files import timed_files
from compress.verification.device_command import device_of
from compress.verification.measurement import Conditions, measure_ratio

OPSET = 18
WORTH_IT = 1.02  # less is within the noise of one measurement
_OFF, _NOTICED, _OFF_IN_HALF = 0.01, 0.001, 0.1  # of the largest output
_COMPARED = 4  # images


def export_present(model: TorchModel, path: Path, ctx: StageContext) -> None:
    """Write the present network as an ONNX file with an open batch axis.

    Raises:
        ExportFailed: torch's exporter or ONNX fails, or the file is not as requested.
    """
    with ctx.progress.task("export to ONNX", 1) as task:
        export_onnx(
            model.module,
            model.signature,
            path,
            ExportSettings(opset=OPSET, rewrites=model.rewrites, precision=model.precision),
            preprocessing=model.preprocessing,
            classes=model.classes,
        )
        task.advance()


def check_export(model: TorchModel, path: Path, ctx: StageContext) -> str | None:
    """Compare a file with its network on calibration images; return a warning if they differ a little.

    Raises:
        ExportFailed: They differ by more than rounding; the message states where the difference begins, if known.
    """
    allowed, noticed = (_OFF, _NOTICED) if model.precision == "fp32" else (_OFF_IN_HALF, _OFF_IN_HALF)
    samples, _ = next(evaluation_batches(ctx.data.calibration.first(_COMPARED), _COMPARED, "nothing"))
    with eval_mode(model.module):
        error = file_error(path, model.module, model.signature, samples)
        if error <= noticed:
            return None
        where = first_difference(model.module, model.signature, samples[:1], noticed, OPSET)
    said = f"is off by {error:.2g} of the largest output on {len(samples)} images{f'; {where}' if where else ''}."
    if error <= allowed:
        return f"The baseline's ONNX file {said}"
    raise ExportFailed(
        f"The baseline's ONNX file must compute what the network does, it {said}",
        hint="torch's exporter has lost something of it: write that part in other operators, and try again.",
    )


def exported(model: TorchModel, folder: Path, ctx: StageContext) -> Path:
    """Return the path of the present network's ONNX file: the baseline's file, or a new export into a folder."""
    if model.recipe.is_baseline:
        return model.baseline.onnx_path
    path = folder / "present.onnx"
    export_present(model, path, ctx)
    return path


def conditions_of(deploy: DeployConfig | None) -> Conditions:
    """Return the conditions of the target runtime; default conditions if the pipeline names no runtime."""
    if deploy is None:
        return Conditions()
    return Conditions(
        deploy.runtime,
        deploy.provider,
        deploy.threads,
        deploy.batch_size,
        repeats=deploy.repeats,
        device=device_of(deploy),
    )


def try_rewrites(path: Path, signature: Signature, policy: str, ctx: StageContext) -> list[Rewrite]:
    """Apply each rewrite to a file and return those that fit, their speed-up, and whether they are kept.

    Args:
        path: The exported network; it is not changed.
        signature: Inputs and outputs of the network.
        policy: "measured" keeps a rewrite that runs faster than the given file, "always" and "never" do not measure.
        ctx: Context of the stage, with the target runtime and images.

    Returns:
        One record for each rewrite that fits somewhere: its name, the number of matches in the graph, the speed-up
        (None if not measured) and whether it is kept.
    """
    records = []
    conditions, split = conditions_of(ctx.deploy), ctx.data.calibration
    for name, rewrite in REWRITES.items():
        model = load_onnx(path, weights=True)
        places = rewrite(model) if policy != "never" else 0
        if not places:
            continue
        speedup = None
        with tempfile.TemporaryDirectory(dir=ctx.folder) as folder:
            rewritten = Path(folder) / path.name
            save_onnx(model, rewritten, model.ByteSize() > ONE_FILE_LIMIT_BYTES)
            if difference := find_difference(path, rewritten, signature):
                raise InternalError(f"Rewriting {name} changed the network: {difference}.")
            if policy == "measured":
                _require_here(ctx.deploy, name)
                with timed_files([rewritten, path], ctx) as (new, old):
                    speedup = 1 / measure_ratio(new, old, split, conditions, ctx.progress)
                ctx.progress.note(f"{name}: rewritten in {places} places, {speedup:.2f}x as fast on {conditions}")
        is_kept = speedup is None or speedup > WORTH_IT
        records.append(Rewrite(rewrite=name, places=places, speedup=speedup, is_kept=is_kept))
    return records


def _require_here(deploy: DeployConfig | None, name: str) -> None:
    """Raise ConfigValueError if the model is for another machine, so that nothing can be measured here."""
    if deploy is not None and deploy.accept_foreign_table:
        raise ConfigValueError(
            f"rewrites must be always or never with a table of another machine: '{name}' fits, and whether it is "
            "faster there cannot be measured here.",
            hint="Set what load chose on the machine that made the table: --set stages.load.rewrites=always",
        )
