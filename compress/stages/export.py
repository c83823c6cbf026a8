"""export: TorchModel -> OnnxModel."""

from dataclasses import replace

from compress.config.schema.pipeline import ExportConfig
from compress.errors import ConfigValueError
from compress.exporting.open_axes import check_open_axes
from compress.exporting.settings import ExportSettings, exported_signature
from compress.exporting.torch_onnx import export_onnx
from compress.formats.files import write_formats
from compress.model.artifacts import OnnxModel, TorchModel
from compress.model.stage_records import ExportRecord
from compress.onnx_file.io import load_onnx, read_signature
from compress.search.context import StageContext

_IMAGE_AXES = 4
_AXES = {"NCHW": {"height": 2, "width": 3}, "NHWC": {"height": 1, "width": 2}}


class ExportStage:
    """Stage that writes the network as an ONNX file of the requested opset, which passes ONNX's checker."""

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[OnnxModel, ExportRecord]:
        """Write `model.onnx` into the stage's folder, and the formats that it is converted into.

        Raises:
            ExportFailed: torch's exporter, ONNX or a converter fails, or the file is not as requested.
            ConfigValueError: `dynamic` names axes of an image, but the first input is no image.
        """
        config = self.config
        open_axes = {_AXES[artifact.preprocessing.layout][name]: name for name in config.dynamic}
        if open_axes and len(artifact.signature.inputs[0].shape) != _IMAGE_AXES:
            raise ConfigValueError(
                "dynamic must be [] where the first input is no image, it has shape "
                f"{artifact.signature.inputs[0].shape}."
            )
        path = ctx.folder / "model.onnx"
        with ctx.progress.task("export to ONNX", 1) as task:
            record = export_onnx(
                artifact.module,
                artifact.signature,
                path,
                ExportSettings(
                    opset=config.opset,
                    dynamic_batch=config.dynamic_batch,
                    simplify=config.simplify,
                    external_data=config.external_data,
                    rewrites=artifact.rewrites,
                    precision=artifact.precision,
                    open_axes=open_axes,
                ),
                preprocessing=artifact.preprocessing,
                classes=artifact.classes,
            )
            task.advance()
        if open_axes:
            check_open_axes(path, artifact.module, artifact.signature, open_axes)
        if config.simplify and not record.simplified:
            ctx.progress.warn(f"The graph was not simplified: {record.simplify_note}.")
        if len(record.files) > 1:
            ctx.progress.note(
                f"The model is {len(record.files)} files, to be kept together: {', '.join(record.files)}."
            )
        if config.also:
            with ctx.progress.task(f"convert for {', '.join(config.also)}", 1) as task:
                record = replace(record, formats=write_formats(path, config.also))
                task.advance()
        signature = exported_signature(artifact.signature, config.dynamic_batch)
        if open_axes:  # only the file states how output sizes follow from the image's size
            signature = read_signature(load_onnx(path))
        return OnnxModel(path, record.opset, signature, artifact), record
