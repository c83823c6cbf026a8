"""tpp: the Gram term is the gradient of the loss that is written, and decorrelates."""

import nets
import pytest
import torch
from handmade import Bare, Chosen, Pair, setting, train
from torch import nn

from compress.config.schema.methods import GregConfig, TppConfig
from compress.errors import StageError
from compress.pruning.methods.greg import Greg
from compress.pruning.methods.tpp import Tpp, _Kernel, _kernels_of


def _written_loss(weight, factors, gone, strength):
    """The loss of the class docstring, with the target matrix T of the paper in place of the mask."""
    kernels = weight.flatten(1) * factors[:, None]
    gram = kernels @ kernels.T
    target = gram.detach().clone()
    target[gone] = 0
    target[:, gone] = 0
    scale = len(kernels) / (kernels.detach().square().sum() * factors.square().mean())
    return strength * scale * (gram - target).square().sum()


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_the_gradient_is_that_of_the_written_loss(strength):
    module = nets.build("chain")
    method = Tpp(setting(module, Chosen({"body.1.0": (1, 4)}), [1e-6] * 200), TppConfig(ceiling=1e7))
    conv, norm, _ = module.body[1]
    factors = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    weight = conv.weight.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(_written_loss(weight, factors, [1, 4], strength), weight)
    goes = torch.zeros(16, dtype=torch.bool)
    goes[[1, 4]] = True
    (kernel,) = method._kernels["body.1.0"]
    conv.weight.grad = torch.ones_like(conv.weight)
    kernel.add_gradient(goes, strength, rate=1e-6)
    assert torch.allclose(conv.weight.grad - 1, wanted, rtol=1e-3, atol=1e-5)
    assert wanted[0].abs().max() > 0  # what is kept is pulled as well


def test_the_strength_depends_on_neither_width_nor_scale():
    def pull(width, size):
        """The mean pull on a filter as a share of it, of orthogonal-ish filters on orthogonal-ish inputs."""
        layer = nn.Conv2d(width, width, 1, bias=False)
        module = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(width, 4, 1))
        nn.init.orthogonal_(layer.weight, gain=size)
        groups = setting(nn.Sequential(*module, nn.AdaptiveAvgPool2d(1), nn.Flatten()), Chosen({}), [1e-9] * 200).groups
        (kernel,) = _kernels_of(groups["2"])
        goes = torch.zeros(width, dtype=torch.bool)
        goes[0] = True
        kernel.add_gradient(goes, 1.0, rate=1e-9)
        return float((layer.weight.grad[0] / layer.weight.detach()[0]).mean())

    # 4 (W'W) w / (||W||^2 / N) = 4 w where W is orthogonal
    for width, size in ((4, 1.0), (16, 1.0), (16, 3.0)):
        assert pull(width, size) == pytest.approx(4.0, rel=1e-3)


def test_a_step_never_overshoots():
    kernels = torch.ones(8, 3)  # all alike: the largest curvature there is
    factors, gram = torch.full((8, 1), 5.0), kernels @ kernels.T
    for step_size in (1e-6, 1.0, 100.0):
        scale = _Kernel.scale(kernels, factors, gram, step_size)
        assert 4 * scale * step_size * float(torch.linalg.eigvalsh(gram)[-1]) * 25 <= 1 + 1e-4
    assert _Kernel.scale(kernels, factors, gram, 1e-6) == pytest.approx(8 / (24 * 25))


def test_filters_of_different_parts_of_a_grouped_layer_are_not_compared():
    module = nets.build("grouped")
    method = Tpp(setting(module, Chosen({}), [0.05] * 200))
    kernels = [kernel for several in method._kernels.values() for kernel in several]
    (grouped,) = [kernel for kernel in kernels if kernel.rows.parameter is module.body[1][0].weight]
    goes = torch.zeros(16, dtype=torch.bool)
    goes[0] = True
    parts = torch.arange(16) // 4
    slot = int((grouped.rows.channels == 0).nonzero()[0])
    mask = grouped.mask(goes)
    assert torch.equal(mask[slot] > 0, parts[grouped.rows.slots] == parts[grouped.rows.slots[slot]])


def test_what_goes_is_decorrelated_more_than_by_the_penalty_alone():
    def trained(strength):
        module, rates = nets.build("chain"), [0.05] * 200
        options = TppConfig(strength=strength, full_at=0.9)
        method = Tpp(setting(module, Chosen({"body.1.0": tuple(range(6))}), rates), options)
        train(module, method, rates[:60])
        weight = module.body[1][0].weight.detach().flatten(1)
        unit = weight / weight.norm(dim=1, keepdim=True)
        return method, float((unit[:6] @ unit[6:].T).square().mean())

    (method, with_term), (_, without) = trained(2.0), trained(0.0)
    assert with_term < 0.7 * without
    figures = method.metrics()
    assert 0 < figures["cross_gram_after"] < figures["cross_gram_before"]


def test_without_its_term_it_is_greg_of_variant_1():
    def trained(method_class, options):
        module, rates = nets.build("chain"), [0.05] * 120
        train(module, method_class(setting(module, Chosen({"body.1.0": (0, 3)}), rates), options), rates)
        return module.state_dict()

    shared = {"interval": 5, "picked_at": 0.2, "full_at": 0.7}
    ours, theirs = trained(Tpp, TppConfig(strength=0, **shared)), trained(Greg, GregConfig(variant=1, **shared))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_layers_without_a_norm_are_taken_as_they_are():
    module, rates = Bare(), [0.05] * 200
    method = Tpp(setting(module, Chosen({"conv": (1,)}), rates))
    assert [kernel.rows.parameter is module.conv.weight for kernel in method._kernels["conv"]] == [True]
    train(module, method, rates)
    assert method.metrics()["cross_gram_after"] < 0.05 * method.metrics()["cross_gram_before"]


def test_a_run_too_short_for_its_penalty_is_refused():
    with pytest.raises(StageError, match=r"a penalty that grows to 0\.001 brings them to"):
        Tpp(setting(Pair(), Chosen({}), [0.01] * 200), TppConfig(ceiling=0.001))
    with pytest.raises(StageError, match=r"at momentum 0\.5 that takes 24 steps"):
        Tpp(setting(Pair(), Chosen({}), [0.1] * 20))
    with pytest.raises(ValueError, match="picked_at must be below full_at"):
        TppConfig(picked_at=0.7)
    with pytest.raises(ValueError, match="strength"):
        TppConfig(strength=-1)
