"""Counting from ONNX graphs, and what an ONNX file says about itself."""

import nets
import numpy as np
import onnx
import pytest
from exported import CLASSES, PREPROCESSING, SIGNATURE, exported
from onnx import TensorProto, helper, numpy_helper

from compress.cost.macs import count_macs, count_params
from compress.errors import ArtifactError, ModelError
from compress.onnx_file.counting import count_onnx, layer_rows
from compress.onnx_file.io import file_bytes, load_onnx, model_files, read_metadata, read_signature, save_onnx


def weight(name, *shape, dtype=np.float32):
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def write(path, nodes, inputs, weights, outputs=("y",)):
    """Write a graph by hand; inputs are name -> shape."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", values, results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", nets.NAMES)
def test_macs_equal_those_of_the_torch_routine(name):
    assert count_onnx(exported(name)).macs == count_macs(nets.build(name), nets.EXAMPLE) > 0


@pytest.mark.parametrize("name", ["chain", "depthwise"])
def test_params_differ_from_torch_by_the_folded_batch_norm(name):
    module = nets.build(name)
    channels = sum(part.num_features for part in module.modules() if hasattr(part, "num_features"))
    # scale and bias of each channel become one bias of the convolution
    assert count_onnx(exported(name)).params == count_params(module) - channels


def test_layer_rows_name_shapes_weights_and_macs():
    rows = layer_rows(exported("linear_head"))
    conv, *_, last = rows
    assert (conv.name, conv.op, conv.input_shape, conv.output_shape) == (
        "features.0.0", "Conv", (1, 3, 16, 16), (1, 8, 8, 8),
    )  # fmt: skip
    assert (conv.weights, conv.macs) == (8 * 27 + 8, 64 * 8 * 27)
    assert (last.name, last.op, last.output_shape, last.macs) == ("fc2", "Gemm", (1, 4), 96)
    assert sum(row.macs for row in rows) == count_onnx(exported("linear_head")).macs


def test_transposed_convolution_counts_input_positions(tmp_path):
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", 3, 4, 4]}, [weight("w", 3, 5, 2, 2)])
    assert count_onnx(path).macs == 3 * 16 * 5 * 4


def test_gemm_with_transposed_input_counts_the_shared_axis(tmp_path):
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)]
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 1]}, [weight("w", 1, 6)])
    assert count_onnx(path).macs == 6
    nodes = [helper.make_node("Gemm", ["w", "x"], ["y"], transA=1)]
    path = write(tmp_path / "n.onnx", nodes, {"x": [7, 1]}, [weight("w", 7, 6)])
    assert count_onnx(path).macs == 6 * 7 // 7


def test_matmul_counts_with_a_weight_and_between_activations(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["h"]),
        helper.make_node("Transpose", ["h"], ["ht"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "ht"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", 5, 8]}, [weight("w", 6, 8)])
    assert [row.macs for row in layer_rows(path)] == [0, 5 * 6 * 8, 0, 5 * 5 * 6]
    assert count_onnx(path).layer_weights == 48


def test_fixed_batch_is_counted_for_one_image(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"x": [4, 3, 8, 8]}, [weight("w", 2, 3, 3, 3)])
    assert count_onnx(path).macs == 2 * 36 * 27


def test_params_leave_out_statistics_integers_and_scalars(tmp_path):
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], ["h"]),
        helper.make_node("Mul", ["h", "factor"], ["m"]),
        helper.make_node("Reshape", ["m", "shape"], ["y"]),
    ]
    weights = [weight(name, 3) for name in ("scale", "bias", "mean", "var")]
    weights += [weight("factor"), numpy_helper.from_array(np.array([-1, 3]), "shape")]
    counts = count_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["batch", 3, 4, 4]}, weights))
    assert (counts.params, counts.macs, counts.nodes) == (6, 0, 3)
    assert counts.initializer_bytes == 4 * 12 + 4 + 16


def test_rounded_weights_count_as_the_float_ones_and_their_scales_do_not(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["rounded", "scales", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w", "bias"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights = [weight("rounded", 4, 3, 3, 3, dtype=np.int8), weight("scales", 4), weight("zeros", 4, dtype=np.int8)]
    weights += [weight("bias", 4), weight("scale", 1), weight("zero", 1, dtype=np.int8)]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", 3, 8, 8]}, weights)
    counts = count_onnx(path)
    assert (counts.params, counts.macs, counts.layer_weights) == (108 + 4, 4 * 36 * 27, 108)
    assert [row.weights for row in layer_rows(path)] == [0, 112, 0, 0]
    assert counts.initializer_bytes == 108 + 4 * 4 + 4 + 4 * 4 + 4 + 1


@pytest.mark.parametrize(
    ("elements", "sizes", "wording"),
    [
        (None, None, "output 'x' of an ONNX model must be a tensor with a shape"),
        (TensorProto.STRING, [1, 3], "output 'x' of an ONNX model must be numbers of a known type, got 8"),
        (TensorProto.FLOAT, [1, -5], "Sizes of input or output 'x' .* got -5 at axis 1"),
    ],
)
def test_inputs_without_type_shape_or_sizes_are_named(elements, sizes, wording):
    value = helper.make_tensor_value_info("x", elements or TensorProto.FLOAT, sizes)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["x2"])], "graph", [value], [value])
    with pytest.raises(ArtifactError, match=wording):
        read_signature(helper.make_model(graph))


def test_unknown_shape_of_a_counted_node_is_an_error(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="first")]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", 3, "height", "width"]}, [weight("w", 2, 3, 3, 3)])
    with pytest.raises(ModelError, match=r"shape of 'y' must be known to count the MACs of Conv node 'first'"):
        count_onnx(path)


def test_file_bytes_include_external_data_and_miss_it_when_it_is_gone(tmp_path):
    path = tmp_path / "m.onnx"
    save_onnx(load_onnx(exported("chain")), path, external=True)
    data = tmp_path / "m.onnx.data"
    assert model_files(path) == (path, data)
    assert file_bytes(path) == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > 4 * 16 * 16 * 9
    assert count_onnx(path).macs == count_onnx(exported("chain")).macs
    data.unlink()
    with pytest.raises(ArtifactError, match=r"keeps weights in 'm\.onnx\.data', which must lie beside it"):
        file_bytes(path)


@pytest.mark.parametrize(
    ("content", "wording"),
    [(None, "does not exist"), (b"garbage " * 20, "must be a readable ONNX model"), (b"", "nodes and outputs")],
)
def test_missing_and_corrupt_files_are_artifact_errors(tmp_path, content, wording):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=wording):
        count_onnx(path)


def test_signature_and_metadata_come_back_from_the_file():
    model = load_onnx(exported("chain"))
    assert read_signature(model) == SIGNATURE
    metadata = read_metadata(model)
    assert (metadata.preprocessing, metadata.classes) == (PREPROCESSING, CLASSES)


def test_metadata_of_a_foreign_file_is_empty_and_damage_is_an_error(tmp_path):
    path = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, [])
    model = onnx.load(path)
    metadata = read_metadata(model)
    assert (metadata.preprocessing, metadata.classes) == (None, ())
    helper.set_model_props(model, {"compress.preprocessing": "{not json"})
    with pytest.raises(ArtifactError, match=r"metadata 'compress\.preprocessing'"):
        read_metadata(model)
