"""MACs of single ONNX nodes, by hand, and of whole files next to torch."""

import string

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multiplying import EXAMPLE, build
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.cost.macs import count_products, counts_agree
from compress.exporting.settings import ExportSettings
from compress.exporting.torch_onnx import export_onnx
from compress.model.artifacts import Signature, TensorSpec
from compress.onnx_file.counting import count_onnx
from compress.onnx_file.node_macs import einsum_macs, find_products, is_counted


def products(op: str, inputs: dict[str, tuple[int, ...]], output: tuple[int, ...], domain: str = "", **attributes):
    """Return (MACs, operands, repeats) of each product of one node."""
    node = helper.make_node(op, list(inputs), ["y"], domain=domain, **attributes)
    shapes = {**inputs, "y": output}
    return [(one.macs, one.operands, one.repeats) for one in find_products(node, lambda name: shapes[name])]


def write(path, nodes, inputs, weights):
    """Write a graph by hand; inputs are name -> shape."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "graph", values, results, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def weight(name, *shape):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


MS = "com.microsoft"


@pytest.mark.parametrize(
    ("op", "inputs", "output", "attributes", "macs"),
    [
        ("Conv", {"x": (1, 3, 9), "w": (4, 3, 2)}, (1, 4, 8), {}, 32 * 6),
        ("Conv", {"x": (1, 6, 5, 5), "w": (4, 3, 2, 2)}, (1, 4, 4, 4), {"group": 2}, 64 * 12),
        ("Conv", {"x": (1, 2, 3, 4, 5), "w": (7, 2, 1, 2, 3)}, (1, 7, 3, 3, 3), {}, 189 * 12),
        ("ConvTranspose", {"x": (1, 3, 4, 4), "w": (3, 5, 2, 2)}, (1, 5, 8, 8), {"strides": [2, 2]}, 48 * 20),
        ("ConvInteger", {"x": (1, 3, 9), "w": (4, 3, 2)}, (1, 4, 8), {}, 32 * 6),
        ("DeformConv", {"x": (1, 3, 5, 5), "w": (4, 3, 2, 2), "o": (1, 8, 4, 4)}, (1, 4, 4, 4), {}, 64 * 12),
        ("Gemm", {"x": (2, 7), "w": (7, 5)}, (2, 5), {}, 70),
        ("Gemm", {"x": (7, 2), "w": (5, 7)}, (2, 5), {"transA": 1, "transB": 1}, 70),
        ("MatMul", {"x": (2, 3, 7), "w": (7, 5)}, (2, 3, 5), {}, 210),
        ("MatMul", {"x": (7,), "w": (7, 5)}, (5,), {}, 35),
        ("MatMul", {"x": (7,), "w": (7,)}, (), {}, 7),
        ("MatMulInteger", {"x": (2, 7), "w": (7, 5)}, (2, 5), {}, 70),
        ("FusedMatMul", {"x": (4, 7, 2), "w": (4, 7, 5)}, (4, 2, 5), {"domain": MS, "transA": 1}, 280),
        ("FusedConv", {"x": (1, 3, 9), "w": (4, 3, 2)}, (1, 4, 8), {"domain": MS}, 32 * 6),
        ("Einsum", {"x": (2, 3), "w": (3, 5)}, (2, 5), {"equation": "ij,jk"}, 30),
    ],
)
def test_products_of_a_node_by_hand(op, inputs, output, attributes, macs) -> None:
    assert products(op, inputs, output, **attributes) == [(macs, tuple(inputs)[:2], 1)]


def test_quantised_operators_have_scales_between_their_operands() -> None:
    conv = {"x": (1, 3, 9), "xs": (), "xz": (), "w": (4, 3, 2), "ws": (), "wz": (), "ys": (), "yz": ()}
    assert products("QLinearConv", conv, (1, 4, 8)) == [(32 * 6, ("x", "w"), 1)]
    product = {"x": (2, 7), "xs": (), "xz": (), "w": (7, 5), "ws": (), "wz": (), "ys": (), "yz": ()}
    assert products("QLinearMatMul", product, (2, 5)) == [(70, ("x", "w"), 1)]


@pytest.mark.parametrize("op", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("layout", [0, 1])
def test_recurrent_nodes_read_the_weight_of_the_hidden_state_at_each_step(op: str, layout: int) -> None:
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[op]
    x = (2, 5, 7) if layout else (5, 2, 7)  # 2 images, 5 steps
    inputs = {"x": x, "w": (2, gates * 4, 7), "r": (2, gates * 4, 4)}
    assert products(op, inputs, (5, 2, 2, 4), layout=layout, hidden_size=4) == [
        (10 * 2 * gates * 28, ("x", "w"), 1),
        (10 * 2 * gates * 16, ("x", "r"), 5),
    ]


def test_attention_is_two_products() -> None:
    flat = {"q": (1, 5, 12), "k": (1, 7, 12), "v": (1, 7, 8)}
    assert products("Attention", flat, (1, 5, 8), q_num_heads=2, kv_num_heads=2) == [
        (5 * 12 * 7, ("q", "k"), 1),
        (5 * 8 * 7, ("q", "v"), 1),
    ]
    assert products("MultiHeadAttention", flat, (1, 5, 8), MS, num_heads=2) == [
        (5 * 12 * 7, ("q", "k"), 1),
        (5 * 8 * 7, ("q", "v"), 1),
    ]
    heads = {"q": (1, 2, 5, 6), "k": (1, 2, 7, 6), "v": (1, 2, 7, 4), "m": (), "pk": (1, 2, 3, 6), "pv": (1, 2, 3, 4)}
    assert [macs for macs, *_ in products("Attention", heads, (1, 2, 5, 4))] == [60 * 10, 40 * 10]


def test_attention_of_onnx_runtime_projects_first() -> None:
    inputs = {"x": (2, 5, 8), "w": (8, 24), "b": (24,)}
    assert products("Attention", inputs, (2, 5, 8), MS, num_heads=2) == [
        (2 * 5 * 8 * 24, ("x", "w"), 1),
        (2 * 25 * 16, ("x", "x"), 1),
    ]
    inputs = {"x": (2, 5, 8), "w": (8, 20)}
    assert [one[0] for one in products("Attention", inputs, (2, 5, 4), MS, qkv_hidden_sizes=[8, 8, 4])] == [
        2 * 5 * 8 * 20, 2 * 25 * 12,
    ]  # fmt: skip


@pytest.mark.parametrize(("op", "domain"), [("Relu", ""), ("Conv", "somebody.else"), ("GRU", "ai.onnx.ml")])
def test_other_operators_count_nothing(op: str, domain: str) -> None:
    assert products(op, {"x": (1, 3, 4, 4), "w": (3, 3, 1, 1)}, (1, 3, 4, 4), domain) == []
    assert not is_counted(helper.make_node(op, ["x"], ["y"], domain=domain))


@pytest.mark.parametrize("domain", ["", "ai.onnx", MS])
def test_is_counted_knows_the_domains(domain: str) -> None:
    assert is_counted(helper.make_node("MatMul", ["x", "w"], ["y"], domain=domain))


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 120),
        ("ij,jk", [(3, 4), (4, 5)], 60),
        ("ij,ij->", [(3, 4), (3, 4)], 12),
        ("ij,ij->ij", [(3, 4), (3, 4)], 0),
        ("i,j->ij", [(3,), (4,)], 0),
        ("ij->i", [(3, 4)], 0),
        ("ij,k->k", [(3, 4), (5,)], 0),
        ("bx,jk->b", [(2, 3), (4, 5)], 0),
        ("...ij,...jk->...ik", [(2, 7, 3, 4), (7, 4, 5)], 840),
        ("...i,ij", [(2, 3), (3, 4)], 24),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 24 + 40),
        ("ij,jk,jl->ikl", [(2, 3), (3, 4), (3, 5)], 2 * 3 * 4 * 5),
        ("bij , bjk -> bik", [(1, 3, 4), (2, 4, 5)], 120),
        ("ij,jk->ik", [(3, 1), (1, 5)], 0),
    ],
)
def test_einsum_by_hand(equation: str, shapes: list[tuple[int, ...]], macs: int) -> None:
    assert einsum_macs(equation, shapes) == macs


class _Einsum(nn.Module):
    def __init__(self, equation: str, others: list[torch.Tensor]) -> None:
        super().__init__()
        self.equation, self.others = equation, others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, x, *self.others)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_einsum_counts_what_torch_computes(data) -> None:
    count = data.draw(st.integers(2, 3))
    letters = string.ascii_lowercase[:5]
    sizes = {letter: data.draw(st.integers(1, 4)) for letter in letters}
    terms = [
        "".join(data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=4, unique=True)))
        for _ in range(count)
    ]
    output = data.draw(st.lists(st.sampled_from(sorted(set("".join(terms)))), unique=True))
    equation = f"{','.join(terms)}->{''.join(output)}"
    shapes = [tuple(sizes[letter] for letter in term) for term in terms]
    first, *others = [torch.ones(shape) for shape in shapes]
    with torch.backends.opt_einsum.flags(enabled=False):
        counted = sum(count_products(_Einsum(equation, others), first).macs.values())
    assert einsum_macs(equation, shapes) == counted, equation


def test_a_recurrent_node_in_a_file_counts_its_weights_once_for_each_step(tmp_path) -> None:
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=4)
    path = write(tmp_path / "m.onnx", [node], {"x": [5, 1, 7]}, [weight("w", 1, 12, 7), weight("r", 1, 12, 4)])
    counts = count_onnx(path)
    assert counts.macs == 5 * (84 + 48) // 5  # the first axis, 5, is taken for the batch
    assert counts.layer_weights == 84 + 5 * 48


def test_a_product_of_constants_counts_one_of_them(tmp_path) -> None:
    nodes = [
        helper.make_node("MatMul", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["x", "c"], ["h"]),
        helper.make_node("MatMul", ["h", "x"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 3, 3]}, [weight("a", 3, 4), weight("b", 4, 3)])
    counts = count_onnx(path)
    assert counts.macs == 36 + 27 + 27
    assert counts.layer_weights == 12 + 9


def test_what_follows_from_shapes_alone_is_constant(tmp_path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Expand", ["q", "s"], ["e"]),
        helper.make_node("MatMul", ["e", "x"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 3, 3]}, [weight("q", 1, 3, 1)])
    assert count_onnx(path).layer_weights == 9


@pytest.mark.parametrize("name", ["gru", "attention"])
def test_an_exported_file_has_the_macs_and_weights_of_torch(name: str, tmp_path) -> None:
    module, _ = build(name)
    path = tmp_path / "m.onnx"
    signature = Signature((TensorSpec("images", (1, 3, 8, 8), "float32"),), (TensorSpec("y", (1, 4), "float32"),))
    export_onnx(module, signature, path, ExportSettings(opset=18))
    counts, file = count_products(module, EXAMPLE), count_onnx(path)
    assert file.macs == sum(counts.macs.values())
    assert counts_agree(file.layer_weights, counts.weights + counts.constant_weights, counts.constant_weights)
