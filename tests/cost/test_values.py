"""Costs by hand: layers behind concatenations, products of torch operations, sites, conditions of a machine."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from compress.allocation.costs import Axis
from compress.cost import conditions
from compress.cost.latency_table import Entry, Fill, LatencyTable, Sample, build_table, latency_cost
from compress.cost.macs import find_products
from compress.cost.variants import Site, _kind, _layer_cuts
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_file.io import at_sizes
from compress.onnx_file.node_macs import einsum_macs
from compress.pruning.width_costs import LayerAxes

# layers that three groups narrow --------------------------------------------------------------------------------------

LEVELS = dict.fromkeys("abc", (1, 3, 4))
SUM = Axis(12, {"a": 1, "b": 1, "c": 1})
HALF = Axis(6, {"a": 0.5, "b": 0.5, "c": 0.5})
TABLE = LatencyTable(
    {"k": {(12, 12): Entry(9.0, 0.0, 1), (12, 6): Entry(5.0, 0.0, 1), (7, 7): Entry(2.5, 0.0, 1)}},
    0.9,
    -0.02,
    0.0,
    {"k": Fill({3: 1.0, 6: 1.5, 12: 4.0}, 0.5, 0.1)},
    1,
)
NARROWED = {
    "outputs alone": (SUM, Axis(6)),
    "inputs alone": (Axis(12), SUM),
    "both alike": (SUM, SUM),
    "both apart": (SUM, HALF),
}


@pytest.mark.parametrize("switch", [None, "block"])
@pytest.mark.parametrize("axes", NARROWED.values(), ids=NARROWED)
def test_a_layer_narrowed_by_three_groups_costs_what_the_table_predicts(axes, switch):
    out, inp = axes
    site = Site("layer", "k", (round(out.size), round(inp.size)), False)
    cost = latency_cost(TABLE, [site], {"layer": axes}, LEVELS, {"layer": switch} if switch else None)
    sizes_of = LayerAxes({"layer": axes}, dict.fromkeys("abc", 4)).sizes
    seen = set()
    for options in itertools.product(range(3), repeat=3):
        choice = dict(zip("abc", options, strict=True))
        sizes = sizes_of({name: LEVELS[name][option] for name, option in choice.items()})
        wanted = TABLE.network_ms([site], sizes)
        assert cost.at({**choice, "block": 1}) == pytest.approx(wanted, rel=1e-12)
        if switch:
            assert cost.at({**choice, "block": 0}) == pytest.approx(TABLE.network_ms([], {}), abs=1e-12)
        seen.add(round(wanted, 9))
    assert len(seen) >= 6


def test_an_entry_is_the_mean_of_its_sites_with_the_scatter_of_the_worst():
    sites = (Site("a", "k", (8, 8), False), Site("b", "k", (8, 8), False))
    samples = [
        Sample({}, {0: 1.0, 1: 3.0}, {0: 0.1, 1: 0.3}, 4.0),
        Sample({"a": (4, 8)}, {0: 0.5, 1: 5.0}, {0: 0.2, 1: 0.1}, 5.5),
    ]
    table = build_table(sites, samples)
    assert table.entries == {"k": {(4, 8): Entry(0.5, 0.2, 1), (8, 8): Entry(3.0, 0.3, 3)}}


# products of torch operations -----------------------------------------------------------------------------------------


def check(name, arguments, result, *wanted):
    """Compare products with (MACs, operands, axes); operands and axes by identity."""
    found = find_products(name, arguments, result)
    assert [one.macs for one in found] == [macs for macs, _, _ in wanted]
    for one, (_, operands, axes) in zip(found, wanted, strict=True):
        assert all(have is want for have, want in zip(one.operands, operands, strict=True))
        assert [(id(tensor), axis) for tensor, axis in one.axes] == [(id(tensor), axis) for tensor, axis in axes]


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("groups", "transposed", "image", "weight", "result", "macs", "follows_inputs"),
    [
        (1, False, (1, 3, 5, 5), (4, 3, 2, 2), (1, 4, 4, 4), 64 * 12, True),
        (1, True, (1, 3, 4, 4), (3, 5, 2, 2), (1, 5, 8, 8), 48 * 20, True),
        (2, False, (1, 6, 5, 5), (4, 3, 2, 2), (1, 4, 4, 4), 64 * 12, True),
        (6, False, (1, 6, 5, 5), (6, 1, 2, 2), (1, 6, 4, 4), 96 * 4, False),
        (6, True, (1, 6, 4, 4), (6, 1, 2, 2), (1, 6, 8, 8), 96 * 4, False),
        (6, True, (1, 6, 4, 4), (6, 2, 2, 2), (1, 12, 8, 8), 96 * 8, True),
    ],
)
def test_convolutions_by_hand(groups, transposed, image, weight, result, macs, follows_inputs):
    image, weight, result = zeros(*image), zeros(*weight), zeros(*result)
    arguments = {"input": image, "weight": weight, "transposed": transposed, "groups": groups}
    axes = [(result, 1), (image, 1)] if follows_inputs else [(result, 1)]
    check("convolution", arguments, result, (macs, (image, weight), axes))


def test_deformable_convolutions_by_hand():
    image, weight, result = zeros(1, 3, 5, 5), zeros(4, 3, 2, 2), zeros(1, 4, 4, 4)
    wanted = (64 * 12, (image, weight), [(result, 1), (image, 1)])
    check("deform_conv2d", {"input": image, "weight": weight}, result, wanted)


def test_matrix_products_by_hand():
    left, right, vector, result = zeros(2, 3, 4), zeros(2, 4, 5), zeros(4), zeros(2, 3, 5)
    axes = [(left, 0), (left, 1), (left, 2), (result, 2)]
    check("bmm", {"self": left, "mat2": right}, result, (120, (left, right), axes))
    check("baddbmm", {"batch1": left, "batch2": right}, result, (120, (left, right), axes))
    matrix = zeros(3, 4)
    check("mv", {"self": matrix, "vec": vector}, zeros(3), (12, (matrix, vector), [(matrix, 0), (matrix, 1)]))
    check("dot", {"self": vector, "tensor": vector}, zeros(), (4, (vector, vector), [(vector, 0)]))
    assert find_products("relu", {"self": left}, left) == ()


def test_attention_by_hand():
    query, key, value = zeros(2, 3, 5, 8), zeros(2, 3, 7, 8), zeros(2, 3, 7, 4)
    rows = [(query, 0), (query, 1), (query, 2)]
    name, arguments = "_scaled_dot_product_flash_attention_for_cpu", {"query": query, "key": key, "value": value}
    scores = (30 * 7 * 8, (query, key), [*rows, (query, 3), (key, 2)])
    sums = (30 * 7 * 4, (query, value), [*rows, (key, 2), (value, 3)])
    check(name, arguments, zeros(2, 3, 5, 4), scores, sums)


def test_recurrent_layers_by_hand():
    """Inputs are multiplied once for all steps, the hidden state once a step."""
    inputs, from_input, from_hidden = zeros(3, 2, 5), zeros(16, 5), zeros(16, 4)
    arguments = {"input": inputs, "weight0": from_input, "weight1": from_hidden}
    step = (2 * 64, (inputs, from_hidden), [(from_hidden, 0), (from_hidden, 1)])
    once = (3 * 2 * 80, (inputs, from_input), [(inputs, 2), (from_input, 0)])
    check("mkldnn_rnn_layer", arguments, None, once, step, step, step)


def test_bilinear_layers_by_hand():
    left, weight, right = zeros(2, 3), zeros(4, 3, 5), zeros(2, 5)
    arguments = {"i1": left, "i2": weight, "i3": right, "expand1": [1, 3], "expand2": [0], "sumdim": [2, 3]}
    rest = [(left, 0), (weight, 0)]
    first = (2 * 60, (left, weight), [*rest, (left, 1), (right, 1)])
    second = (2 * 4 * 5, (left, right), [*rest, (right, 1)])
    check("_trilinear", arguments, zeros(2, 4), first, second)
    assert find_products("_trilinear", {**arguments, "sumdim": [3]}, zeros(2, 4)) == ()


# kinds of sites -------------------------------------------------------------------------------------------------------


def test_a_kind_tells_all_that_time_depends_on_besides_sizes():
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 1], group=8, auto_pad="VALID", alpha=0.5)
    assert _kind(conv, True, (1, 8, 5, 7), ("Relu", "Add")) == "Conv depthwise strides=2x1 input=5x7 +Relu +Add"
    assert _kind(conv, False, (1, 8, 9), ()) == "Conv group=8 strides=2x1 input=9"
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    assert _kind(gemm, False, (1, 8), ()) == _kind(gemm, False, None, ()) == "Gemm transB=1"


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "sizes", "cuts", "is_depthwise"),
    [
        ("Conv", (8, 3, 2, 2), {}, (8, 3), [(0, 0, 1), (1, 1, 1)], False),
        ("Conv", (8, 3, 2, 2), {"group": 2}, (8, 6), [(0, 0, 1), (1, 1, 2)], False),
        ("Conv", (8, 1, 2, 2), {"group": 8}, (8, 8), [(0, 0, 1)], True),
        ("ConvTranspose", (6, 4, 2, 2), {}, (4, 6), [(0, 1, 1), (1, 0, 1)], False),
        ("ConvTranspose", (6, 4, 2, 2), {"group": 2}, (8, 6), [(0, 1, 2), (1, 0, 1)], False),
        ("Gemm", (5, 7), {"transB": 1}, (5, 7), [(0, 0, 1), (1, 1, 1)], False),
        ("Gemm", (7, 5), {"transB": 0}, (5, 7), [(0, 1, 1), (1, 0, 1)], False),
        ("MatMul", (7, 5), {}, (5, 7), [(0, 1, 1), (1, 0, 1)], False),
    ],
)
def test_constants_follow_the_sides_of_their_layer(op, shape, attributes, sizes, cuts, is_depthwise):
    node = helper.make_node(op, ["x", "w", "b"], ["y"], **attributes)
    arrays = {"w": np.zeros(shape, np.float32), "b": np.zeros(sizes[0], np.float32)}
    out, inp, found, depthwise = _layer_cuts(node, "layer", arrays)
    assert ((out, inp), depthwise) == (sizes, is_depthwise)
    assert [(name, cut.layer, cut.side, cut.axis, cut.divisor) for name, cut in found] == [
        *(("w", "layer", *cut) for cut in cuts),
        ("b", "layer", 0, 0, 1),
    ]


def test_times_that_were_measured_are_found_in_whatever_order_they_stand():
    entries = {(out, inp): Entry(float(10 * out + inp), 0.0, 1) for out in (9, 2, 5) for inp in (3, 8, 1)}
    table = LatencyTable({"k": entries}, 1.0, 0.0, 0.0, {"k": Fill({1: 1.0, 9: 1.0}, 1.0, 0.0)})
    assert {pair: table.site_ms("k", *pair) for pair in entries} == {p: e.milliseconds for p, e in entries.items()}
    assert table.site_ms("k", 9, 9) == table.site_ms("k", 4, 3) == 1.0


# the machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "machine", "instructions", "vnni"),
    [
        ("model name\t: A CPU\nflags\t\t: sse2 avx2 avx512f avx512_vnni\n", "A CPU", "avx2,avx512f,avx512_vnni", True),
        ("model name\t: A CPU\nflags\t\t: sse2 avx2\nmodel name\t: Another\n", "A CPU", "avx2", False),
        ("model name : B\nFeatures : fp asimd\n", "B", "asimd", None),
        ("vendor : none\n", None, "", None),
    ],
)
def test_the_machine_is_read_from_what_linux_says(tmp_path: Path, monkeypatch, text, machine, instructions, vnni):
    path = tmp_path / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(conditions, "_CPU_INFO", path)
    found = conditions.present_conditions("onnxruntime", "CPUExecutionProvider", 2, 3, "fp16")
    assert conditions.has_vnni() is vnni
    if machine is not None:
        assert found.machine == machine
    assert found.instructions == instructions
    assert (found.provider, found.threads, found.batch_size, found.precision) == ("CPUExecutionProvider", 2, 3, "fp16")
    assert found.runtime.startswith("onnxruntime ")
    assert found.cores >= 1


def test_a_machine_that_tells_nothing_is_named_by_python(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(conditions, "_CPU_INFO", tmp_path / "nowhere")
    assert conditions.has_vnni() is None
    assert conditions.present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1).machine


def test_conditions_differ_by_name_and_have_a_key_of_their_own():
    here = conditions.present_conditions("onnxruntime", "CPUExecutionProvider", 1, 1)
    there = replace(here, threads=4, precision="fp16")
    assert here.differences(here) == []
    assert here.differences(there) == ["threads 1 here, 4 in the table", "precision fp32 here, fp16 in the table"]
    assert here.key == replace(there, threads=1, precision="fp32").key != there.key


# sizes ----------------------------------------------------------------------------------------------------------------


def test_open_axes_get_the_sizes_of_their_names_and_others_stay_open():
    image, mask = TensorSpec("image", ("batch", 3, "height", "width")), TensorSpec("mask", ("batch", "height"))
    found = at_sizes(Signature((image, mask), (mask,)), {"height": 32})
    assert [spec.shape for spec in found.inputs] == [("batch", 3, 32, "width"), ("batch", 32)]
    assert found.outputs == (mask,)


def test_operands_of_an_einsum_must_have_the_axes_that_it_names():
    assert einsum_macs("ij,jk->ik", [(2, 3), (3, 5)]) == 30
    for shapes in ([(2, 3)], [(2, 3), (3, 5), (5, 5)]):
        with pytest.raises(ValueError, match="zip"):
            einsum_macs("ij,jk->ik", shapes)
