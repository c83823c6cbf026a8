"""INT8: what is written, that it is the same network, and everything that is refused."""

import logging
import sys
from dataclasses import replace

import nets
import numpy as np
import onnx
import onnxruntime.quantization
import pytest
from exported import CLASSES, PREPROCESSING, SIGNATURE, exported
from onnx import TensorProto, helper, numpy_helper

from compress.cost.conditions import has_vnni
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import DataError, ExportFailed, ModelError, NonFinite, StageError
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.onnx_file.counting import count_onnx, layer_rows
from compress.onnx_file.io import is_quantized, load_onnx, read_metadata, read_signature, save_onnx
from compress.quantization import calibration
from compress.quantization import onnx_int8 as quantize
from compress.quantization.onnx_int8 import Quantization, _layers, quantize_onnx
from compress.verification.checks import check_denormals, check_structure
from compress.verification.runtimes.onnx_reference import OnnxReference
from compress.verification.runtimes.onnxruntime import OnnxRuntime

SATURATES = has_vnni() is False  # 8-bit weights saturate sums there
WANTED = Quantization(images=24, reduce_range=SATURATES)
IMAGES = {"image": nets.images().numpy()}


def make_split(count=32, side=16):
    images = np.random.default_rng(3).integers(0, 256, (count, side, side, 3), np.uint8)
    return Split("calibration", ArraySource(images, np.arange(count) % 4, ()), np.arange(count), PREPROCESSING)


def changed(folder, change, name="chain"):
    model = load_onnx(exported(name), weights=True)
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def outputs(path, runtime=OnnxRuntime):
    with runtime(path) as session:
        return session.run(IMAGES)["logits"]


@pytest.fixture(scope="module", params=["qdq", "qoperator"])
def rounded(tmp_path_factory, request):
    """Every tiny network in INT8."""
    folder, wanted = tmp_path_factory.mktemp("rounded"), replace(WANTED, format=request.param)
    reports = {
        name: quantize_onnx(exported(name), folder / f"{name}.onnx", make_split(), wanted) for name in nets.NAMES
    }
    return {name: (folder / f"{name}.onnx", report) for name, report in reports.items()}


def test_agreement_is_the_share_of_images_with_the_same_class(tmp_path, monkeypatch):
    real, asked = calibration.Batches.classes, []

    def classes(batches, path, what):
        found = real(batches, path, what).copy()
        if asked:
            found[:5] += 1  # of the quantised file
        asked.append(what)
        return found

    monkeypatch.setattr(calibration.Batches, "classes", classes)
    whole = exported("chain")
    report = quantize_onnx(whole, tmp_path / "q.onnx", make_split(), WANTED)
    assert len(asked) == 2
    assert report.agreement == pytest.approx(19 / 24)


@pytest.mark.parametrize("name", nets.NAMES)
def test_a_quantised_file_is_the_same_network_rounded(rounded, name):
    path, report = rounded[name]
    whole, got = outputs(exported(name)), outputs(path)
    assert 0 < np.abs(whole - got).max() < 0.2 * np.abs(whole).max()
    assert report.float_layers == ()
    assert report.layers == sum(row.macs > 0 for row in layer_rows(exported(name)))
    assert report.agreement > 0.9
    assert (report.size_bytes_before, report.size_bytes_after) == (
        exported(name).stat().st_size,
        path.stat().st_size,
    )
    assert report.files == (path.name,)


@pytest.mark.parametrize("name", nets.NAMES)
def test_counts_are_those_of_the_float_file(rounded, name):
    counts, whole = count_onnx(rounded[name][0]), count_onnx(exported(name))
    for figure in ("macs", "params", "layer_weights"):
        assert getattr(counts, figure) == getattr(whole, figure) > 0
    assert counts.initializer_bytes < whole.initializer_bytes
    layers = {row.name: (row.macs, row.weights) for row in layer_rows(exported(name)) if row.macs}
    assert {row.name: (row.macs, row.weights) for row in layer_rows(rounded[name][0]) if row.macs} == layers


@pytest.mark.parametrize("name", nets.NAMES)
def test_file_keeps_signature_opset_and_what_it_says_of_itself(rounded, name):
    path, _ = rounded[name]
    model, whole = load_onnx(path), load_onnx(exported(name))
    assert read_signature(model) == SIGNATURE
    assert check_structure(model, path, SIGNATURE, 18).status == "pass"
    assert check_denormals(path).status == "pass"
    assert (read_metadata(model).preprocessing, read_metadata(model).classes) == (PREPROCESSING, CLASSES)
    assert {entry.key for entry in model.metadata_props} == {entry.key for entry in whole.metadata_props}
    assert (model.producer_name, model.producer_version) == (whole.producer_name, whole.producer_version)


def test_outputs_are_not_rounded_so_that_classes_do_not_tie(rounded):
    for path, _ in rounded.values():
        (last,) = (node for node in load_onnx(path).graph.node if "logits" in node.output)
        assert last.op_type in ("Gemm", "QGemm")
        assert len(last.input) <= 7, "QGemm without a scale of its outputs"


def test_the_evaluator_and_the_runtime_round_alike(rounded):
    for path, _ in rounded.values():
        if any(node.domain for node in load_onnx(path).graph.node):
            with pytest.raises(ModelError, match=r"from domain 'com\.microsoft' is unknown"):
                outputs(path, OnnxReference)
            continue
        assert np.abs(outputs(path) - outputs(path, OnnxReference)).max() < 1e-3


@pytest.mark.parametrize("tail", [(), ("Reshape",), ("Transpose", "Reshape")])
def test_a_convolution_before_the_outputs_stays_float_in_a_qoperator_graph(tmp_path, tail):
    """Masks or boxes with 256 values would tie; in a QDQ graph only their own rounding is left out."""

    def end_in_a_convolution(model):
        graph = model.graph
        weight = numpy_helper.from_array(
            np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32), "last.w"
        )
        del graph.node[:], graph.initializer[:], graph.output[:]
        graph.initializer.extend([weight, numpy_helper.from_array(np.array([0, -1]), "shape")])
        names = ["image", "first", *(f"after {kind}" for kind in tail)]
        first = numpy_helper.from_array(
            np.random.default_rng(1).normal(size=(3, 3, 3, 3)).astype(np.float32), "first.w"
        )
        graph.initializer.append(first)
        graph.node.append(helper.make_node("Conv", ["image", "first.w"], ["first"], "first"))
        last = "logits" if not tail else "last"
        graph.node.append(helper.make_node("Conv", ["first", "last.w"], [last], "last"))
        for place, kind in enumerate(tail, 1):
            got = "logits" if place == len(tail) else names[place + 1]
            given = [last, "shape"] if kind == "Reshape" else [last]
            moved = {"perm": [0, 2, 3, 1]} if kind == "Transpose" else {}
            graph.node.append(helper.make_node(kind, given, [got], kind, **moved))
            last = got
        shape = ["batch", 576] if tail else ["batch", 4, 12, 12]
        graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))

    path = changed(tmp_path, end_in_a_convolution)
    report = quantize_onnx(path, tmp_path / "q.onnx", make_split(), replace(WANTED, format="qoperator"))
    assert (report.layers, report.float_layers) == (1, ("last",))
    kinds = [node.op_type for node in load_onnx(tmp_path / "q.onnx").graph.node]
    assert kinds == ["QuantizeLinear", "QLinearConv", "DequantizeLinear", "Conv", *tail]
    assert len(np.unique(outputs(tmp_path / "q.onnx"))) > 256


def test_a_network_of_one_last_convolution_cannot_be_a_qoperator_graph(tmp_path):
    def only_convolution(model):
        graph = model.graph
        weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "only.w")
        del graph.node[:], graph.initializer[:], graph.output[:]
        graph.initializer.append(weight)
        graph.node.append(helper.make_node("Conv", ["image", "only.w"], ["logits"], "only"))
        graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4, 14, 14]))

    path = changed(tmp_path, only_convolution)
    with pytest.raises(ExportFailed, match="At least one layer must be quantised"):
        quantize_onnx(path, tmp_path / "q.onnx", make_split(), replace(WANTED, format="qoperator"))
    assert not (tmp_path / "q.onnx").exists()


def test_the_runtime_computes_in_integers(rounded):
    with OnnxRuntime(rounded["chain"][0]) as session:
        (nodes,) = session.placements(IMAGES).values()
    assert sum(node.startswith(("QLinearConv", "QGemm")) for node in nodes) == 4


@pytest.mark.parametrize(
    "settings",
    [{"method": "entropy"}, {"method": "percentile"}, {"per_channel": False}, {"reduce_range": not SATURATES},
     {"activation_type": "int8"}, {"weight_type": "uint8"}],
    ids=lambda settings: " ".join(map(str, settings.values())),
)  # fmt: skip
def test_every_setting_changes_the_file_and_gives_a_good_one(tmp_path, rounded, settings):
    report = quantize_onnx(exported("residual"), tmp_path / "q.onnx", make_split(), replace(WANTED, **settings))
    assert report.agreement > 0.9
    assert (tmp_path / "q.onnx").read_bytes() != rounded["residual"][0].read_bytes()
    types = {node.op_type: node for node in load_onnx(tmp_path / "q.onnx").graph.node}
    constants = {tensor.name: tensor for tensor in load_onnx(tmp_path / "q.onnx").graph.initializer}
    activation = constants[types["QuantizeLinear"].input[2]].data_type
    assert activation == (TensorProto.INT8 if "activation_type" in settings else TensorProto.UINT8)
    weight = next(tensor for name, tensor in constants.items() if name.endswith("head.weight_quantized"))
    assert weight.data_type == (TensorProto.UINT8 if "weight_type" in settings else TensorProto.INT8)
    if "activation_type" in settings:
        points = [tensor for name, tensor in constants.items() if name.endswith("_zero_point") and not tensor.dims]
        assert points
        assert all(int(numpy_helper.to_array(point)) == 0 for point in points)
    if "per_channel" in settings:
        assert all(not tensor.dims for name, tensor in constants.items() if name.endswith("weight_scale"))
    if settings.get("reduce_range"):
        assert np.abs(numpy_helper.to_array(weight).astype(int)).max() <= 64


def test_the_same_images_give_the_same_file(tmp_path, rounded):
    path = rounded["residual"][0]
    form = "qoperator" if any(node.domain for node in load_onnx(path).graph.node) else "qdq"
    quantize_onnx(exported("residual"), tmp_path / "again.onnx", make_split(), replace(WANTED, format=form))
    assert (tmp_path / "again.onnx").read_bytes() == rounded["residual"][0].read_bytes()


def test_ranges_do_not_depend_on_how_images_are_batched(tmp_path, rounded, monkeypatch):
    monkeypatch.setattr(calibration, "_IMAGES_AT_ONCE", 5)
    quantize_onnx(exported("chain"), tmp_path / "few.onnx", make_split(), WANTED)
    few, many = (outputs(path) for path in (tmp_path / "few.onnx", rounded["chain"][0]))
    assert np.abs(few - many).max() < 1e-4


@pytest.mark.parametrize("pattern", ["head", "node_linear", "he*d"])
def test_excluded_layers_stay_float(tmp_path, pattern):
    report = quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), replace(WANTED, exclude=(pattern,)))
    assert report.float_layers == ("head",)
    assert report.layers == 3
    weights = {tensor.name: tensor.data_type for tensor in load_onnx(tmp_path / "q.onnx").graph.initializer}
    assert weights["head.weight"] == TensorProto.FLOAT


def test_an_unknown_layer_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(StageError, match=r"pattern 'haed' must match a layer or node of the file, it matches none\. "
                       r"Layers are body\.0\.0, body\.1\.0, body\.2\.0, head\.") as caught:  # fmt: skip
        quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), replace(WANTED, exclude=("haed",)))
    assert caught.value.hint == "did you mean 'head'?"
    assert list(tmp_path.iterdir()) == []


def test_excluding_everything_is_refused(tmp_path):
    with pytest.raises(StageError, match="exclude must leave a layer to quantise, it matches all 4"):
        quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), replace(WANTED, exclude=("*",)))


def test_a_quantised_file_is_refused(tmp_path, rounded):
    with pytest.raises(ExportFailed, match="must be a float file to be quantised, it is quantised already"):
        quantize_onnx(rounded["chain"][0], tmp_path / "q.onnx", make_split(), WANTED)


def test_a_half_precision_file_is_refused(tmp_path):
    export_onnx(nets.build("chain"), SIGNATURE, tmp_path / "half.onnx", ExportSettings(opset=18, precision="fp16"))
    with pytest.raises(ExportFailed, match=r"must be in fp32 to be quantised, it is in fp16") as caught:
        quantize_onnx(tmp_path / "half.onnx", tmp_path / "q.onnx", make_split(), WANTED)
    assert caught.value.hint == "Set deploy.precision: fp32."


def old_opset(model):
    model.opset_import[0].version = 12


def without_names(model):
    model.graph.node[0].name = ""


def two_inputs(model):
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (old_opset, "must have opset 13 or later to be quantised, it has 12"),
        (without_names, "Every node of a file must have a name for it to be quantised, 1 have none"),
        (two_inputs, "must have one input, of images, to be quantised, it has image, mask"),
    ],
)
def test_files_that_cannot_be_quantised_are_refused(tmp_path, change, wording):
    path = changed(tmp_path, change)
    with pytest.raises(ExportFailed, match=wording):
        quantize_onnx(path, tmp_path / "q.onnx", make_split(), WANTED)
    assert not (tmp_path / "q.onnx").exists()


def test_too_few_calibration_images_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="must have the 24 calibration images that it asks for, the split has 23"
    ) as caught:
        quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(23), WANTED)
    assert caught.value.hint == "Set data.calibration: 24, or images: 23 in the quantize stage."


def test_images_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ExportFailed, match="float file must run on calibration images, ONNX Runtime says: ") as caught:
        quantize_onnx(exported("linear_head"), tmp_path / "q.onnx", make_split(side=8), WANTED)
    assert "data.preprocessing" in caught.value.hint


def test_nan_on_calibration_images_is_refused(tmp_path):
    def change(model):
        values = numpy_helper.to_array(model.graph.initializer[0]).copy()
        values.flat[0] = np.nan
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, model.graph.initializer[0].name))

    with pytest.raises(NonFinite, match="Outputs of the float file must be finite on calibration images, got NaN"):
        quantize_onnx(changed(tmp_path, change), tmp_path / "q.onnx", make_split(), WANTED)


def test_channels_of_zeros_can_be_quantised(tmp_path):
    def change(model):
        for tensor in model.graph.initializer[:2]:
            values = numpy_helper.to_array(tensor).copy()
            values[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    path = changed(tmp_path, change)
    quantize_onnx(path, tmp_path / "q.onnx", make_split(), WANTED)
    assert np.abs(outputs(path) - outputs(tmp_path / "q.onnx")).max() < 0.1
    assert check_denormals(tmp_path / "q.onnx").status == "pass"


def test_a_scale_that_is_not_finite_is_refused():
    model = load_onnx(exported("chain"), weights=True)
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.inf, np.float32), "scale"))
    model.graph.node.append(helper.make_node("QuantizeLinear", ["relu", "scale"], ["dead"], name="q"))
    with pytest.raises(NonFinite, match="Every scale must be finite and above 0, that of 'relu' is inf"):
        quantize._finish(model, load_onnx(exported("chain")))


def test_a_failure_of_the_quantiser_is_quiet_and_leaves_nothing(tmp_path, monkeypatch, capfd, caplog):
    def fail(*arguments, **settings):
        sys.stdout.write("some noise")
        logging.warning("and more of it")
        raise ValueError("no such thing")

    monkeypatch.setattr(onnxruntime.quantization, "QDQQuantizer", fail)
    with pytest.raises(ExportFailed, match=r"ONNX Runtime could not quantise the file: no such thing"):
        quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), WANTED)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == []


def test_quantising_is_quiet_and_progress_is_told(tmp_path, capfd, caplog):
    from compress.progress import SilentProgress

    told = {}

    class Listener(SilentProgress):
        def task(self, label, total):
            told[label] = [total, 0]
            inner = super().task(label, total)

            class Counting:
                def __enter__(self):
                    inner.__enter__()
                    return self

                def __exit__(self, *raised):
                    return inner.__exit__(*raised)

                def advance(self, count=1, **values):
                    told[label][1] += count

            return Counting()

    quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), WANTED, Listener())
    assert told == {
        "float file on calibration images": [24, 24],
        "ranges of activations": [24, 24],
        "quantised file on calibration images": [24, 24],
    }
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_a_graph_that_nothing_of_was_quantised_is_refused(tmp_path, monkeypatch):
    real = onnxruntime.quantization.QDQQuantizer
    nothing = {"nodes_to_quantize": ["node_mean"]}
    monkeypatch.setattr(
        onnxruntime.quantization, "QDQQuantizer", lambda model, **settings: real(model, **(settings | nothing))
    )
    with pytest.raises(ExportFailed, match="At least one layer must be quantised, ONNX Runtime left all of them"):
        quantize_onnx(exported("chain"), tmp_path / "q.onnx", make_split(), WANTED)


def test_a_fixed_batch_is_kept(tmp_path):
    module, path = nets.build("chain"), tmp_path / "fixed.onnx"
    export_onnx(module, SIGNATURE, path, ExportSettings(opset=18, dynamic_batch=False))
    quantize_onnx(path, tmp_path / "q.onnx", make_split(), WANTED)
    assert read_signature(load_onnx(tmp_path / "q.onnx")).inputs[0].shape == (1, 3, 16, 16)


def test_images_that_do_not_fill_a_fixed_batch_are_refused(tmp_path):
    def change(model):
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 7

    with pytest.raises(DataError, match="images must be a multiple of the file's fixed batch size 7, got 24"):
        quantize_onnx(changed(tmp_path, change), tmp_path / "q.onnx", make_split(), WANTED)


def test_weights_in_a_second_file_are_read(tmp_path):
    path = tmp_path / "external.onnx"
    save_onnx(load_onnx(exported("residual"), weights=True), path, external=True)
    report = quantize_onnx(path, tmp_path / "q.onnx", make_split(), WANTED)
    assert report.size_bytes_before > report.size_bytes_after
    assert is_quantized(load_onnx(tmp_path / "q.onnx"))
    assert np.abs(outputs(path) - outputs(tmp_path / "q.onnx")).max() < 0.1


def test_a_product_of_two_activations_is_no_layer():
    nodes = [
        helper.make_node("MatMul", ["x", "fc.weight"], ["h"], name="layer"),
        helper.make_node("Transpose", ["h"], ["t"], name="turned", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="product"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
              (("x", ["batch", 5, 8]), ("y", None))]  # fmt: skip
    weight = numpy_helper.from_array(np.ones((8, 6), np.float32), "fc.weight")
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert _layers(model) == {"layer": "fc"}
