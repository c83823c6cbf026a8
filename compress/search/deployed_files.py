"""Files in the precision that is deployed: as exported, or as INT8 copies for the measurement of milliseconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx import ModelProto

from compress.config.schema.pipeline import QuantizeConfig
from compress.cost.conditions import TableConditions, deploy_conditions
from compress.cost.variants import VariantWriter
from compress.errors import ConfigValueError
from compress.exporting.torch_onnx import move_into_place
from compress.onnx_file.io import ONE_FILE_LIMIT_BYTES, load_onnx, save_onnx
from compress.quantization.onnx_int8 import Quantization, matching_nodes
from compress.quantization.timing_copies import TimingCopies, timing_copy
from compress.search.context import StageContext

Copy = Callable[[ModelProto], ModelProto]


def quantization_of(config: QuantizeConfig) -> Quantization:
    """Return the settings of the quantisation, from the `quantize` section; with the format auto, of a QDQ graph."""
    return Quantization(
        images=config.images,
        method=config.method,
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        activation_type=config.activation_type,
        weight_type=config.weight_type,
        exclude=config.exclude,
        format="qoperator" if config.format == "qoperator" else "qdq",
    )


def conditions_here(ctx: StageContext) -> TableConditions:
    """Return the conditions of latencies on this machine.

    Raises:
        ConfigValueError: The pipeline has no deployment.
    """
    if ctx.deploy is None:
        raise ConfigValueError("A budget in milliseconds needs a deploy section, the pipeline has none.")
    return deploy_conditions(ctx.deploy, ctx.int8)


def timed_file(path: Path, ctx: StageContext) -> Path:
    """Return the file that is timed in place of a float file: itself, or an INT8 copy in the stage's folder.

    Raises:
        ExportFailed: ONNX Runtime cannot quantise the file.
    """
    if ctx.int8 is None:
        return path
    copy = ctx.folder / f"{path.stem}.int8.onnx"
    if not copy.is_file():
        with TemporaryDirectory(dir=ctx.folder) as folder:
            model = timing_copy(load_onnx(path, weights=True), ctx.data.calibration, quantization_of(ctx.int8))
            _save(model, Path(folder) / copy.name)
            move_into_place(Path(folder) / copy.name, copy)
    return copy


@contextmanager
def timed_files(paths: list[Path], ctx: StageContext) -> Iterator[list[Path]]:
    """Yield the files that are timed in place of float files, in a temporary folder if they are INT8 copies."""
    if ctx.int8 is None:
        yield paths
        return
    with TemporaryDirectory(dir=ctx.folder) as folder:
        copies = []
        for number, path in enumerate(paths):
            model = timing_copy(load_onnx(path, weights=True), ctx.data.calibration, quantization_of(ctx.int8))
            copies.append(Path(folder) / f"{number}.onnx")
            _save(model, copies[-1])
        yield copies


def variant_copies(source: ModelProto, writer: VariantWriter, ctx: StageContext) -> Copy:
    """Return the function that turns a float variant into the model that is timed.

    Args:
        source: Model that the writer writes variants of; patterns of `exclude` name its nodes and layers.
        writer: Writer of the variants, whose nodes have the order of the source.
        ctx: Context of the stage, with the settings of the quantisation.
    """
    if ctx.int8 is None:
        return lambda variant: variant
    whole, wanted = writer.write({}, {}), quantization_of(ctx.int8)
    apart = set(matching_nodes(source, wanted.exclude)) if wanted.exclude else set()
    pairs = zip(source.graph.node, whole.graph.node, strict=True)
    excluded = [renamed.name for node, renamed in pairs if node.name in apart]
    return TimingCopies(whole, ctx.data.calibration, wanted, excluded).copy


def _save(model: ModelProto, path: Path) -> None:
    save_onnx(model, path, model.ByteSize() > ONE_FILE_LIMIT_BYTES)
