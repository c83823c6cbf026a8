"""Files become networks with layers called as in the file; what cannot be imported is named, all of it at once."""

import copy
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
import torch
from exported import PREPROCESSING, exported
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import make, node, weights, write
from torch import nn

from compress.cost.conditions import has_vnni
from compress.cost.macs import count_macs
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError, CompressError, ModelError, NonFinite
from compress.onnx_file.structure import write_structure
from compress.onnx_import import parity
from compress.onnx_import.importer import build_imported, build_network, import_onnx
from compress.onnx_import.preconditions import read_source
from compress.quantization.onnx_int8 import Quantization, quantize_onnx

I64 = np.int64


def small_network(batch: int | str = "N", **names: str) -> onnx.ModelProto:
    """Convolution, batch norm, ReLU, mean, linear layer; the names are those of a torch module."""
    constants = {
        **weights(**{"body.0.weight": (6, 4, 3, 3), "body.1.weight": (6,), "body.1.bias": (6,), "mean": (6,)}),
        **weights(**{"head.weight": (3, 6), "head.bias": (3,)}),
        "var": np.full(6, 0.7, np.float32),
    }
    nodes = [
        node("Conv", ["x", "body.0.weight"], ["a"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "body.1.weight", "body.1.bias", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("Gemm", ["e", "head.weight", "head.bias"], transB=1),
    ]
    return make(nodes, constants, inputs={"x": (batch, 4, 6, 6)})


def message_of(path: Path, **options: object) -> str:
    with pytest.raises(CompressError) as caught:
        import_onnx(path, **options)
    return str(caught.value)


def test_layers_are_plain_and_called_as_in_the_file(tmp_path):
    module = import_onnx(write(tmp_path / "net.onnx", small_network()))
    named = {name: type(part) for name, part in module.named_modules() if not list(part.children())}
    assert named == {"body.0": nn.Conv2d, "body.1": nn.BatchNorm2d, "head": nn.Linear}
    assert not module.training
    assert set(module.state_dict()) >= {"body.0.weight", "body.1.running_var", "head.bias"}


def test_copies_train_and_move_like_any_module(tmp_path):
    module = copy.deepcopy(import_onnx(write(tmp_path / "net.onnx", small_network())))
    optimizer = torch.optim.SGD(module.train().parameters(), 0.1)
    mean = module.get_submodule("body.1").running_mean.clone()
    loss = module(torch.randn(5, 4, 6, 6)).square().sum()
    loss.backward()
    optimizer.step()
    assert not torch.equal(mean, module.get_submodule("body.1").running_mean)
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.double().eval()(torch.zeros(1, 4, 6, 6, dtype=torch.float64)).dtype == torch.float64


def test_errors_inside_are_raised_and_not_printed(tmp_path, capsys):
    module = import_onnx(write(tmp_path / "net.onnx", small_network()))
    for one in (module, copy.deepcopy(module)):
        with pytest.raises(RuntimeError):
            one(torch.zeros(1, 5, 6, 6))
    assert capsys.readouterr().err == ""


def test_batch_norm_keeps_its_share_of_old_statistics(tmp_path):
    model = small_network()
    model.graph.node[1].attribute.append(helper.make_attribute("momentum", 0.75))
    module = import_onnx(write(tmp_path / "net.onnx", model))
    assert module.get_submodule("body.1").momentum == pytest.approx(0.25)


def test_kernels_read_twice_are_one_parameter_and_biases_are_not(tmp_path):
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w", "b"], ["c"]),
             node("Conv", ["c", "w", "b2"], ["d"]), node("Conv", ["d", "v", "b2"])]  # fmt: skip
    constants = weights(w=(4, 4, 1, 1), b=(4,), v=(4, 4, 1, 1)) | {"b2": np.zeros(4, np.float32)}
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants)))
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert len(layers) == 3  # the first is called twice
    assert layers[0].weight is layers[1].weight
    assert layers[1].bias is not layers[2].bias
    assert count_macs(module, torch.zeros(1, 4, 6, 6)) == 4 * 16 * 36


def test_names_stay_unique_where_the_file_repeats_them(tmp_path):
    nodes = [
        node("Conv", ["x", "train.weight"], ["a"], name="first"),
        node("Conv", ["a", "1"], ["b"], name="conv"),
        node("Conv", ["b", "2"], ["c"], name="conv/inner/Conv"),
        node("Conv", ["c", "3"], name="conv_inner"),
    ]
    constants = {key: weights(w=(4, 4, 1, 1))["w"] for key in ("train.weight", "1", "2", "3")}
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants)))
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    assert names == ["train_", "conv", "conv_inner", "conv_inner_2"]


def test_file_for_one_image_takes_several(tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "halves"], ["b"]),  # images and channels in one axis, as old shuffles have it
        node("Transpose", ["b"], ["c"], perm=[1, 0, 2]),
        node("Reshape", ["c", "back"], ["d"]),
        node("Gather", ["d", "second"], ["e"], axis=0),
        node("Reshape", ["e", "rows"], ["f"]),
        node("Concat", ["f", "extra"], axis=2),
    ]
    constants = weights(w=(4, 4, 1, 1), extra=(1, 2, 3)) | {
        "halves": np.array([2, 2, 36], I64),
        "back": np.array([2, -1, 2, 6, 6], I64),
        "second": np.array(1, I64),
        "rows": np.array([1, 2, -1], I64),
    }
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants, inputs={"x": (1, 4, 6, 6)})))
    images = torch.randn(3, 4, 6, 6)
    each = torch.cat([module(images[index : index + 1]) for index in range(3)])
    assert module(images).shape == (3, 2, 39)
    assert torch.allclose(module(images), each, atol=1e-6)


def test_file_that_mixes_images_is_refused_and_the_node_is_named(tmp_path):
    nodes = [node("Relu", ["x"], ["a"]), node("Softmax", ["a"], axis=0, name="over_images")]
    text = message_of(write(tmp_path / "net.onnx", make(nodes, inputs={"x": (1, 4, 6, 6)})))
    assert "For one image it is right, for 2 at once it is not" in text
    assert "Softmax 'over_images'" in text


def test_shapes_are_written_without_widths(tmp_path):
    nodes = [
        node("Reshape", ["x", "split"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["b", "join"], ["c"]),
        node("Reshape", ["c", "rows"]),
    ]
    constants = {
        "split": np.array([-1, 2, 2, 6, 6], I64),
        "join": np.array([-1, 4, 6, 6], I64),
        "rows": np.array([-1, 144], I64),
    }
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants)))
    wider = torch.randn(2, 10, 6, 6)
    expected = wider.unflatten(1, (2, 5)).transpose(1, 2).flatten(1)
    assert torch.equal(module(wider), expected)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_written_out_is_one_layer(affine, tmp_path):
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "groups"], ["b"]),
        node("InstanceNormalization", ["b", "one", "zero"], ["c"], epsilon=1e-3),
        node("Reshape", ["c", "back"], ["d" if affine else "y"]),
        node("Mul", ["scale", "d"], ["e"]),
        node("Add", ["e", "shift"]),
    ][: 6 if affine else 4]
    constants = weights(w=(6, 4, 1, 1), scale=(6, 1, 1), shift=(1, 6, 1, 1), one=(3,), zero=(3,))
    constants |= {"groups": np.array([0, 3, -1], I64), "back": np.array([-1, 6, 6, 6], I64)}
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants)))
    (norm,) = (part for part in module.modules() if isinstance(part, nn.GroupNorm))
    assert (norm.num_groups, norm.num_channels, norm.eps) == (3, 6, pytest.approx(1e-3))
    assert [one.op for one in module.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_group_norm_whose_inside_is_read_elsewhere_stays_as_it_is(tmp_path):
    nodes = [
        node("Reshape", ["x", "groups"], ["b"]),
        node("InstanceNormalization", ["b", "one", "one"], ["c"]),
        node("Reshape", ["c", "back"], ["d"]),
        node("ReduceMax", ["c", "axes"], ["m"], keepdims=1),
        node("Unsqueeze", ["m", "last"], ["n"]),
        node("Add", ["d", "n"]),
    ]
    constants = {
        "groups": np.array([0, 2, -1], I64),
        "back": np.array([-1, 4, 6, 6], I64),
        "one": np.ones(2, np.float32),
    }
    constants |= {"axes": np.array([1, 2], I64), "last": np.array([3], I64)}
    model = make(nodes, constants)
    module = import_onnx(write(tmp_path / "net.onnx", model))
    assert not any(isinstance(part, nn.GroupNorm) for part in module.modules())


@pytest.mark.parametrize("place", [0, 1, -1])
def test_split_of_a_shuffle_takes_every_second_channel(place, tmp_path):
    nodes = [
        node("Reshape", ["x", "pairs"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[1, 0, 2]),
        node("Reshape", ["b", "back"], ["c"]),
        node("Gather", ["c", "place"], axis=0),
    ]
    constants = {
        "pairs": np.array([2, 2, 36], I64),
        "back": np.array([2, -1, 2, 6, 6], I64),
        "place": np.array(place, I64),
    }
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants, inputs={"x": (1, 4, 6, 6)})))
    images = torch.randn(3, 8, 6, 6)
    assert torch.equal(module(images), images[:, place % 2 :: 2])


def test_several_inputs_and_outputs_keep_their_order(tmp_path):
    nodes = [node("Add", ["x", "z"], ["s"]), node("Mul", ["x", "z"], ["p"])]
    model = make(nodes, inputs={"x": ("N", 3), "z": ("N", 3)}, outputs=("p", "s"))
    module = import_onnx(write(tmp_path / "net.onnx", model))
    first, second = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 5, 6]])
    product, total = module(first, second)
    assert product.tolist() == [[4, 10, 18]]
    assert total.tolist() == [[5, 7, 9]]


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)])
def test_other_precisions_become_float32(kind, dtype, tmp_path):
    constants = {name: array.astype(dtype) for name, array in weights(w=(5, 4, 3, 3), b=(5,)).items()}
    model = make([node("Conv", ["x", "w", "b"])], constants, kind=kind)
    module = import_onnx(write(tmp_path / "net.onnx", model))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module(torch.zeros(2, 4, 6, 6)).dtype == torch.float32


def test_weights_among_the_inputs_are_weights(tmp_path):
    model = small_network()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    module = import_onnx(write(tmp_path / "net.onnx", model))
    assert module(torch.zeros(2, 4, 6, 6)).shape == (2, 3)


def test_open_sizes_are_asked_for_and_taken(tmp_path):
    model = make([node("Relu", ["x"])], inputs={"x": ("N", 4, "h", "w")})
    path = write(tmp_path / "net.onnx", model)
    assert "model.inputs: {x: [3, 224, 224]}" in message_of(path)
    assert import_onnx(path, {"x": [4, 5, 7]})(torch.ones(1, 4, 5, 7)).shape == (1, 4, 5, 7)
    assert "got (3, 5, 7) for one image" in message_of(path, shapes={"x": [3, 5, 7]})
    assert "which are x; z is none" in message_of(path, shapes={"z": [1]})


def test_real_images_are_compared_too_and_must_fit(tmp_path):
    path = write(tmp_path / "net.onnx", small_network())
    assert isinstance(import_onnx(path, images=[np.ones((2, 4, 6, 6), np.float32)]), nn.Module)
    text = message_of(path, images=[np.ones((2, 3, 6, 6), np.float32)])
    assert "takes images of shape (4, 6, 6), got (3, 6, 6)" in text
    assert "data.preprocessing" in text


def cancelling(large: float) -> onnx.ModelProto:
    """A kernel whose two halves nearly cancel: what is left is small beside what is rounded on the way."""
    kernel, rest = (weights(**{name: (5, 32, 3, 3)})[name] for name in ("kernel", "rest"))
    nodes = [node("Concat", ["x", "x"], ["twice"], axis=1), node("Conv", ["twice", "w"])]
    kernels = np.concatenate([large * kernel, np.flip(rest, 0) - large * kernel], 1)
    return make(nodes, {"w": kernels}, inputs={"x": ("N", 32, 8, 8)})


@pytest.mark.parametrize(("large", "off", "passes"), [(30, 2e-5, True), (0, 2e-5, False), (3e4, 2e-4, False)])
def test_what_float32_rounds_is_no_error_of_the_import(large, off, passes, tmp_path, monkeypatch):
    source = read_source(write(tmp_path / "net.onnx", cancelling(large)))
    module, run = build_network(source), parity._run
    monkeypatch.setattr(parity, "_run", lambda *given: {name: one * (1 + off) for name, one in run(*given).items()})
    if passes:
        assert parity.require_parity(module, source) == pytest.approx(off, rel=0.5)
    else:
        with pytest.raises(ModelError, match="must equal the file within"):
            parity.require_parity(module, source)


def test_training_statistics_of_constants_are_computed_once(tmp_path):
    nodes = [  # a kernel that is standardised in the file, as old exporters write it: five outputs, one of them read
        node("BatchNormalization", ["kernel", "one", "zero", "zero", "one"], ["k", "a", "b", "c", "d"]),
        node("Reshape", ["k", "shape"], ["w"]),
        node("Conv", ["x", "w"]),
    ]
    constants = weights(kernel=(1, 5, 36)) | {"one": np.ones(5, np.float32), "zero": np.zeros(5, np.float32)}
    constants["shape"] = np.array([5, 4, 3, 3], I64)
    module = import_onnx(write(tmp_path / "net.onnx", make(nodes, constants, opset=9)))  # compared with ONNX Runtime
    assert [type(part) for part in module.children()] == [nn.Conv2d]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_everything_that_is_not_supported_is_listed_at_once(tmp_path):
    loop = helper.make_graph([], "body", [], [])
    nodes = [
        node("NonMaxSuppression", ["x", "x"], ["a"], name="nms_1"),
        node("NonMaxSuppression", ["x", "a"], ["b"], name="nms_2"),
        node("Loop", ["", "", "x"], ["c"], name="again", body=loop),
        helper.make_node("Fused", ["x"], ["d"], name="theirs", domain="com.example"),
        node("GRU", ["x", "w", "w"], ["e"], name="memory"),
        node("Relu", ["x"]),
    ]
    model = make(nodes, {"w": np.ones((1, 3, 4), np.float32)}, outputs=("b", "c", "d", "e", "y"))
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    text = message_of(write(tmp_path / "net.onnx", model))
    assert "5 of 6 nodes cannot" in text
    for part in (
        "NonMaxSuppression 'nms_1', 'nms_2' is not supported",
        "Loop 'again'",
        "'theirs' is of the domain 'com.example'",
        "GRU 'memory'",
    ):
        assert part in text


def test_branch_that_images_choose_is_refused(tmp_path):
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "one", [],
                               [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)])  # fmt: skip
    nodes = [node("ReduceSum", ["x"], ["s"], keepdims=0), node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
             node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]  # fmt: skip
    assert "If 'If_y' depends on the images (control flow)" in message_of(write(tmp_path / "net.onnx", make(nodes)))


@pytest.mark.parametrize("operator", ["DynamicQuantizeLinear", "ConvInteger", "QLinearConv"])
def test_quantised_networks_are_refused_with_what_to_give(operator, tmp_path):
    model = make([node("Relu", ["x"])])
    model.graph.node.append(node(operator, ["y", "s"], ["q"]))
    text = message_of(write(tmp_path / "net.onnx", model))
    assert f"it is quantised: 1 {operator}" in text
    assert "Give the float file" in text


@pytest.mark.parametrize("name", nets.NAMES)
def test_a_qdq_graph_is_imported_in_its_float_form(name, tmp_path):
    whole = exported(name)
    pictures = np.random.default_rng(3).integers(0, 256, (48, 16, 16, 3), np.uint8)
    split = Split("calibration", ArraySource(pictures, np.zeros(48, np.int64)), np.arange(48), PREPROCESSING)
    quantize_onnx(whole, tmp_path / "int8.onnx", split, Quantization(images=48, reduce_range=not has_vnni()))
    images = PREPROCESSING.normalize(pictures)
    found, original = import_onnx(tmp_path / "int8.onnx", images=[images[:2]]), import_onnx(whole)
    assert found.meta["import_error"] < 1e-5
    assert 0 < found.meta["rounding_error"] < 0.2
    assert original.meta["rounding_error"] is None
    assert [(one, tuple(value.shape)) for one, value in found.named_parameters()] == [
        (one, tuple(value.shape)) for one, value in original.named_parameters()
    ]
    with torch.no_grad():
        got, wanted = (one(torch.from_numpy(images)) for one in (found, original))
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()
    write_structure(tmp_path / "int8.onnx", tmp_path / "structure.onnx")
    again = build_imported(tmp_path / "structure.onnx")
    again.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(again(torch.from_numpy(images)), got)


def test_training_mode_is_refused(tmp_path):
    model = small_network()
    model.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    assert "BatchNormalization 'BatchNormalization_b' is in training mode" in message_of(
        write(tmp_path / "n.onnx", model)
    )


@pytest.mark.parametrize(
    "place", ["../secret.bin", "/etc/hostname", "C:\\secret.bin", "sub/../../secret.bin", "..\\secret.bin"]
)
def test_weights_elsewhere_are_never_read(place, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    model = small_network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="must lie in its folder"):
        import_onnx(path)


def test_weights_behind_a_link_elsewhere_are_never_read(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "net.onnx"
    onnx.save_model(small_network(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(ArtifactError, match="must lie in its folder"):
        import_onnx(path)


def test_weights_beside_the_file_are_read(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save_model(small_network(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert import_onnx(path)(torch.zeros(1, 4, 6, 6)).shape == (1, 3)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ArtifactError, match=r"weights in 'w\.bin' are missing"):
        import_onnx(path)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07" * 50], ids=["empty", "text", "noise"])
def test_corrupt_files_are_refused(content, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        import_onnx(path)


def test_cut_off_file_is_refused(tmp_path):
    path = write(tmp_path / "net.onnx", small_network())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CompressError):
        import_onnx(path)


def test_old_operator_sets_are_converted_or_refused_by_name(tmp_path):
    old = make([node("Relu", ["x"])], opset=6)
    assert import_onnx(write(tmp_path / "old.onnx", old))(torch.ones(2, 4, 6, 6)).min() == 1
    broken = make([node("Add", ["x", "c"], axis=1, broadcast=1)], weights(c=(4,)), opset=6)
    assert "uses 6 and cannot be converted" in message_of(write(tmp_path / "older.onnx", broken))
    new = make([node("Relu", ["x"])])
    new.opset_import[0].version = 999
    assert "it uses 999" in message_of(write(tmp_path / "new.onnx", new))


def test_fixed_number_of_images_is_refused(tmp_path):
    model = make([node("Relu", ["x"])], inputs={"x": (8, 4, 6, 6)})
    assert "any number of images at once, or one, it takes 8" in message_of(write(tmp_path / "net.onnx", model))


def test_values_that_are_not_finite_are_named(tmp_path):
    model = make([node("Mul", ["x", "big"], ["a"]), node("Mul", ["a", "big"])], {"big": np.float32(3e38)})
    with pytest.raises(NonFinite, match=r"'y' .* must be finite"):
        import_onnx(write(tmp_path / "net.onnx", model))


def test_first_node_that_differs_is_named(tmp_path, monkeypatch):
    from compress.onnx_import import operation

    def wrong(op: operation.Operation) -> operation.Result:
        return op.call(torch.sigmoid, op.image())

    monkeypatch.setitem(operation.OPERATORS, "Relu", wrong)
    text = message_of(write(tmp_path / "net.onnx", small_network()))
    assert "must equal the file within 1e-05" in text
    assert "the first that differs is Relu 'Relu_c'" in text


# -- the structure without the weights ---------------------------------------------------------------------------------


def test_structure_holds_no_weights_and_builds_the_same_layers(tmp_path):
    rng = np.random.default_rng(0)
    model = small_network()
    kernel = next(tensor for tensor in model.graph.initializer if tensor.name == "body.0.weight")
    kernel.CopyFrom(numpy_helper.from_array(rng.standard_normal((6, 4, 3, 3)).astype(np.float32), kernel.name))
    path = write(tmp_path / "net.onnx", model)
    write_structure(path, tmp_path / "structure.onnx")
    assert kernel.raw_data[:16] not in (tmp_path / "structure.onnx").read_bytes()
    onnx.checker.check_model(tmp_path / "structure.onnx", full_check=True)
    original, rebuilt = import_onnx(path), build_imported(tmp_path / "structure.onnx")
    rebuilt.load_state_dict(original.state_dict())
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(original(images), rebuilt(images))
    write_structure(tmp_path / "structure.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "structure.onnx").read_bytes()


def test_constants_that_are_no_weights_stay_in_the_structure(tmp_path):
    table = weights(t=(1, 4, 6, 6))["t"]
    model = make([node("Add", ["x", "t"], ["a"]), node("MatMul", ["a", "t"])], {"t": table})
    write_structure(write(tmp_path / "net.onnx", model), tmp_path / "structure.onnx")
    rebuilt = build_imported(tmp_path / "structure.onnx")
    assert torch.equal(rebuilt.get_buffer("t"), torch.from_numpy(table))
