"""Networks and a training loop small enough that what a method does to them can be computed by hand."""

import nets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from compress.cost.macs import count_macs
from compress.pruning.methods.base import Setting
from compress.pruning.trial import find_cuttable
from compress.pruning.width_costs import ExpectedCost, build_cost
from compress.training.hooks import OptimizerHooks


class Pair(nn.Module):
    """A convolution of two channels with a batch norm, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.5, 2.0]))
            self.norm.bias.copy_(torch.tensor([0.25, -1.0]))

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Chosen:
    """Lets go what it is told to, and remembers how it was asked."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), []

    def __call__(self, scores, damages=None, closed=(), is_final=False):
        self.calls.append(({name: values.clone() for name, values in scores.items()}, damages, closed, is_final))
        return self.answers[min(len(self.calls), len(self.answers)) - 1]


def setting(module, choose, rates, momentum=0.5, weight_decay=0.0, cost=None, kept=0.5, blocks=None, levels=None):
    groups, _ = find_cuttable(module, torch.zeros(1, 3, 16, 16))
    cost = cost or ExpectedCost(build_cost(module, nets.EXAMPLE, groups, "macs"), count_macs(module, nets.EXAMPLE))
    levels = levels or {name: tuple(range(1, group.width + 1)) for name, group in groups.items()}
    rates = np.asarray(rates, dtype=np.float64)
    return Setting(module, groups, choose, levels, rates, momentum, weight_decay, 0, cost, kept, blocks or {})


def train(module, method, rates, momentum=0.5, weight_decay=0.0, seed=0):
    """Train as the loop does, on random images."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum, weight_decay=weight_decay)
    if isinstance(method, OptimizerHooks):
        method.on_optimizer(optimizer)
    module.train()
    for step, rate in enumerate(rates):
        torch.manual_seed(1000 * seed + step)
        images, labels = torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad(set_to_none=True)
        method.on_step_begin(step)
        F.cross_entropy(module(images), labels).backward()
        method.on_gradients(step)
        optimizer.step()
        method.on_step_end(step)
    return module.eval()


class Bare(nn.Module):
    """A convolution and a depthwise one, both with a bias and without a batch norm, read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.head = nn.Conv2d(4, 4, 1)
        nn.init.constant_(self.depthwise.bias, 1.0)

    def forward(self, x):
        return self.head(F.relu(self.depthwise(F.relu(self.conv(x))))).mean((2, 3))
