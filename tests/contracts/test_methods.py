"""Every registered training-time method keeps the method contract on each of the tiny networks."""

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.catalog import METHODS
from compress.pruning.methods.csgd import Csgd
from compress.pruning.methods.gates import Gates
from compress.pruning.methods.grda import Grda
from compress.pruning.methods.greg import Greg
from compress.pruning.methods.gsm import Gsm
from compress.pruning.methods.increg import IncReg
from compress.pruning.methods.regrow import Regrow
from compress.pruning.methods.tpp import Tpp
from compress.pruning.shortcuts import write_out_shortcuts
from compress.testing import MethodCase, MethodContract

PADDED = "padded"


class _Padded(nn.Module):
    """A residual block with a zero-padded shortcut from 8 to 16 channels, and a block behind it on the same stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.block, self.head = nets.ResidualBlock(16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(branch + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(self.block(x).mean((2, 3)))


def _case(name):
    if name != PADDED:
        return MethodCase(name, nets.build(name), nets.images(16), torch.arange(16) % 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Padded()
    module = nn.Sequential(module)
    assert write_out_shortcuts(module, nets.EXAMPLE) == 1
    return MethodCase(name, module.eval(), nets.images(16), torch.arange(16) % 4)


@pytest.fixture(params=[*nets.NAMES, PADDED], scope="module")
def method_case(request):
    return _case(request.param)


class TestGsm(MethodContract):
    method_class = Gsm


class TestGates(MethodContract):
    method_class = Gates


class TestGreg(MethodContract):
    method_class = Greg


class TestIncReg(MethodContract):
    method_class = IncReg


class TestCsgd(MethodContract):
    method_class = Csgd


class TestGrda(MethodContract):
    method_class = Grda


class TestRegrow(MethodContract):
    method_class = Regrow


class TestTpp(MethodContract):
    method_class = Tpp


SUITES = (TestGsm, TestGates, TestGreg, TestIncReg, TestCsgd, TestGrda, TestRegrow, TestTpp)


def test_every_registered_method_has_a_contract_class():
    assert {METHODS.get(name) for name in METHODS} == {suite.method_class for suite in SUITES}
    assert [METHODS.get(name).name for name in METHODS] == list(METHODS)
    assert len(SUITES) >= 8


def test_the_contract_has_its_size():
    promises = [name for name in dir(MethodContract) if name.startswith("test_")]
    assert len(promises) >= 7
    assert len(nets.NAMES) == 6


class _LeavesWhatGoes(Gsm):
    """Breaks the contract: what goes is not brought down."""

    def on_gradients(self, step):
        self.observe(step)


class _ForgetsWhatGoes(Gsm):
    """Breaks the contract: its state is not all of it."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "chosen": {}})


class _LeavesAHook(Gates):
    """Breaks the contract: its hooks stay."""

    def finish(self):
        self.gates._hooks.pop_all()
        super().finish()


class _ChoosesForItself(Gsm):
    """Breaks the contract: less goes than was chosen."""

    @property
    def removed(self):
        return dict(list(self.chosen.items())[:1])


@pytest.mark.parametrize(
    ("method", "promise", "match"),
    [
        (_LeavesWhatGoes, "test_the_cut_changes_next_to_nothing", "outputs move by"),
        (_ForgetsWhatGoes, "test_a_run_goes_on_from_its_state", "differs|other channels"),
        (_LeavesAHook, "test_hooks_are_taken_off", "a hook is left"),
        (_ChoosesForItself, "test_what_goes_is_what_was_chosen_last", "channels go by"),
    ],
)
def test_the_contract_catches_a_method_that_breaks_it(method, promise, match):
    suite = type("Broken", (MethodContract,), {"method_class": method})()
    case = MethodCase("chain", nets.build("chain"), nets.images(16), torch.arange(16) % 4)
    with pytest.raises(AssertionError, match=match):
        getattr(suite, promise)(case)
