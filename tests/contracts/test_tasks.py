"""Every registered task keeps the task contract, and so does one of a user's own."""

import pytest
import taskworld
import torch
import torch.nn.functional as F

from compress.catalog import GATED, TASKS
from compress.tasks.base import Task
from compress.tasks.classification import Classification
from compress.tasks.detection import Detection
from compress.tasks.imitation import Embedding, Imitation
from compress.tasks.regression import Regression
from compress.tasks.segmentation import Segmentation
from compress.testing import TaskCase, TaskContract


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _classification() -> TaskCase:
    labels = torch.arange(8) % 3
    return TaskCase("classification", Classification(), _draw(8, 3), labels, F.one_hot(labels, 3).float())


def _segmentation() -> TaskCase:
    masks = torch.arange(8 * 16).reshape(8, 4, 4) % 3
    best = F.one_hot(masks, 3).permute(0, 3, 1, 2).float()
    return TaskCase("segmentation", Segmentation(), _draw(8, 3, 4, 4), masks, best)


def _detection(learns: bool) -> TaskCase:
    task = Detection(taskworld.find_boxes, taskworld.box_loss if learns else None).sized(16, 16)
    boxes = torch.tensor([[2.0, 2, 8, 8], [4, 4, 12, 10], [1, 1, 5, 5], [6, 2, 14, 9]])
    targets = [{"boxes": box[None], "labels": torch.tensor([place % 2])} for place, box in enumerate(boxes)]
    best = torch.cat([boxes / 16, 9 * F.one_hot(torch.arange(4) % 2, 2)], 1)
    return TaskCase("detection", task, best + _draw(4, 6), targets, best)


def _regression() -> TaskCase:
    targets = _draw(8, 2, seed=1)
    return TaskCase("regression", Regression(), _draw(8, 2), targets, targets)


def _imitation(task: Imitation, *shape: int) -> TaskCase:
    wanted = _draw(8, *shape, seed=1)
    return TaskCase(task.name, task, _draw(8, *shape), wanted, wanted)


CASES = {
    "classification": _classification,
    "segmentation": _segmentation,
    "detection": lambda: _detection(True),
    "detection without a loss": lambda: _detection(False),
    "regression": _regression,
    "embedding": lambda: _imitation(Embedding(), 5),
    "classification without labels": lambda: _imitation(Imitation(Classification()), 4),
    "segmentation without labels": lambda: _imitation(Imitation(Segmentation()), 3, 4, 4),
    "own": lambda: TaskCase("own", taskworld.Share(), _draw(8, 1), _draw(8, seed=1), _draw(8, 1, seed=1)),
}


@pytest.fixture(params=CASES, scope="module")
def task_case(request):
    return CASES[request.param]()


class TestTasks(TaskContract):
    pass


def test_every_registered_task_has_a_case_and_gates():
    assert set(TASKS) <= set(CASES)
    assert set(GATED) == set(TASKS)
    assert [TASKS.get(name).name for name in TASKS] == list(TASKS)


class _CountsBackwards(Regression):
    """Breaks the contract: it states the wrong direction."""

    higher_is_better = True


class _ForgetsImages(Segmentation):
    """Breaks the contract: facts of the first image only."""

    def facts(self, outputs, targets):
        return {name: values[:1] for name, values in super().facts(outputs, targets).items()}


class _NeverRests(Regression):
    """Breaks the contract: equal outputs are apart."""

    def distance(self, outputs, wanted, temperature=1.0):
        return super().distance(outputs, wanted, temperature) + 1


@pytest.mark.parametrize(
    ("make", "task", "promise", "match"),
    [
        (_regression, _CountsBackwards(), "test_best_outputs_are_no_worse", "at best"),
        (_segmentation, _ForgetsImages(), "test_facts_have_an_entry_for_each_image", "1 entries for 8"),
        (_regression, _NeverRests(), "test_distance_is_0_of_equal_outputs_alone", "not 0"),
    ],
)
def test_the_contract_catches_a_task_that_breaks_it(make, task, promise, match):
    case = make()
    with pytest.raises(AssertionError, match=match):
        getattr(TaskContract(), promise)(TaskCase("broken", task, case.outputs, case.targets, case.best))


def test_a_task_that_lacks_its_methods_says_so():
    with pytest.raises(NotImplementedError, match="must have a method loss"):
        Task().loss(None, None)
    with pytest.raises(NotImplementedError, match="must have a method metrics"):
        Task().metrics(None, None)
