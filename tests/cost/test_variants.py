"""Variants of an ONNX file have the sizes asked for, run, and keep the operators of the whole file."""

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
from exported import exported

from compress.cost.variants import VariantWriter, site_of
from compress.onnx_file.counting import rows_of
from compress.onnx_file.io import load_onnx
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import build_cost, layer_axes


def _writer(name: str):
    module = nets.build(name)
    groups, _ = find_cuttable(module, nets.EXAMPLE)
    return VariantWriter(load_onnx(exported(name), weights=True)), module, groups


def _run(model: onnx.ModelProto, batch: int = 2) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((batch, 3, 16, 16), np.float32)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.parametrize("name", nets.NAMES)
def test_a_variant_has_the_macs_of_the_network_cut_to_its_widths(name):
    writer, module, groups = _writer(name)
    axes, cost = layer_axes(module, groups), build_cost(module, nets.EXAMPLE, groups, "macs")
    widths = {group: max(found.parts, found.width // 2) for group, found in groups.items()}
    variant = writer.write(axes.sizes(widths), axes.sizes({}))
    onnx.checker.check_model(variant)
    assert widths
    assert sum(row.macs for row in rows_of(variant)) == cost.at(widths) < cost.full
    assert _run(variant).shape == (2, 4)
    before, after = ([node.op_type for node in model.graph.node] for model in (load_onnx(exported(name)), variant))
    assert after == before


@pytest.mark.parametrize("name", nets.NAMES)
def test_the_whole_variant_computes_what_the_file_computes(name):
    writer, *_ = _writer(name)
    assert np.array_equal(_run(writer.write({}, {})), _run(load_onnx(exported(name), weights=True)))


def test_the_file_that_was_read_is_left_as_it_is():
    model = load_onnx(exported("chain"), weights=True)
    before = model.SerializeToString()
    writer = VariantWriter(model)
    writer.write({"body.0.0": (4, 3), "body.1.0": (16, 4)}, {"body.0.0": (8, 3), "body.1.0": (16, 8)})
    assert model.SerializeToString() == before


def test_sites_are_the_layers_with_what_runs_after_them():
    writer, *_ = _writer("residual")
    assert [site.layer for site in writer.sites] == [
        "body.0.0", "body.1.conv1", "body.1.conv2", "body.2.conv1", "body.2.conv2", "head",
    ]  # fmt: skip
    first, second = writer.sites[1], writer.sites[3]
    assert first.kind == second.kind, "layers alike are of one kind, and share what was timed"
    assert writer.sites[2].kind.endswith("+Add +Relu")
    assert (first.sizes, writer.sites[-1].sizes) == ((16, 16), (4, 16))
    assert "depthwise" in _writer("depthwise")[0].sites[1].kind


def test_every_name_of_a_variant_tells_its_site():
    writer, *_ = _writer("residual")
    variant = writer.write({}, {})
    assert [site_of(node.name) for node in variant.graph.node] == sorted(
        site_of(node.name) for node in variant.graph.node
    )
    outputs = [name for node in variant.graph.node[:-1] for name in node.output]
    assert all(site_of(name) is not None for name in outputs)
    assert variant.graph.output[0].name == "logits"
