"""A file that is broken on purpose fails the check that is there for it, and the baseline itself passes every gate."""

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from exported import PREPROCESSING, SIGNATURE, exported
from onnx import TensorProto, helper, numpy_helper

from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.model.artifacts import ModelMetrics
from compress.onnx_file.io import load_onnx, save_onnx
from compress.verification.gates import Gates
from compress.verification.job import VerificationJob
from compress.verification.measurement import Conditions
from compress.verification.robustness import Robustness
from compress.verification.runtimes.onnxruntime import OnnxRuntime
from compress.verification.scope import Scope
from compress.verification.verdict import verify_onnx

GATES = Gates(
    max_drop={"top1": 0.0, "worst_class": 0.0},
    max_rise={"calibration_error": 0.0},
    minimum={"top1": 0.8},
    maximum={"churn": 0.0, "softmax_distance": 0.0},
    max_size_mb=1.0,
)


def make_split(preprocessing=PREPROCESSING, shift=0):
    """Images whose labels are what the network says, but for the last four."""
    images = np.random.default_rng(3).integers(0, 256, (40, 16, 16, 3), np.uint8)
    with OnnxRuntime(exported("chain")) as runtime:
        labels = runtime.run({"image": PREPROCESSING.normalize(images)})["logits"].argmax(1)
    labels[36:] = (labels[36:] + np.array([1, 2, 3, 1])) % 4  # so that every class has an image
    assert set(labels) == {0, 1, 2, 3}
    source = ArraySource(images, (labels + shift) % 4, ("cat", "dog", "naïve", "ship"))
    return Split("evaluation", source, np.arange(40), preprocessing)


SPLIT = make_split()
PAGE = Path(__file__).parents[2] / "docs" / "verification.md"


def verify(path, split=SPLIT, **changes):
    arguments = {
        "evaluation": split,
        "conditions": Conditions(warmup=1, repeats=4),
        "gates": GATES,
        "signature": SIGNATURE,
        "opset": 18,
        "reference": nets.build("chain"),
        "baseline_onnx": exported("chain"),
        "baseline_metrics": ModelMetrics(276544, 3820, 1, {"top1": 0.9}, {}),
    }
    return verify_onnx(VerificationJob(path, **(arguments | changes)))


def failing(verdict):
    return {check.name for check in verdict.checks if check.status == "fail"}


def test_the_baseline_against_itself_passes_every_gate():
    verdict = verify(exported("chain"))
    assert verdict.passed, failing(verdict)
    assert {check.status for check in verdict.checks} == {"pass"}
    assert len(verdict.checks) >= 16


def weight(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def kernels(model):
    """The weights of convolutions, in order."""
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    return [weight(model, name) for name in names]


def put(tensor, values):
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), tensor.name))


def permuted_channels(model):
    values = numpy_helper.to_array(kernels(model)[0])
    put(kernels(model)[0], values[::-1])


def zeroed_filter(model):
    values = numpy_helper.to_array(kernels(model)[-1]).copy()
    values[int(np.abs(values).sum((1, 2, 3)).argmax())] = 0
    put(kernels(model)[-1], values)


def scaled_head(model):
    put(weight(model, "head.weight"), numpy_helper.to_array(weight(model, "head.weight")) * 1.01)


def nan_weight(model):
    values = numpy_helper.to_array(kernels(model)[0]).copy()
    values.flat[0] = np.nan
    put(kernels(model)[0], values)


def overflow(model):
    """As in half precision: what is above 65504 is infinite."""
    put(kernels(model)[0], numpy_helper.to_array(kernels(model)[0]) * 1e38)
    put(kernels(model)[1], numpy_helper.to_array(kernels(model)[1]) * 1e38)


def denormal_weights(model):
    values = numpy_helper.to_array(kernels(model)[0]).copy()
    values.flat[:5] = 1e-40
    put(kernels(model)[0], values)


def wrong_opset(model):
    model.opset_import[0].version = 19


def missing_output(model):
    inner = model.graph.output[0].name
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == inner:
                node.output[index] = "scores"


def second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))


def fixed_batch(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def training_mode(model):
    last = [node for node in model.graph.node if node.op_type == "Relu"][-1]
    inner, last.output[0] = last.output[0], "before_dropout"
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "is_training"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))
    dropout = helper.make_node("Dropout", ["before_dropout", "ratio", "is_training"], [inner], name="drop")
    model.graph.node.insert(list(model.graph.node).index(last) + 1, dropout)


def training_mode_by_a_node(model):
    """The flag comes out of a Constant node, by way of another one."""
    training_mode(model)
    (flag,) = (tensor for tensor in model.graph.initializer if tensor.name == "is_training")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["said"], value=flag))
    model.graph.node.insert(1, helper.make_node("Identity", ["said"], ["is_training"]))
    model.graph.initializer.remove(flag)


def noise_of_its_own(model):
    last = [node for node in model.graph.node if node.op_type == "Relu"][-1]
    inner, last.output[0] = last.output[0], "quiet"
    noise = helper.make_node("RandomNormalLike", ["quiet"], ["noise"], scale=1.0)
    place = list(model.graph.node).index(last) + 1
    model.graph.node.insert(place, helper.make_node("Add", ["quiet", "noise"], [inner]))
    model.graph.node.insert(place, noise)


def narrower_layer(model):
    """One filter fewer, with everything that reads it: a network that runs, and is not the one it should be."""
    first, second = kernels(model)[:2]
    put(first, numpy_helper.to_array(first)[:-1])
    bias = next(node.input[2] for node in model.graph.node if node.op_type == "Conv" and node.input[1] == first.name)
    put(weight(model, bias), numpy_helper.to_array(weight(model, bias))[:-1])
    put(second, numpy_helper.to_array(second)[:, :-1])
    del model.graph.value_info[:]


@dataclass(frozen=True)
class Damage:
    """What is done to the file, or around it, and a check that must fail."""

    name: str
    check: str
    change: object = None
    split: Split = SPLIT


DAMAGES = (
    Damage("permuted channels", "parity", permuted_channels),
    Damage("one filter zeroed", "parity", zeroed_filter),
    Damage("head scaled by 1 %", "softmax_distance", scaled_head),
    Damage("a NaN weight", "evaluation", nan_weight),
    Damage("overflow", "evaluation", overflow),
    Damage("denormal weights", "denormals", denormal_weights),
    Damage("wrong opset", "structure", wrong_opset),
    Damage("missing output", "structure", missing_output),
    Damage("a second input", "structure", second_input),
    Damage("fixed batch", "structure", fixed_batch),
    Damage("dropout that drops", "structure", training_mode),
    Damage("dropout by a Constant node", "structure", training_mode_by_a_node),
    Damage("noise of its own", "repeatable", noise_of_its_own),
    Damage("a narrower layer", "macs_agree", narrower_layer),
    Damage("swapped mean and std", "preprocessing", split=make_split(
        replace(PREPROCESSING, mean=PREPROCESSING.std, std=PREPROCESSING.mean))),
    Damage("shifted labels", "baseline_agrees", split=make_split(shift=1)),
)  # fmt: skip


@cache
def documented():
    """Return damage -> checks that fail, as the page on verification states them."""
    rows = re.findall(r"^\| ([^|`]+) \| ((?:`[^`]+`(?:, )?)+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.strip(): set(re.findall("`([^`]+)`", checks)) for name, checks in rows}


def test_the_page_names_every_damage():
    assert set(documented()) == {damage.name for damage in DAMAGES}
    assert len(DAMAGES) >= 12


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_file_fails_the_check_that_is_there_for_it(damage, tmp_path: Path):
    path = exported("chain")
    if damage.change is not None:
        model = load_onnx(path, weights=True)
        damage.change(model)
        path = tmp_path / "damaged.onnx"
        onnx.save(model, path)
    verdict = verify(path, damage.split)
    assert not verdict.passed
    assert any(name.rpartition(".")[2] == damage.check for name in failing(verdict)), failing(verdict)
    assert documented()[damage.name] == failing(verdict)


def a_missing_file(data):
    data.unlink()


def half_a_file(data):
    data.write_bytes(data.read_bytes()[:1000])


def a_folder(data):
    data.unlink()
    data.mkdir()


def a_pipe(data):
    data.unlink()
    os.mkfifo(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (a_missing_file, "its weights in 'external.onnx.data' are missing"),
        (half_a_file, r"its weights in 'external.onnx.data' must be [\d,]+ bytes, it has 1,000"),
        (a_folder, "its weights in 'external.onnx.data' must be a file"),
        (a_pipe, "its weights in 'external.onnx.data' must be a file"),
    ],
)
def test_missing_weights_and_half_a_file_are_found(tmp_path, damage, said):
    path = tmp_path / "external.onnx"
    model = load_onnx(exported("chain"), weights=True)
    size = numpy_helper.from_array(np.array([-1, 3, 16, 16]), "size")
    model.graph.initializer.append(size)  # a shape that is only seen by running the graph
    first = model.graph.node[0].input[0]
    for node in model.graph.node:
        node.input[:] = ["reshaped" if name == first else name for name in node.input]
    kept = helper.make_node("NonZero", ["size"], ["kept"])
    flat = helper.make_node("Squeeze", ["kept"], ["flat"])
    chosen = helper.make_node("Gather", ["size", "flat"], ["chosen"])
    reshape = helper.make_node("Reshape", [first, "chosen"], ["reshaped"])
    for position, node in enumerate((kept, flat, chosen, reshape)):
        model.graph.node.insert(position, node)
    save_onnx(model, path, external=True)
    assert "structure" not in failing(verify(path, signature=None))
    damage(tmp_path / "external.onnx.data")
    verdict = verify(path)
    assert not verdict.passed
    checks = {check.name: check for check in verdict.checks}
    assert re.search(said, checks["structure"].detail)
    assert {checks[name].status for name in ("provider", "macs_agree")} == {"fail"}
    assert {checks[name].status for name in ("classifier", "evaluation", "repeatable", "denormals")} == {"skipped"}


def test_a_file_that_gives_nan_where_it_is_bright_fails_robustness_alone(tmp_path):
    """The square root of what is left up to a brightness that no image as it is reaches."""
    model = load_onnx(exported("chain"), weights=True)
    first = model.graph.node[0].input[0]
    top = float(PREPROCESSING.normalize(np.full((1, 1, 1, 3), 255, np.uint8)).max()) + 0.25
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == first:
                node.input[index] = "checked"
    model.graph.initializer.append(numpy_helper.from_array(np.array(top, np.float32), "top"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    for position, (kind, inputs, output) in enumerate(
        (
            ("Sub", ["top", first], "room"),
            ("Sqrt", ["room"], "root"),
            ("Mul", ["root", "nothing"], "zero"),
            ("Add", [first, "zero"], "checked"),
        )
    ):
        model.graph.node.insert(position, helper.make_node(kind, inputs, [output]))
    path = tmp_path / "bright.onnx"
    onnx.save(model, path)
    assert verify(path).passed
    verdict = verify(path, scope=Scope(robustness=Robustness(images=8, noise_levels=(0.1, 2.0), corruptions=())))
    assert failing(verdict) == {"robustness"}


def test_shifted_labels_fail_without_a_recorded_baseline_too():
    verdict = verify(exported("chain"), make_split(shift=1), baseline_metrics=None)
    assert failing(verdict) == {"min.top1"}
