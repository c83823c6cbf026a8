"""quantize: OnnxModel -> OnnxModel with weights and activations of 8 bits."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from compress.config.schema.pipeline import QuantizeConfig
from compress.cost.conditions import has_vnni
from compress.model.artifacts import OnnxModel
from compress.onnx_file.io import external_files, load_onnx, save_onnx
from compress.quantization.onnx_int8 import Quantization, QuantizeReport, quantize_onnx
from compress.search.context import Record, StageContext

NO_INTEGER_KERNELS = ("CUDAExecutionProvider",)  # computes in float between the roundings
CPU = "CPUExecutionProvider"
FEW_AGREE = 0.9


class QuantizeStage:
    """Stage that rounds the exported network to INT8, with ranges from calibration images; it keeps the float file."""

    def __init__(self, config: QuantizeConfig) -> None:
        self.config = config

    def run(self, artifact: OnnxModel, ctx: StageContext) -> tuple[OnnxModel, Record]:
        """Write the quantised file as `model.onnx`, and its float source as `float.onnx`, into the stage's folder.

        Raises:
            ExportFailed: The file cannot be quantised, or the written file is not as it must be.
            DataError: There are fewer calibration images than requested.
            NonFinite: The network returns NaN or infinity on calibration images.
            StageError: A pattern of `exclude` matches nothing, or everything.
        """
        wanted = settings_of(self.config)
        for warning in self._warnings(ctx):
            ctx.progress.warn(warning)
        whole = _keep(artifact.path, ctx.folder / "float.onnx")
        path = ctx.folder / "model.onnx"
        report = quantize_onnx(whole, path, ctx.data.calibration, wanted, ctx.progress)
        if report.agreement < FEW_AGREE:
            ctx.progress.warn(
                f"The quantised file gives only {report.agreement:.1%} of the calibration images the class that the "
                "float file gives them; try another method, per_channel, or exclude layers."
            )
        ctx.progress.note(
            f"{report.layers} layers in INT8, {len(report.float_layers)} in float, "
            f"{report.size_bytes_before:,} to {report.size_bytes_after:,} bytes"
        )
        return replace(artifact, path=path, float_path=whole), _record(wanted, report)

    def _warnings(self, ctx: StageContext) -> list[str]:
        provider = CPU if ctx.deploy is None else ctx.deploy.provider
        warnings = []
        if provider in NO_INTEGER_KERNELS:
            warnings.append(
                f"{provider} computes quantised networks in float: the file gets smaller, not faster. "
                "TensorrtExecutionProvider and CPUExecutionProvider have INT8 kernels."
            )
        saturates = self.config.activation_type == "uint8" and not self.config.reduce_range
        if provider == CPU and saturates and has_vnni() is False:
            warnings.append("Sums may saturate in INT8 on a processor without VNNI: set reduce_range: true.")
        return warnings


def settings_of(config: QuantizeConfig) -> Quantization:
    """Return the settings of the quantisation, from the `quantize` section."""
    return Quantization(
        images=config.images,
        method=config.method,
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        activation_type=config.activation_type,
        weight_type=config.weight_type,
        exclude=config.exclude,
    )


def _record(wanted: Quantization, report: QuantizeReport) -> Record:
    return {**asdict(wanted), **asdict(report), "exclude": list(wanted.exclude),
            "float_layers": list(report.float_layers), "files": list(report.files)}  # fmt: skip


def _keep(source: Path, target: Path) -> Path:
    """Copy a model file under another name, with its external weights."""
    model = load_onnx(source)
    if external_files(model, source):
        save_onnx(load_onnx(source, weights=True), target, external=True)
    else:
        shutil.copyfile(source, target)
    return target
