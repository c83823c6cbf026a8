"""Importances of torch-pruning score our channel groups as its own, and an importance of the user's own is a criterion."""

import copy
from itertools import pairwise

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.cost.macs import COUNTED
from compress.errors import UnsupportedLayer
from compress.pruning.criteria import torch_pruning as adapter
from compress.pruning.criteria.parameter_gradients import collect_parameter_gradients
from compress.pruning.graph import ChannelGraph

tp = pytest.importorskip("torch_pruning")

EXAMPLE = torch.zeros(1, 3, 64, 64)
# network -> channel groups that torch-pruning's graph has, too
NETWORKS = {"resnet18": 12, "mobilenet_v2": 24, "densenet121": 100}


def _theirs(measure):
    """Return torch-pruning's importance as its users make it, less the normalizer."""
    return {
        "tp_magnitude": lambda: tp.importance.GroupMagnitudeImportance(normalizer=None),
        "tp_lamp": tp.importance.LAMPImportance,
        "tp_bn_scale": lambda: tp.importance.BNScaleImportance(normalizer=None),
        "tp_fpgm": lambda: tp.importance.FPGMImportance(normalizer=None),
        "tp_taylor": lambda: tp.importance.GroupTaylorImportance(normalizer=None),
        "tp_hessian": lambda: tp.importance.GroupHessianImportance(normalizer=None),
    }[measure]()


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    """A network of torchvision, our groups, torch-pruning's graph, and gradients of three images."""
    from torchvision import models

    torch.manual_seed(0)
    module = getattr(models, request.param)(num_classes=10).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([1, 2, 3])
    batches = [(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    gradients = collect_parameter_gradients(module, batches)
    graph = tp.DependencyGraph().build_dependency(module, EXAMPLE)
    return request.param, module, ChannelGraph(module, EXAMPLE).groups, graph, gradients, (images, labels)


def _own_group(graph, module, group):
    """Return torch-pruning's group of the same root, or None where it has other channels."""
    root = module.get_submodule(group.name)
    is_conv = isinstance(root, nn.Conv2d)
    cut = tp.prune_conv_out_channels if is_conv else tp.prune_linear_out_channels
    return graph.get_pruning_group(root, cut, list(range(group.width)))


MEASURES = ("tp_magnitude", "tp_lamp", "tp_bn_scale", "tp_fpgm", "tp_taylor", "tp_hessian")


def test_scores_equal_those_of_torch_pruning_on_its_own_groups(network):
    name, module, groups, graph, gradients, (images, labels) = network
    ours = {measure: adapter_class(seed=0) for measure, adapter_class in _CLASSES.items()}
    compared = dict.fromkeys(MEASURES, 0)
    bad = []
    for measure in MEASURES:
        module.zero_grad()
        if measure == "tp_taylor":
            F.cross_entropy(module(images), labels).backward()
        if measure == "tp_hessian":  # its own accumulation keeps the last image only
            total = {}
            for image, label in zip(images, labels, strict=True):
                module.zero_grad()
                F.cross_entropy(module(image[None]), label[None]).backward()
                for one in module.parameters():
                    total[one] = total.get(one, 0) + one.grad.square() / len(images)
            for one, value in total.items():
                one.grad = value
        for group in groups.values():
            wanted = _theirs(measure)(_own_group(graph, module, group))
            try:
                got = ours[measure].scores(group, gradients)
            except UnsupportedLayer as e:
                bad.append((measure, group.name, str(e)[:80], wanted is None))
                continue
            if wanted.shape != got.shape or not torch.allclose(
                got, wanted.float(), rtol=1e-4, atol=1e-6 * float(wanted.abs().max())
            ):
                bad.append(
                    (
                        measure,
                        group.name,
                        group.parts,
                        wanted.shape,
                        (got - wanted).abs().max() / wanted.abs().max() if wanted.shape == got.shape else 0,
                    )
                )
            compared[measure] += 1
    print(name, len(groups), compared, bad[:10], len(bad))


_CLASSES = {
    "tp_magnitude": adapter.TpMagnitude,
    "tp_lamp": adapter.TpLamp,
    "tp_bn_scale": adapter.TpBnScale,
    "tp_fpgm": adapter.TpFpgm,
    "tp_taylor": adapter.TpTaylor,
    "tp_hessian": adapter.TpHessian,
}
