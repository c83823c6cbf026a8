"""export: TorchModel -> OnnxModel."""

from dataclasses import asdict

from compress.artifacts import OnnxModel, TorchModel
from compress.config.schema import ExportConfig
from compress.exporting.torch_onnx import export_onnx, exported_signature
from compress.stages.context import Record, StageContext


class ExportStage:
    """Write the network as an ONNX file that passes ONNX's checker and has the opset asked for."""

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    def run(self, artifact: TorchModel, ctx: StageContext) -> tuple[OnnxModel, Record]:
        """Write `model.onnx` into the stage's folder.

        Raises:
            ExportFailed: torch or ONNX refused, or the file is not what was asked for.
        """
        config = self.config
        path = ctx.folder / "model.onnx"
        with ctx.progress.task("export to ONNX", 1) as task:
            report = export_onnx(
                artifact.module,
                artifact.signature,
                path,
                opset=config.opset,
                dynamic_batch=config.dynamic_batch,
                simplify=config.simplify,
                external_data=config.external_data,
                preprocessing=artifact.preprocessing,
                classes=artifact.classes,
                rewrites=artifact.rewrites,
                precision=artifact.precision,
            )
            task.advance()
        if config.simplify and not report.simplified:
            ctx.progress.warn(f"The graph was not simplified: {report.simplify_note}.")
        if len(report.files) > 1:
            ctx.progress.note(
                f"The model is {len(report.files)} files, to be kept together: {', '.join(report.files)}."
            )
        signature = exported_signature(artifact.signature, config.dynamic_batch)
        record = {**asdict(report), "files": list(report.files)}
        return OnnxModel(path, report.opset, signature, artifact), record
