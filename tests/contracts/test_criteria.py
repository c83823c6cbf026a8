"""Every registered criterion keeps the criterion contract on each of the tiny networks."""

import nets
import pytest
import torch

from compress.catalog import CRITERIA
from compress.pruning.criteria.gradient_flow import Grasp, Snip
from compress.pruning.criteria.greedy_loss import GreedyLoss
from compress.pruning.criteria.magnitude import L1, L2, BnScale, Random
from compress.pruning.criteria.pfp import Pfp, Sipp
from compress.pruning.criteria.reconstruction import Greedy, GreedyRefit, Lasso, Reconstruction
from compress.pruning.criteria.taylor import Taylor
from compress.pruning.criteria.torch_pruning import (
    TpBnScale,
    TpFpgm,
    TpHessian,
    TpLamp,
    TpMagnitude,
    TpRandom,
    TpTaylor,
)
from compress.testing import CriterionCase, CriterionContract


@pytest.fixture(params=nets.NAMES, scope="module")
def criterion_case(request):
    return CriterionCase(request.param, nets.build(request.param), nets.images(8), torch.arange(8) % 4)


class TestL1(CriterionContract):
    criterion_class = L1


class TestL2(CriterionContract):
    criterion_class = L2


class TestBnScale(CriterionContract):
    criterion_class = BnScale


class TestTaylor(CriterionContract):
    criterion_class = Taylor


class TestReconstruction(CriterionContract):
    criterion_class = Reconstruction


class TestRandom(CriterionContract):
    criterion_class = Random


class TestGreedy(CriterionContract):
    criterion_class = Greedy


class TestGreedyRefit(CriterionContract):
    criterion_class = GreedyRefit


class TestGreedyLoss(CriterionContract):
    criterion_class = GreedyLoss


class TestLasso(CriterionContract):
    criterion_class = Lasso


class TestGrasp(CriterionContract):
    criterion_class = Grasp


class TestSnip(CriterionContract):
    criterion_class = Snip


class TestPfp(CriterionContract):
    criterion_class = Pfp


class TestSipp(CriterionContract):
    criterion_class = Sipp


class TestTpMagnitude(CriterionContract):
    criterion_class = TpMagnitude


class TestTpFpgm(CriterionContract):
    criterion_class = TpFpgm


class TestTpLamp(CriterionContract):
    criterion_class = TpLamp


class TestTpTaylor(CriterionContract):
    criterion_class = TpTaylor


class TestTpHessian(CriterionContract):
    criterion_class = TpHessian


class TestTpBnScale(CriterionContract):
    criterion_class = TpBnScale


class TestTpRandom(CriterionContract):
    criterion_class = TpRandom


SUITES = (
    TestL1,
    TestL2,
    TestBnScale,
    TestTaylor,
    TestReconstruction,
    TestRandom,
    TestGreedy,
    TestGreedyRefit,
    TestGreedyLoss,
    TestLasso,
    TestGrasp,
    TestSnip,
    TestPfp,
    TestSipp,
    TestTpMagnitude,
    TestTpFpgm,
    TestTpLamp,
    TestTpTaylor,
    TestTpHessian,
    TestTpBnScale,
    TestTpRandom,
)


def test_every_registered_criterion_has_a_contract_class():
    assert {CRITERIA.get(name) for name in CRITERIA} == {suite.criterion_class for suite in SUITES}
    assert [CRITERIA.get(name).name for name in CRITERIA] == list(CRITERIA)
    assert len(SUITES) >= 5


def test_the_contract_has_its_size():
    promises = [name for name in dir(CriterionContract) if name.startswith("test_")]
    assert len(promises) >= 6
    assert len(nets.NAMES) == 6


class _ScoresByPosition(L1):
    """Breaks the contract: a channel's score is where it stands."""

    def scores(self, group, stats):
        return torch.arange(group.width, dtype=torch.float32)


class _ChangesWeights(L1):
    """Breaks the contract: it writes into the network."""

    def scores(self, group, stats):
        with torch.no_grad():
            group.producers[0].module.weight.mul_(0.5)
        return super().scores(group, stats)


class _ForgetsTheLastChannel(L1):
    """Breaks the contract: one score is missing."""

    def scores(self, group, stats):
        return super().scores(group, stats)[:-1]


@pytest.mark.parametrize(
    ("criterion", "promise", "match"),
    [
        (_ScoresByPosition, "test_permuted_channels_have_permuted_scores", "scores .* apart"),
        (_ScoresByPosition, "test_equal_channels_have_equal_scores", "scores .* apart"),
        (_ChangesWeights, "test_network_is_left_as_it_is", "changed"),
        (_ChangesWeights, "test_scores_are_the_same_twice", "other scores the second time"),
        (_ForgetsTheLastChannel, "test_scores_are_one_finite_number_a_channel", r"shape \(7,\)"),
    ],
)
def test_the_contract_catches_a_criterion_that_breaks_it(criterion, promise, match):
    suite = type("Broken", (CriterionContract,), {"criterion_class": criterion})()
    case = CriterionCase("chain", nets.build("chain"), nets.images(8), torch.arange(8) % 4)
    with pytest.raises(AssertionError, match=match):
        getattr(suite, promise)(case)
