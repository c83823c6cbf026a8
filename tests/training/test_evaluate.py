"""Top-1 is the share of right answers, and outputs that are no classifier's are refused."""

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import DataError, ModelError
from compress.progress import SilentProgress
from compress.tasks.classification import CLASSIFICATION
from compress.training.evaluate import evaluate_quality


class _ReadsPixel(nn.Module):
    """Answers the class that the first pixel says."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 5).float()


def _split(answers: list[int], labels: list[int]) -> Split:
    images = np.zeros((len(answers), 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = answers
    source = ArraySource(images, np.asarray(labels, np.int64))
    return Split("evaluation", source, np.arange(len(answers)), Preprocessing(scale=1.0, channels="L"))


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_top1_is_the_share_of_right_answers(batch_size: int) -> None:
    split = _split([0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 0, 0, 4])
    assert evaluate_quality(_ReadsPixel(), split, batch_size) == pytest.approx(4 / 7)


def test_progress_hears_of_every_image() -> None:
    class Counting(SilentProgress):
        seen = 0

        def advance(self, amount: int = 1, **fields: str) -> None:
            self.seen += amount

        def task(self, label: str, total: int):  # type: ignore[no-untyped-def]
            assert (label, total) == ("top-1 on evaluation", 5)
            return _Entered(self)

    class _Entered:
        def __init__(self, task: Counting) -> None:
            self.task = task

        def __enter__(self) -> Counting:
            return self.task

        def __exit__(self, *details: object) -> None: ...

    progress = Counting()
    evaluate_quality(_ReadsPixel(), _split([0] * 5, [0] * 5), 2, progress)
    assert progress.seen == 5


def test_training_flags_statistics_and_gradients_are_left_alone() -> None:
    network = nets.build("residual").train()
    network.body[1].bn1.eval()
    modes = [part.training for part in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    split = Split("evaluation", ArraySource(images, np.zeros(6, np.int64)), np.arange(6), Preprocessing())
    evaluate_quality(network, split)
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_flags_are_restored_when_evaluation_fails() -> None:
    network = nn.Sequential(_ReadsPixel()).train()
    with pytest.raises(DataError, match=r"below the number of classes the network has \(5\), got label 7"):
        evaluate_quality(network, _split([0, 1], [0, 7]))
    assert network.training


def test_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="Split 'evaluation' must hold at least one image"):
        evaluate_quality(_ReadsPixel(), _split([], []))


@pytest.mark.parametrize(
    ("outputs", "got"),
    [(torch.zeros(2, 3, 4), r"\(2, 3, 4\)"), (torch.zeros(2), r"\(2,\)"), ((torch.zeros(2, 3),), "tuple")],
)
def test_outputs_that_are_no_classifiers_are_refused(outputs: object, got: str) -> None:
    with pytest.raises(ModelError, match=rf"must return one \(N, classes\) tensor, got {got}"):
        CLASSIFICATION.check(outputs, torch.zeros(1))


def test_largest_label_must_be_below_the_classes() -> None:
    CLASSIFICATION.check(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(DataError, match="got label 3"):
        CLASSIFICATION.check(torch.zeros(2, 3), torch.tensor([3, 0]))
