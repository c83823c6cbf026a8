"""quantize: OnnxModel -> OnnxModel with weights and activations of 8 bits."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.config.rules.stages import NO_INTEGER
from compress.config.schema.pipeline import QuantizeConfig
from compress.cost.conditions import has_vnni
from compress.errors import InternalError
from compress.exporting.torch_onnx import move_into_place
from compress.model.artifacts import OnnxModel
from compress.model.stage_records import QuantizeRecord
from compress.onnx_file.io import external_files, load_onnx, save_onnx
from compress.quantization.onnx_int8 import Calibrated, Format, Quantization, QuantizeReport, matching_nodes
from compress.search.context import StageContext
from compress.search.deployed_files import quantization_of
from compress.search.export import conditions_of
from compress.verification.measurement import time_files

CPU = "CPUExecutionProvider"
FEW_AGREE = 0.9
_LOST_AGREEMENT = 0.01


class QuantizeStage:
    """Stage that rounds the exported network to INT8, with ranges from calibration images; it keeps the float file."""

    def __init__(self, config: QuantizeConfig) -> None:
        self.config = config

    def run(self, artifact: OnnxModel, ctx: StageContext) -> tuple[OnnxModel, QuantizeRecord]:
        """Write the quantised file as `model.onnx`, and its float source as `float.onnx`, into the stage's folder.

        With `deploy.precision: int8`, the baseline is quantised too, as `int8_baseline.onnx`.

        Raises:
            ExportFailed: The file cannot be quantised, or the written file is not as it must be.
            DataError: There are fewer calibration images than requested.
            NonFinite: The network returns NaN or infinity on calibration images.
            StageError: A pattern of `exclude` matches nothing, or everything.
        """
        wanted = quantization_of(self.config)
        for warning in self._warnings(ctx):
            ctx.progress.warn(warning)
        whole = _keep(artifact.path, ctx.folder / "float.onnx")
        path = ctx.folder / "model.onnx"
        report, chosen, ratio = self._write(whole, path, wanted, ctx)
        if report.agreement < FEW_AGREE:
            ctx.progress.warn(
                f"The quantised file gives only {report.agreement:.1%} of the calibration images the class that the "
                "float file gives them; try another method, per_channel, or exclude layers."
            )
        ctx.progress.note(
            f"{report.layers} layers in INT8, {len(report.float_layers)} in float, "
            f"{report.size_bytes_before:,} to {report.size_bytes_after:,} bytes"
        )
        alone = self._quantize_baseline(artifact, wanted, ctx)
        result = replace(artifact, path=path, float_path=whole, int8_baseline_path=alone)
        settings = asdict(wanted) | {"format": chosen, "format_ratio": ratio}
        return result, QuantizeRecord(**settings, **asdict(report))

    def _write(
        self, source: Path, target: Path, wanted: Quantization, ctx: StageContext
    ) -> tuple[QuantizeReport, Format, float | None]:
        """Write the file in the format of the settings; return the report, the format and, for auto, the latency ratio.

        For auto, both formats are timed side by side. QOperator is kept if it is faster beyond the error of the
        measurement, and agrees with the float file as often, up to one image in a hundred.
        """
        calibrated = Calibrated(source, ctx.data.calibration, wanted, target.parent, ctx.progress)
        report = calibrated.write(target, wanted.format)
        if self.config.format != "auto":
            return report, wanted.format, None
        with TemporaryDirectory(dir=target.parent) as folder:
            other = Path(folder) / target.name
            tried = calibrated.write(other, "qoperator")
            files, conditions = {"qoperator": other, "qdq": target}, conditions_of(ctx.deploy)
            ratio = time_files(files, ctx.data.calibration, conditions, ctx.progress).ratio
            if ratio is None:
                raise InternalError("Two files were timed and not compared.")
            agrees = tried.agreement >= report.agreement - _LOST_AGREEMENT
            is_kept = ratio.high < 1 and agrees
            ctx.progress.note(
                f"latency of QOperator / QDQ: {ratio}; {'QOperator' if is_kept else 'QDQ'} is kept"
                + ("" if agrees else f", since QOperator agrees with the float file on only {tried.agreement:.1%}")
            )
            if not is_kept:
                return report, "qdq", ratio.value
            move_into_place(other, target)
        return tried, "qoperator", ratio.value

    def _quantize_baseline(self, artifact: OnnxModel, wanted: Quantization, ctx: StageContext) -> Path | None:
        """Return the baseline's INT8 file; None where latencies are not compared with it."""
        if ctx.int8 is None:
            return None
        source, path = artifact.reference.baseline.onnx_path, ctx.folder / "int8_baseline.onnx"
        present = [one for one in wanted.exclude if matching_nodes(load_onnx(source), [one])]
        settings = replace(wanted, exclude=tuple(present))  # factorised layers are in the slim network only
        report, *_ = self._write(source, path, settings, ctx)
        ctx.progress.note(
            f"baseline in INT8 alone: {report.agreement:.1%} of the calibration images get the class of the float file"
        )
        return path

    def _warnings(self, ctx: StageContext) -> list[str]:
        provider = CPU if ctx.deploy is None else ctx.deploy.provider
        warnings = []
        if provider in NO_INTEGER:
            warnings.append(
                f"{provider} computes quantised networks in float: the file gets smaller, not faster. "
                "TensorrtExecutionProvider and CPUExecutionProvider have INT8 kernels."
            )
        saturates = self.config.activation_type == "uint8" and not self.config.reduce_range
        if provider == CPU and saturates and has_vnni() is False:
            warnings.append("Sums may saturate in INT8 on a processor without VNNI: set reduce_range: true.")
        return warnings


def _keep(source: Path, target: Path) -> Path:
    """Copy a model file under another name, with its external weights."""
    model = load_onnx(source)
    if external_files(model, source):
        save_onnx(load_onnx(source, weights=True), target, external=True)
    else:
        shutil.copyfile(source, target)
    return target
