"""Files that no run made: written node by node, as other tools may write them, good and unusable ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import smallrun
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compress.errors import DataError, ModelError
from compress.model.artifacts import CheckResult
from compress.onnx_file.counting import count_onnx, layer_rows

SIZE, CLASSES = 16, 4
Shape = Sequence[int | str]


def write(
    path: Path,
    nodes: list[NodeProto],
    *,
    inputs: dict[str, Shape] | None = None,
    outputs: dict[str, Shape] | None = None,
    classes: int = CLASSES,
    domains: tuple[str, ...] = (),
) -> Path:
    """Write a graph with a kernel "k" of one output channel, a head "w" and its bias "b"."""
    random = np.random.default_rng(0)
    arrays = {
        "k": random.normal(size=(CLASSES, 3, 3, 3)).astype(np.float32),
        "w": random.normal(size=(CLASSES, classes)).astype(np.float32),
        "b": np.zeros(classes, np.float32),
    }

    def infos(given: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()]

    graph = helper.make_graph(
        nodes,
        "foreign",
        infos(inputs or {"x": ("N", 3, SIZE, SIZE)}),
        infos(outputs or {"y": ("N", classes)}),
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def classifier(source: str = "x") -> list[NodeProto]:
    return [
        helper.make_node("Conv", [source, "k"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"], name="head"),
    ]


def computed_padding() -> list[NodeProto]:
    """Pad by what is computed from the shape of the input, at which inference from the operators ends."""
    zeros = numpy_helper.from_array(np.zeros(8, np.int64))
    return [
        helper.make_node("Constant", [], ["zeros"], value=zeros),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mul", ["zeros", "whole"], ["pads"]),
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        *classifier("padded"),
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "test.npz"
    np.savez(path, **smallrun.pictures(32, seed=2))
    return path


def verify(path: Path, images: Path, *arguments: str) -> tuple[int, dict[str, CheckResult], str]:
    """Return the exit code, the checks by name and what went to stderr."""
    out = path.with_suffix(".json")
    settings = ("preprocessing.mean=[0.5]", "resources=null", "repeats=4", "warmup=1")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    done = smallrun.call("verify", str(path), "--data", str(images), "--json", str(out), "-q", *flags, *arguments)
    checks = json.loads(out.read_text("utf-8"))["verdict"]["checks"] if out.exists() else []
    return done.exit_code, {check["name"]: CheckResult(**check) for check in checks}, done.stderr


def test_a_file_with_computed_shapes_is_counted_by_running_it(tmp_path: Path) -> None:
    plain = count_onnx(write(tmp_path / "plain.onnx", classifier()))
    computed = count_onnx(write(tmp_path / "computed.onnx", computed_padding()))
    assert plain.macs == SIZE * SIZE * CLASSES * 3 * 9 + CLASSES * CLASSES == computed.macs
    assert plain.layer_weights == computed.layer_weights
    row = next(row for row in layer_rows(tmp_path / "computed.onnx") if row.op == "Conv")
    assert row.output_shape == (1, CLASSES, SIZE, SIZE)


def test_a_graph_whose_shapes_cannot_be_seen_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "open.onnx", classifier(), inputs={"x": ("N", 3, "H", "W")})
    with pytest.raises(ModelError, match=r"Conv node 'conv'\. Input 'x' must have fixed sizes, one of its axes is"):
        count_onnx(path)


def test_a_foreign_classifier_is_verified(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path / "good.onnx", computed_padding())
    code, checks, _ = verify(path, images, "--against", str(path), "--set", "gates.max_drop.top1=0.0")
    assert code == 0
    assert checks["max_drop.top1"].value == 0
    assert checks["evaluation"].value == 32


def two_inputs(path: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "x2"], ["s"]), *classifier("s")]
    shape = ("N", 3, SIZE, SIZE)
    return write(path, nodes, inputs={"x": shape, "x2": shape})


def no_batch_axis(path: Path) -> Path:
    axes = numpy_helper.from_array(np.zeros(1, np.int64))
    nodes = [
        helper.make_node("Constant", [], ["axes"], value=axes),
        helper.make_node("Unsqueeze", ["x", "axes"], ["u"]),
    ]
    return write(path, [*nodes, *classifier("u")], inputs={"x": (3, SIZE, SIZE)}, outputs={"y": (1, CLASSES)})


def no_classifier(path: Path) -> Path:
    return write(path, classifier()[:1], outputs={"c": ("N", CLASSES, SIZE, SIZE)})


def other_size(path: Path) -> Path:
    return write(path, classifier(), inputs={"x": ("N", 3, 32, 32)})


UNUSABLE: list[tuple[Callable[[Path], Path], str]] = [
    (two_inputs, "A classifier must have one input and one output, got 2 and 1."),
    (no_batch_axis, "A network must take a batch of images, 4 axes, the model's input 'x' has 3."),
    (no_classifier, "A classifier must return one (N, classes) array, the model declares ('batch', 4, 16, 16)."),
    (other_size, "Images of split 'evaluation' must be 3 x 32 x 32 after preprocessing for the input 'x', got "
                 "3 x 16 x 16. Hint: preprocessing has resize, crop, layout and channels."),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), UNUSABLE, ids=lambda one: getattr(one, "__name__", ""))
def test_what_is_no_classifier_of_the_images_fails_one_check(
    make: Callable[[Path], Path], expected: str, tmp_path: Path, images: Path
) -> None:
    code, checks, _ = verify(make(tmp_path / "file.onnx"), images, "--set", "gates.min.top1=0.1")
    assert code == 1
    assert (checks["classifier"].status, checks["classifier"].detail) == ("fail", expected)
    assert {checks[name].status for name in ("evaluation", "min.top1")} == {"skipped"}
    assert [name for name, check in checks.items() if check.status == "fail"] == ["classifier"]


def test_an_operator_that_the_runtime_does_not_have_fails(tmp_path: Path, images: Path) -> None:
    nodes = [helper.make_node("Sharpen", ["x"], ["s"], domain="com.example"), *classifier("s")]
    code, checks, _ = verify(write(tmp_path / "custom.onnx", nodes, domains=("com.example",)), images)
    assert code == 1
    assert checks["provider"].status == "fail"
    assert "must be a model that ONNX Runtime can open" in checks["provider"].detail
    assert "Sharpen" in checks["provider"].detail


def test_a_baseline_of_other_classes_is_refused_before_any_long_work(tmp_path: Path, images: Path) -> None:
    other = write(tmp_path / "other.onnx", classifier(), classes=7)
    code, _, said = verify(write(tmp_path / "own.onnx", classifier()), images, "--against", str(other))
    assert code == DataError.exit_code
    assert "File and baseline must tell apart the same classes, got 4 and 7." in said


def test_labels_beyond_the_classes_are_refused(tmp_path: Path, images: Path) -> None:
    code, _, said = verify(write(tmp_path / "two.onnx", classifier(), classes=2), images)
    assert code == DataError.exit_code
    assert "Labels must be from 0 to 1 (the model has 2 classes), got label 3 in split 'evaluation'." in said


def test_an_empty_evaluation_split_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", x=np.zeros((0, SIZE, SIZE, 3), np.uint8), y=np.zeros(0, np.int64))
    code, _, said = verify(write(tmp_path / "own.onnx", classifier()), tmp_path / "none.npz")
    assert code == DataError.exit_code
    assert "must hold at least one image, it holds none." in said


def test_a_provider_that_is_not_there_is_refused(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path / "own.onnx", classifier())
    code, _, said = verify(path, images, "--set", "provider=CUDAExecutionProvider")
    assert code == 5
    assert "CUDAExecutionProvider was asked for" in said


def said(path: Path, target: Path, **values: object) -> Path:
    """Write a file again with what it says of itself."""
    model = onnx.load(path)
    for key, value in values.items():
        model.metadata_props.add(key=f"compress.{key}", value=json.dumps(value))
    onnx.save_model(model, target)
    return target


SAYS: list[tuple[dict[str, object], str | None, str]] = [
    ({}, None, ""),
    ({"preprocessing": {"mean": [0.5]}}, "pass", "as the file says"),
    ({"preprocessing": {"mean": [0.4]}}, "fail", "mean must be (0.4,), got (0.5,)"),
    ({"classes": ["a", "b", "c", "d"]}, "pass", "as the file says"),
    ({"classes": ["d", "c", "b", "a"]}, "fail", "classes must be d, c, b, a ..., got a, b, c, d ..."),
    ({"preprocessing": "none"}, "fail", "The metadata 'compress.preprocessing' and 'compress.classes' must be JSON"),
]


@pytest.mark.parametrize(("says", "status", "detail"), SAYS)
def test_what_the_baselines_file_says_of_images_must_be_so(
    says: dict[str, object], status: str | None, detail: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "test.npz", **smallrun.pictures(16, seed=2), classes=np.array(["a", "b", "c", "d"]))
    path = write(tmp_path / "own.onnx", classifier())
    baseline = said(path, tmp_path / "baseline.onnx", **says)
    code, checks, _ = verify(path, tmp_path / "test.npz", "--against", str(baseline))
    assert code == int(status == "fail")
    assert checks["preprocessing"].status == "skipped"
    if status is None:
        assert "baseline_preprocessing" not in checks
    else:
        assert checks["baseline_preprocessing"].status == status
        assert checks["baseline_preprocessing"].detail.startswith(detail)


def broken_head(path: Path) -> Path:
    """Write a file whose bias is not a number."""
    model = onnx.load(write(path, classifier()))
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.full(CLASSES, np.nan, np.float32), "b"))
    onnx.save_model(model, path)
    return path


def test_a_baseline_that_gives_nan_is_named(tmp_path: Path, images: Path) -> None:
    path, baseline = write(tmp_path / "own.onnx", classifier()), broken_head(tmp_path / "base.onnx")
    code, _, told = verify(path, images, "--against", str(baseline))
    assert code == 3
    assert f"Baseline '{baseline}': Outputs of the network must be finite" in told
    code, checks, told = verify(baseline, images, "--against", str(path))
    assert (code, checks["evaluation"].status) == (1, "fail")
    assert "Baseline" not in checks["evaluation"].detail + told


def test_a_baseline_that_takes_other_images_is_named(tmp_path: Path, images: Path) -> None:
    code, _, told = verify(write(tmp_path / "own.onnx", classifier()), images, "--against",
                           str(other_size(tmp_path / "base.onnx")))  # fmt: skip
    assert code == 3
    assert f"Baseline '{tmp_path / 'base.onnx'}': Images of split 'evaluation' must be 3 x 32 x 32" in told


@pytest.mark.parametrize("whose", ["file", "baseline"])
def test_a_fixed_batch_says_whose_it_is_and_how_to_measure_it(whose: str, tmp_path: Path, images: Path) -> None:
    plain = write(tmp_path / "plain.onnx", classifier())
    fixed = write(tmp_path / "fixed.onnx", classifier(), inputs={"x": (4, 3, SIZE, SIZE)}, outputs={"y": (4, CLASSES)})
    path, against = (fixed, plain) if whose == "file" else (plain, fixed)
    code, _, told = verify(path, images, "--against", str(against))
    assert code == 2
    assert f"verify.batch_size must be 4, the fixed batch size of the {whose}, got 1." in told
    assert "Hint: batch_size: 4 in the file of gates, or in the verify stage of a pipeline" in told
    assert verify(path, images, "--against", str(against), "--set", "batch_size=4")[0] == 0


def test_weights_that_are_cut_short_fail_the_verdict_and_are_told_to_ci(tmp_path: Path, images: Path) -> None:
    path, junit = write(tmp_path / "own.onnx", computed_padding()), tmp_path / "out.xml"
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="own.data", size_threshold=0)
    assert verify(path, images)[0] == 0
    (tmp_path / "own.data").write_bytes((tmp_path / "own.data").read_bytes()[:100])
    code, checks, _ = verify(path, images, "--junit", str(junit))
    assert code == 1
    assert checks["structure"].status == "fail"
    assert "its weights in 'own.data' must be" in checks["structure"].detail
    assert "structure" in junit.read_text("utf-8")


def test_the_limit_of_parity_holds_without_torch_too(tmp_path: Path, images: Path) -> None:
    """It is what a file may differ by from itself, from the evaluator and from other places."""
    path = write(tmp_path / "own.onnx", classifier())
    also = "also=[{runtime: onnx_reference, provider: CPU}]"
    code, checks, _ = verify(path, images, "--set", "gates.parity=1e-12", "--set", also)
    assert code == 1
    assert {checks[name].limit for name in ("repeatable", "reference_evaluator", "also.onnx_reference")} == {1e-12}
    failed = {name for name, check in checks.items() if check.status == "fail"}
    assert failed == {"reference_evaluator", "also.onnx_reference"}
