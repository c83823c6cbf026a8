"""Odd but valid ONNX files are imported; malformed ones are refused by name in every command, none with a bug."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import smallrun
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_graphs import make, node, weights, write

from compress.errors import ArtifactError, CompressError, ModelError
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.io import read_metadata, read_signature, tensor_problems
from compress.onnx_import.importer import import_onnx
from compress.onnx_import.names import argument_names

PYTHON = (
    "in",
    "class",
    "lambda",
    "import",
    "def",
    "None",
    "True",
    "self",
    "torch",
    "match",
    "1",
    "images:0",
    "training",
)


def _network(
    image: str = "x", kernel: str = "k", value: str = "a", output: str = "y", name: str = "stem"
) -> ModelProto:
    nodes = [
        node("Conv", [image, kernel], [value], name, pads=[1, 1, 1, 1]),
        node("Relu", [value], ["b"], f"{name}/Relu"),
        node("GlobalAveragePool", ["b"], ["d"]),
        node("Flatten", ["d"], [output]),
    ]
    model = make(
        nodes, weights(**{kernel: (4, 3, 3, 3)}), inputs={image: ("N", 3, 16, 16)}, outputs=(output,), opset=17
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", 4]))
    return model


@pytest.mark.parametrize("place", ["image", "kernel", "value", "output", "name"])
@pytest.mark.parametrize("word", PYTHON)
def test_names_of_python_are_names_in_a_file(tmp_path: Path, place: str, word: str) -> None:
    module = import_onnx(write(tmp_path / "m.onnx", _network(**{place: word})))
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_arguments_are_never_called_as_another_input() -> None:
    assert argument_names(["a.b", "a_b", "a_b_"]) == ["a_b__", "a_b", "a_b_"]
    assert len(set(argument_names(["in", "in_", "1", "input_1", "in:", "in."]))) == 6


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_clip_takes_bounds_of_one_element(tmp_path: Path, shape: tuple[int, ...]) -> None:
    constants = {name: np.full(shape, value, np.float32) for name, value in (("low", -0.5), ("high", 0.5))}
    model = make([node("Clip", ["x", "low", "high"], ["y"])], constants)
    import_onnx(write(tmp_path / "m.onnx", model)) if shape == () else _import_unchecked(tmp_path, model)


def _import_unchecked(folder: Path, model: ModelProto) -> None:
    """Import a file that ONNX Runtime may refuse, and look at what is built."""
    from compress.onnx_import.importer import build_imported

    module = build_imported(write(folder / "m.onnx", model))
    assert module(torch.full((2, 4, 6, 6), 3.0)).max() == 0.5


def test_clip_with_bounds_of_several_elements_is_refused(tmp_path: Path) -> None:
    model = make([node("Clip", ["x", "low"], ["y"])], {"low": np.zeros(2, np.float32)})
    from compress.onnx_import.importer import build_imported

    with pytest.raises(ModelError, match=r"Clip 'Clip_y' input 1 \(min\) must be one number, it has 2"):
        build_imported(write(tmp_path / "m.onnx", model))


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT64])
def test_an_image_input_of_whole_numbers_is_refused_for_prepared_images(tmp_path: Path, kind: int) -> None:
    nodes = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("Conv", ["f", "k"], ["y"])]
    path = write(tmp_path / "m.onnx", make(nodes, weights(k=(2, 4, 3, 3)), kind=kind))
    import_onnx(path)  # looked at alone it is a network like others
    with pytest.raises(ModelError, match=r"Input 'x' of .* takes u?int\d+, images are given as prepared float32"):
        import_onnx(path, images=[np.zeros((2, 4, 6, 6), np.float32)])


# -- malformed files ---------------------------------------------------------------------------------------------------


def _short_tensor(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"abc"


def _long_tensor(model: ModelProto) -> None:
    model.graph.initializer[0].raw_data *= 2


def _negative_dims(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


def _unknown_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def _no_input_type(model: ModelProto) -> None:
    model.graph.input[0].ClearField("type")


def _negative_size(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -5


def _odd_element(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 55


def _output_of_nobody(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def _input_of_nobody(model: ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


def _missing_input(model: ModelProto) -> None:
    del model.graph.node[0].input[:]


def _missing_output(model: ModelProto) -> None:
    del model.graph.node[1].output[:]


def _recursive_function(model: ModelProto) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    inner = [helper.make_node("F", ["i"], ["o"], domain="f")]
    model.functions.append(helper.make_function("f", "F", ["i"], ["o"], inner, opsets))
    model.opset_import.append(helper.make_opsetid("f", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "F", "f"


def _place_too_long(model: ModelProto) -> None:
    _external(model, "a" * 5000)


def _place_elsewhere(model: ModelProto) -> None:
    _external(model, "/etc/hostname")


def _external(model: ModelProto, place: str) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(key="length", value="9" * 40)


def _old_operators(model: ModelProto) -> None:
    model.opset_import[0].version = -1


DAMAGES: tuple[Callable[[ModelProto], None], ...] = (
    _short_tensor, _long_tensor, _negative_dims, _unknown_type, _no_input_type, _negative_size, _odd_element,
    _output_of_nobody, _input_of_nobody, _missing_input, _missing_output, _recursive_function, _place_too_long,
    _place_elsewhere, _old_operators,
)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "test.npz"
    np.savez(path, **smallrun.pictures(8, seed=2))
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__.strip("_"))
def test_a_malformed_file_is_refused_everywhere(tmp_path: Path, images: Path, damage: Callable[..., None]) -> None:
    model = _network()
    damage(model)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CompressError, match=r"\S") as caught:
        import_onnx(path)
    assert caught.value.exit_code in (3, 4)
    settings = ("preprocessing.mean=[0.5]", "resources=null", "repeats=2")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    verified = smallrun.call("verify", str(path), "--data", str(images), "-q", *flags)
    assert verified.exit_code in (1, 4), verified.output  # 1: the verdict says what is wrong with it
    inspected = smallrun.call("inspect", str(path), "-q")
    assert inspected.exit_code in (3, 4), inspected.output
    for done in (verified, inspected):
        assert "Traceback" not in done.output
        assert "of its own" not in done.output
    if verified.exit_code == 1:
        assert "structure" in verified.output


def test_tensors_of_every_type_are_measured_in_bytes() -> None:
    model = _network()
    for name in ("float16", "float32", "float64", "int8", "int64", "bool", "uint16"):
        model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 5), name), name))
    model.graph.initializer.append(helper.make_tensor("four", TensorProto.INT4, [3], [1, 2, 3]))
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"a"]))
    assert tensor_problems(model) == []
    model.graph.initializer[-3].raw_data += b"x"
    assert tensor_problems(model) == ["tensor 'uint16' must hold 30 bytes, it holds 31"]


@pytest.mark.parametrize("written", ['{"mean": 5}', '{"resize": -1}', "[1, 2]", '{"nonsense": 1}', "[" * 100_000, "{"])
def test_damaged_preprocessing_in_a_file_is_told(written: str) -> None:
    model = _network()
    model.metadata_props.add(key="compress.preprocessing", value=written)
    with pytest.raises(ArtifactError, match=r"The metadata 'compress\.preprocessing' .* must be JSON as this program"):
        read_metadata(model)


@pytest.mark.parametrize("written", ['{"height": 0}', '{"height": 1e999}', '{"height": "x"}', "[" * 100_000])
def test_damaged_sizes_in_a_file_are_told(tmp_path: Path, written: str) -> None:
    model = _network()
    model.metadata_props.add(key="compress.sizes", value=written)
    with pytest.raises(ArtifactError, match=r"The metadata 'compress\.sizes' must be JSON of whole numbers"):
        count_onnx(write(tmp_path / "m.onnx", model))


def test_sizes_of_inputs_have_a_range() -> None:
    model = _network()
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 2**40
    with pytest.raises(
        ArtifactError, match=r"Sizes of input or output 'x' .* must be 0 to 2,147,483,647, got 1099511627776"
    ):
        read_signature(model)
