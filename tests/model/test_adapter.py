"""Several inputs travel as one array, and outputs in any nesting come out as tensors with names."""

import copy
import inspect
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
import wired
from torch import Tensor, nn

from compress.checkpoint.rebuild import build_module, rebuild, with_one_array, write_weights
from compress.data.packing import LARGEST_WHOLE, as_row, draw, is_packed, pack, unpack
from compress.errors import DataError, ModelError, NonFinite
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.adapter import example_input, flatten_outputs, real_inputs, with_own_forward
from compress.model.artifacts import FactorySpec, Signature, TensorSpec
from compress.model.recipe import Recipe
from compress.networks.wiring import notes_on, signature_of, wire
from compress.verification.parity import edge_parity, parity
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.runtimes.torch_eager import TorchEager
from compress.verification.samples import feed

SEVERAL = FactorySpec("factory", f"{wired.__file__}:several", inputs=wired.INPUTS)
IMAGES = nets.images(2)


def arrays(count: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {spec.name: draw(spec, [count, *map(int, spec.shape[1:])], generator) for spec in SEVERAL.input_specs()}


def rows(count: int = 2, seed: int = 0) -> Tensor:
    return torch.from_numpy(pack(arrays(count, seed), SEVERAL.input_specs()))


def plain(**values: Any) -> FactorySpec:
    return FactorySpec("factory", "any:where", **values)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_sample_of_several_inputs_is_a_row_or_refused():
    sample = {"image": np.ones((2, 2)), "ids": torch.tensor([3, 4])}
    row = as_row(sample, ("image", "ids"))
    assert (row.tolist(), row.dtype) == ([1, 1, 1, 1, 3, 4], np.float32)
    for wrong, match in (
        ({"ids": 1, "image": 2}, "a mapping of image, ids, in this order, got ids, image"),
        (np.ones(3), "a mapping of image, ids, in this order, got ndarray"),
        ({"image": 1, "ids": np.array([LARGEST_WHOLE + 1])}, "Whole numbers of input 'ids' must be within"),
    ):
        with pytest.raises(DataError, match=match):
            as_row(wrong, ("image", "ids"))


def test_what_was_packed_is_unpacked_to_the_bit():
    values = arrays(3)
    back = unpack(pack(values, SEVERAL.input_specs()), SEVERAL.input_specs())
    assert list(back) == list(values)
    for name, array in values.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)
    assert values["tokens"].max() > 9


def test_whole_numbers_are_exact_up_to_a_limit_and_refused_beyond_it():
    (spec,) = FactorySpec("factory", "a:b", inputs={"ids": {"shape": [2], "dtype": "int64"}}).input_specs()
    kept = np.array([[LARGEST_WHOLE, -LARGEST_WHOLE], [LARGEST_WHOLE - 1, 0]])
    assert np.array_equal(unpack(pack({"ids": kept}, [spec]), [spec])["ids"], kept)
    with pytest.raises(DataError, match=r"'ids' must be within 16,777,216, got 0 to 16,777,217"):
        pack({"ids": np.array([[LARGEST_WHOLE + 1, 0]])}, [spec])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v.pop("tokens"), r"must have the inputs image, tokens, scale, tokens is missing"),
        (lambda v: v.update(scale=np.zeros((2, 3), np.float32)), r"'scale' must have shape \(2, 1\), got \(2, 3\)"),
    ],
)
def test_samples_that_lack_an_input_are_refused(change: Any, match: str):
    values = arrays()
    change(values)
    with pytest.raises(DataError, match=match):
        pack(values, SEVERAL.input_specs())


def test_images_in_place_of_rows_are_refused_with_the_width():
    with pytest.raises(DataError, match=r"image, tokens, scale\): a sample must be a row of 294 numbers, .*\(2, 3, 16"):
        unpack(IMAGES.numpy(), SEVERAL.input_specs())
    with pytest.raises(ModelError, match=r"rows of 294 numbers, .*the data set gives \(3, 16, 16\)"):
        wire(wired.several(), SEVERAL, IMAGES)


# -- the adapted network -----------------------------------------------------------------------------------------------


def test_an_adapted_network_is_the_users_with_its_names_and_takes_rows():
    user, values = wired.several(), arrays()
    adapted = with_one_array(wired.several(), SEVERAL, rows())
    assert list(adapted.state_dict()) == list(user.state_dict())
    assert [name for name, _ in adapted.named_modules()] == [name for name, _ in user.named_modules()]
    assert isinstance(adapted, wired.Several)
    image, tokens, scale = (torch.from_numpy(values[name]) for name in wired.INPUTS)
    wanted = user(image, tokens=tokens, scale=scale)
    hidden, logits = adapted(rows())
    assert torch.equal(hidden, wanted["hidden"])
    assert torch.equal(logits, wanted["logits"])
    assert not torch.equal(logits, user(image, tokens=tokens)["logits"])
    with real_inputs(adapted):
        assert torch.equal(adapted(image, tokens, scale)[1], logits)
    assert torch.equal(copy.deepcopy(adapted)(rows())[1], logits)


def test_a_graph_module_is_adapted_and_its_copies_too():
    traced = torch.fx.symbolic_trace(_Gives(lambda _, y: (y, y + 1)).eval())
    wanted = traced(IMAGES)
    assert isinstance(wanted, tuple)
    adapted = wire(traced, plain(outputs=("output_1",)), IMAGES)
    assert torch.equal(adapted(IMAGES), wanted[1])
    assert torch.equal(copy.deepcopy(adapted)(IMAGES), wanted[1])


@pytest.mark.parametrize("form", list(wired.FORMS))
def test_outputs_have_names_in_a_fixed_order(form: str):
    module = wired.structured(form)
    names = wired.NAMES[form]
    adapted = with_one_array(module, plain(), IMAGES)
    assert [spec.name for spec in signature_of(adapted, plain(), IMAGES).outputs] == names
    outputs = adapted(IMAGES)
    assert isinstance(outputs, Tensor if form == "tensor" else tuple)
    logits = wired.structured("tensor")(IMAGES)
    place = next(number for number, name in enumerate(names) if name in ("logits", "output_0"))
    found = outputs if form == "tensor" else outputs[place]
    assert torch.allclose(found, logits, atol=1e-6)


@pytest.mark.parametrize("form", ["dict", "tuple", "namedtuple", "dataclass"])
def test_chosen_outputs_are_kept_in_the_order_asked_for(form: str):
    first, second = wired.NAMES[form]
    both = wire(wired.structured(form), plain(), IMAGES)(IMAGES)
    one = wire(wired.structured(form), plain(outputs=(second,)), IMAGES)
    assert torch.equal(one(IMAGES), both[1])
    swapped = wire(wired.structured(form), plain(outputs=(second, first)), IMAGES)
    assert [torch.equal(a, b) for a, b in zip(swapped(IMAGES), reversed(both), strict=True)] == [True, True]


@pytest.mark.parametrize("training_form", ["tuple", "namedtuple"])
def test_several_outputs_while_training_only_give_the_one_of_eval_mode(training_form: str):
    adapted = wire(wired.structured("tensor", training_form), plain(), IMAGES)
    assert adapted(IMAGES).shape == (2, 4)
    assert adapted.train()(IMAGES).shape == (2, 4)


def test_a_plain_network_is_left_alone():
    module = nets.build("chain")
    assert type(wire(module, plain(), IMAGES)) is type(nets.build("chain"))


def test_a_declared_image_gives_the_input_its_name_and_holds_its_shape():
    spec = plain(inputs={"x": {"shape": [3, 16, 16]}})
    module = wire(nets.build("chain"), spec, IMAGES)
    assert signature_of(module, spec, IMAGES).inputs == (TensorSpec("x", ("batch", 3, 16, 16)),)
    with pytest.raises(ModelError, match=r"declares for 'x', \(3, 8, 8\); the data set gives \(3, 16, 16\)"):
        wire(nets.build("chain"), plain(inputs={"x": {"shape": [3, 8, 8]}}), IMAGES)


def test_inputs_that_forward_does_not_take_are_refused():
    declared = {name: wired.INPUTS[name] for name in ("image", "scale")}
    with pytest.raises(ModelError, match=r"model\.inputs \(image, scale\) must fit forward\(self, image.*'tokens'"):
        wire(wired.several(), plain(inputs=declared), torch.zeros(2, 289))


def test_an_output_of_another_name_gets_the_closest():
    with pytest.raises(ModelError, match=r"\(features, logits\), got 'feature'\.\nHint: did you mean 'features'"):
        wire(wired.structured("dict"), plain(outputs=("feature",)), IMAGES)


def test_rows_come_back_from_disk(tmp_path: Path):
    module = with_one_array(wired.several(), SEVERAL, rows())
    signature = signature_of(module, SEVERAL, rows())
    write_weights(module, tmp_path / "w.safetensors")
    again = rebuild(SEVERAL, Recipe(), Signature.from_dict(signature.to_dict()), tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(module(rows()), again(rows()), strict=True))
    assert example_input(signature).shape == (1, 294)
    assert Signature.from_dict(signature.to_dict()).inputs[1].high == 20


def test_a_file_has_the_inputs_and_outputs_of_the_network_and_equals_it(tmp_path: Path):
    module = with_one_array(build_module(SEVERAL), SEVERAL, rows())
    signature = signature_of(module, SEVERAL, rows())
    export_onnx(module, signature, tmp_path / "several.onnx", ExportSettings(opset=18))
    samples = rows(3, seed=5).numpy()
    with OnnxRuntime(tmp_path / "several.onnx") as runtime, TorchEager(module, signature) as reference:
        assert runtime.signature == signature
        assert [spec.dtype for spec in runtime.signature.inputs] == ["float32", "int64", "float32"]
        got, wanted = runtime.run(feed(runtime, samples)), reference.run(feed(reference, samples))
    assert list(got) == ["hidden", "logits"]
    assert all(np.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


class _Rows:
    """A data set of rows, as far as parity asks: what is read goes into the network as it is."""

    name, indices = "evaluation", np.arange(6)

    def __init__(self) -> None:
        self.source = self.preprocessing = self
        self.labels = np.zeros(6, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, count: int) -> "_Rows":
        return self

    def read(self, positions: np.ndarray) -> np.ndarray:
        return rows(6, seed=9).numpy()[positions]

    def normalize(self, samples: np.ndarray) -> np.ndarray:
        return samples


def test_parity_is_that_of_all_outputs_of_several_inputs(tmp_path: Path):
    module = with_one_array(wired.several(), SEVERAL, rows())
    signature = signature_of(module, SEVERAL, rows())
    export_onnx(module, signature, tmp_path / "several.onnx", ExportSettings(opset=18))
    split: Any = _Rows()
    with OnnxRuntime(tmp_path / "several.onnx") as runtime, TorchEager(module, signature) as reference:
        assert parity(runtime, reference, split, 6, batch_size=4).max_abs < 1e-6
        edges = edge_parity(runtime, reference, split, 8)
        assert list(edges) == ["batch 1", "batch 3", "batch 8"]
        assert max(edges.values()) < 1e-6
        module.embed.weight.data += 0.5
        assert parity(runtime, reference, split, 6).max_abs > 0.4


# -- what is no network to work with -----------------------------------------------------------------------------------


class _Gives(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.conv, self.give, self.drop = nn.Conv2d(3, 4, 3), give, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.give(self, self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("give", "match"),
    [
        (lambda _, y: "text", "its output is of type str"),
        (lambda _, y: {"logits": y, "boxes": [y, 3.0]}, r"output 'boxes\.1' is of type float"),
        (lambda _, y: None, "its output is of type NoneType"),
        (lambda _, y: {}, "at least one tensor, it returns none"),
        (lambda _, y: {"a": {"b": y}, "a.b": y}, r"names of their own, a\.b is there twice"),
        (lambda _, y: 1 / 0, "must run on images of shape .*got ZeroDivisionError"),
        (lambda _, y: (y, y.mean()), r"'output_1' must have the batch \(2\) as its first axis, got shape \(\)"),
    ],
)
def test_outputs_that_cannot_be_worked_with_are_named(give: Any, match: str):
    with pytest.raises(ModelError, match=match):
        signature_of(wire(_Gives(give).eval(), plain(), IMAGES), plain(), IMAGES)


def test_outputs_that_are_not_finite_are_named():
    module = wire(_Gives(lambda _, y: {"good": y, "bad": y / 0}).eval(), plain(), IMAGES)
    with pytest.raises(NonFinite, match="Output 'bad' of the network"):
        signature_of(module, plain(), IMAGES)


def _counting(module: Any, y: Tensor) -> Tensor:
    module.calls = getattr(module, "calls", 0) + 1
    return y + module.calls


def _left_on(module: Any, y: Tensor) -> Tensor:
    module.drop.train()
    return module.drop(y)


@pytest.mark.parametrize(
    ("give", "match"),
    [
        (lambda _, y: nn.functional.dropout(y, 0.5), r"random numbers are drawn in the network itself \(_Gives\): \w+"),
        (_left_on, r"drawn in 'drop' \(Dropout\): \w+; dropout stays in training mode in 'drop'"),
        (_counting, "changes between two runs: no random operator was seen, so it keeps a state of its own"),
    ],
)
def test_a_network_that_changes_from_run_to_run_is_refused_with_the_layer(give: Any, match: str):
    module = _Gives(give).eval()
    with pytest.raises(ModelError, match=match):
        signature_of(module, plain(), IMAGES)


@pytest.mark.parametrize(
    ("give", "is_decision"),
    [
        (lambda _, y: y if y.sum() > 0 else -y, True),
        (lambda _, y: y * y.max().item(), True),
        (lambda _, y: y * len(y[y > 0]), True),
        (lambda m, y: y if m.conv.weight.sum() > 0 else -y, False),
        (lambda _, y: y if y.shape[0] > 1 else -y, False),
        (lambda _, y: torch.where(y > 0, y, -y), False),
    ],
)
def test_decisions_by_the_input_are_noted_with_the_layer(give: Any, is_decision: bool):
    module = nn.Sequential(nn.Identity(), _Gives(give)).eval()
    notes = notes_on(module, IMAGES)
    assert bool(notes) is is_decision
    if is_decision:
        assert "decides by the values of its input, in '1' (_Gives): " in notes[0]


def test_names_of_outputs_are_those_of_the_path():
    found = list(flatten_outputs(wired.Found(torch.ones(1), hidden=(torch.ones(1), torch.ones(2)))))
    assert [name for name, _ in found] == ["logits", "hidden.0", "hidden.1"]


# -- the network in the hands of its user ------------------------------------------------------------------------------


def test_a_loaded_network_has_its_own_forward():
    example = rows()
    module = with_own_forward(with_one_array(build_module(SEVERAL), SEVERAL, example))
    given = {name: torch.from_numpy(value) for name, value in arrays().items()}
    with torch.no_grad():
        wanted = with_one_array(build_module(SEVERAL), SEVERAL, example)(example)
        assert torch.equal(plain_of(module(**given)), plain_of(wanted))
        image, *others = given
        assert torch.equal(plain_of(module(given[image], **{name: given[name] for name in others})), plain_of(wanted))
        assert torch.equal(plain_of(module(example)), plain_of(wanted))  # a row of all of them, as the stages have it
        assert torch.equal(plain_of(copy.deepcopy(module)(**given)), plain_of(wanted))
    own = inspect.signature(type(build_module(SEVERAL)).forward)
    assert list(inspect.signature(module.forward).parameters) == list(own.parameters)[1:]


def plain_of(outputs: Any) -> Tensor:
    return torch.cat([one.flatten() for one in (outputs if isinstance(outputs, tuple) else (outputs,))])


def test_a_network_of_one_image_stays_as_it_is():
    module = nets.build("chain")
    assert type(with_own_forward(module)) is type(nets.build("chain"))


@pytest.mark.parametrize("sizes", [(7,), (1, 128), (2, 3, 4, 5)])
def test_one_input_that_is_no_image_travels_in_rows(sizes: tuple[int, ...]):
    (spec,) = FactorySpec("factory", "any:where", inputs={"x": {"shape": list(sizes)}}).input_specs()
    values = np.random.default_rng(0).standard_normal((3, *sizes)).astype(np.float32)
    packed = pack({"x": values}, [spec])
    assert packed.shape == (3, int(np.prod(sizes)))
    assert np.array_equal(unpack(packed, [spec])["x"], values)
    assert is_packed([spec])
    assert not is_packed([TensorSpec("x", ("batch", 3, 8, 8))])


def test_inputs_of_another_shape_in_a_sample_are_refused():
    with pytest.raises(
        DataError, match=r"Input 'x' must have the same shape in each sample, got \(1, 4\) and \(4, 1\)"
    ):
        as_row({"x": np.zeros((4, 1))}, ["x"], {"x": (1, 4)})
