"""What tasks measure is what it should be, on outputs with known answers; and what is refused is refused in words."""

import sys

import numpy as np
import pytest
import taskworld
import torch
from torch import nn

from compress.data.batches import Augmentation, evaluation_batches, training_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.annotated import AnnotatedSource
from compress.data.splits import Split
from compress.errors import ConfigValueError, DataError, ModelError, NonFinite
from compress.tasks.base import Metric, Task
from compress.tasks.detection import Detection
from compress.tasks.from_config import own_task
from compress.tasks.imitation import Imitation
from compress.tasks.outputs import named, plain
from compress.tasks.regression import Regression
from compress.tasks.segmentation import Segmentation
from compress.training import epochs as epochs_module
from compress.training.evaluate import evaluate_loss, evaluate_quality
from compress.training.loop import fit
from compress.training.settings import FitSettings, TrainingData
from compress.verification.task_metrics import Measured, changes_of_measured, estimate_measured

PLAIN = Preprocessing(scale=1.0)


def _one_hot(masks: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[masks].transpose(0, 3, 1, 2)


def test_miou_is_the_mean_over_classes_and_leaves_out_what_is_ignored():
    there = np.array([[[0, 0, 1, 1], [2, 2, 255, 255]]])
    said = np.array([[[0, 1, 1, 1], [2, 0, 0, 1]]])
    task = Segmentation()
    figures = task.aggregate(task.facts(_one_hot(said, 3), there))
    assert figures["miou"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert figures["pixel_accuracy"] == pytest.approx(4 / 6)
    without_ones = Segmentation(ignore_index=1)
    facts = without_ones.facts(_one_hot(said, 3)[:, :, :1], there[:, :1])
    assert without_ones.aggregate(facts)["miou"] == pytest.approx((1 / 2 + 0) / 2)


def test_miou_of_all_images_is_no_mean_over_images():
    there = np.array([[[0, 0]], [[0, 1]]])
    said = np.array([[[0, 0]], [[0, 0]]])
    task = Segmentation()
    figures = task.aggregate(task.facts(_one_hot(said, 2), there))
    assert figures["miou"] == pytest.approx((3 / 4 + 0) / 2)


def test_images_with_nothing_to_be_found_have_no_figure_and_do_not_pass_for_equal():
    masks = np.full((2, 3, 3), 255)
    pixels = Segmentation()
    boxes = Detection(lambda outputs, size: [])
    nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
    there = np.empty(1, object)
    there[0] = nothing
    found = np.empty(1, object)
    found[0] = {"boxes": np.ones((1, 4)), "scores": np.ones(1), "labels": np.zeros(1, np.int64)}
    for task, facts in (
        (pixels, pixels.facts(np.zeros((2, 2, 3, 3), np.float32), masks)),
        (boxes, {"found": found, "there": there}),
    ):
        with pytest.raises(NonFinite, match=f"Metric '{task.metric}' .* got nan") as raised:
            _ = Measured(task, facts).value
        assert "without anything to find" in raised.value.hint


def test_pixels_that_are_ignored_teach_nothing():
    masks = torch.full((2, 3, 3), 255)
    outputs = torch.randn(2, 4, 3, 3)
    task = Segmentation()
    assert float(task.loss(outputs, masks)) == 0
    masks[0, 0, 0] = 2
    assert float(task.loss(outputs, masks)) == pytest.approx(
        float(nn.functional.cross_entropy(outputs[:1, :, 0, 0], torch.tensor([2])))
    )


@pytest.mark.parametrize(
    ("outputs", "targets", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4, 4).long(), ModelError, r"must return \(N, classes, H, W\)"),
        (torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 4).long(), ModelError, r"size of the masks \(4 x 4\), got 2 x 2"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), DataError, r"from 0 to 2 .* or 255, got 3"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), DataError, r"must be masks, an array of 3 axes"),
    ],
)
def test_a_network_that_does_not_segment_is_refused(outputs, targets, error, match):
    with pytest.raises(error, match=match):
        Segmentation().check(outputs, targets)


def test_regression_takes_a_column_for_numbers():
    task = Regression()
    facts = task.facts(np.array([[1.0], [3.0]]), np.array([0.0, 3.0]))
    assert task.aggregate(facts) == {"rmse": pytest.approx(0.5**0.5), "mae": 0.5}
    with pytest.raises(ModelError, match="as there are targets, 3 an image, got 2"):
        task.check(np.zeros((2, 2)), np.zeros((2, 3)))


def test_which_value_is_better_is_the_metrics_to_say():
    more, less = Metric("a"), Metric("b", higher_is_better=False)
    assert more.is_better(2, 1)
    assert not more.is_better(1, 1)
    assert less.is_better(1, 2)
    assert more.is_better(0, float("nan"))
    assert not less.is_better(float("nan"), 5)


def test_an_interval_holds_the_value_and_changes_are_paired():
    random = np.random.default_rng(0)
    wanted = random.normal(size=(200, 2))
    task = Regression()
    before, after = (
        Measured(task, task.facts(wanted + random.normal(0, spread, wanted.shape), wanted)) for spread in (0.1, 0.3)
    )
    rmse = estimate_measured(after)["rmse"]
    assert rmse.low < rmse.value < rmse.high
    changes = changes_of_measured(before, after)
    assert changes["rise.rmse"].value == -changes["drop.rmse"].value == after.value - before.value > 0
    assert changes["rise.rmse"].low == -changes["drop.rmse"].high
    same = changes_of_measured(after, after)["drop.rmse"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_outputs_of_every_form_have_names():
    one = np.zeros((2, 3))
    assert list(named(one, ("logits",))) == ["logits"]
    assert list(named((one, one), ("a", "b"))) == ["a", "b"]
    assert plain({"mask": one}) is one
    for wrong in (3, None, (one, 3), {}):
        with pytest.raises(ModelError, match="must return tensors"):
            named(wrong)


def test_a_users_file_that_is_no_task_is_refused(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(
        "import compress\nclass Nothing: pass\nclass Nameless(compress.Task): pass\n"
        "class Broken(compress.Task):\n    def __init__(self): raise ValueError('no threshold')\n"
    )
    for name, match in (
        ("Nothing", "must be a compress.Task, got Nothing"),
        ("Nameless", "its metric is empty"),
        ("Broken", "must open, got ValueError: no threshold"),
        ("Missing", "must have a callable 'Missing'"),
    ):
        with pytest.raises(ModelError, match=match):
            own_task(f"{file}:{name}", {})
    with pytest.raises(ModelError, match=r"Task file '.*nowhere\.py' does not exist"):
        own_task(f"{tmp_path}/nowhere.py:Task", {})


def test_a_task_that_does_not_measure_its_metric_is_refused():
    class Forgetful(Task):
        metric = "wanted"

        def metrics(self, outputs, targets):
            return {"other": 1.0}

    task = Forgetful()
    with pytest.raises(ModelError, match="must measure its metric 'wanted', its metrics are other"):
        task.aggregate(task.facts(np.zeros((2, 1)), np.zeros(2)))


def test_methods_of_a_users_own_task_know_the_size_of_images(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(
        "import copy\nimport compress\nclass Mine(compress.Task):\n    metric = 'height'\n    height = 0\n"
        "    def sized(self, height, width):\n        one = copy.copy(self)\n        one.height = height\n"
        "        return one\n"
        "    def metrics(self, outputs, targets): return {'height': self.height / (len(targets) - 1)}\n"
    )
    task = own_task(f"{file}:Mine", {}).sized(8, 6).sized(8, 9)
    assert task.aggregate(task.facts(np.zeros((2, 1)), np.zeros(2))) == {"height": 8}
    with pytest.raises(ModelError, match=r"Method 'metrics' of task .*got ZeroDivisionError"):
        task.aggregate(task.facts(np.zeros((1, 1)), np.zeros(1)))


def test_errors_of_a_users_own_methods_are_shown_with_ours_around_them(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(
        "import compress\nclass Mine(compress.Task):\n    metric = 'a'\n"
        "    def loss(self, outputs, targets): return outputs.nothing\n"
        "    def metrics(self, outputs, targets): return {'a': 1 / (len(targets) - 2)}\n"
        "class List(Mine):\n    def metrics(self, outputs, targets): return [1]\n"
        "class Nan(Mine):\n    def metrics(self, outputs, targets): return {'a': float('nan')}\n"
    )
    task = own_task(f"{file}:Mine", {})
    facts = task.facts(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ModelError, match=r"Method 'metrics' of task .*got ZeroDivisionError: division by zero"):
        task.aggregate(facts)
    with pytest.raises(ModelError, match=r"Method 'loss' of task .*got AttributeError: .*'nothing'"):
        task.image_losses(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ModelError, match="must be a mapping, got list"):
        own_task(f"{file}:List", {}).aggregate(facts)
    with pytest.raises(NonFinite, match="Metric 'a' of the task must be a finite number, got nan"):
        _ = Measured(own_task(f"{file}:Nan", {}), facts).value


def test_a_users_task_is_guarded_in_a_subclass_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_task_of_one_object.py").write_text(
        "import compress\nclass Mine(compress.Task):\n    metric = 'a'\n"
        "    def metrics(self, outputs, targets): return {'a': 1 / 0}\n"
        "TASK = Mine()\ndef make(): return TASK\n"
    )
    tasks = [own_task("my_task_of_one_object:make", {}) for _ in range(2)]
    module = sys.modules.pop("my_task_of_one_object")
    assert type(module.TASK) is module.Mine
    for task in tasks:
        assert type(task).__bases__ == (module.Mine,)
        with pytest.raises(ModelError, match="Method 'metrics' of task 'my_task_of_one_object:make'"):
            task.aggregate(task.facts(np.zeros((2, 1)), np.zeros(2)))


class _WithAuxiliary(nn.Module):
    """A segmentation network that returns two outputs, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = taskworld.Segmenter(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return {"out": self.main(x), "aux": self.side(x)}


def test_a_network_with_several_outputs_is_judged_by_the_first_and_imitated_in_all():
    images, masks, *_ = taskworld.squares(20, 1)
    images = (images / 64 - 2).astype(np.float32)
    several = taskworld.seeded(_WithAuxiliary)
    split = _split(images, masks, Segmentation())
    assert evaluate_quality(several, split) == evaluate_quality(several.main, split)
    assert evaluate_loss(several, split) == pytest.approx(evaluate_loss(several.main, split))
    teacher = taskworld.seeded(_WithAuxiliary)
    with torch.no_grad():
        teacher.side.weight.mul_(-3.0)
    imitated = _split(images, None, Imitation(Segmentation()), teacher)
    before = evaluate_loss(several, imitated)
    fit(several, TrainingData(imitated, imitated), FitSettings(epochs=4, batch_size=10, learning_rate=0.1))
    assert evaluate_loss(several, imitated) < before
    named_split = _split(images, masks, _Named())
    assert evaluate_quality(several, named_split) == 2.0


class _Named(Task):
    """Says how many outputs it is given by name."""

    metric = "outputs"
    is_share = False

    def metrics(self, outputs, targets):
        return {"outputs": float(len({"out", "aux"} & set(outputs)))}


def _split(images: np.ndarray, targets: np.ndarray | None, task: Task, original: nn.Module | None = None) -> Split:
    read = None if targets is None else (lambda place: targets[place])
    source = AnnotatedSource(len(images), lambda place: images[place], read)
    return Split("train", source, np.arange(len(images)), PLAIN, task, None if original is None else lambda: original)


def test_masks_and_boxes_are_varied_with_their_images():
    _, masks, boxes, _ = taskworld.squares(24, 3)
    marked = masks[..., None].repeat(3, -1).astype(np.uint8)  # the image shows its own mask
    varied = Augmentation(crop_padding=3, flip=True)
    split = _split(marked, masks, Segmentation())
    ((x, y),) = training_batches(split, 24, varied, 0, 0)
    counted = y != 255
    assert not counted.all()
    assert torch.equal(x[:, 0].long()[counted], y[counted])
    assert not torch.equal(y, torch.from_numpy(masks))
    source = AnnotatedSource(24, lambda place: marked[place], lambda place: {
        "boxes": boxes[place : place + 1], "labels": np.zeros(1, np.int64)
    })  # fmt: skip
    split = Split("train", source, np.arange(24), PLAIN, Detection(taskworld.find_boxes, taskworld.box_loss))
    ((x, targets),) = training_batches(split, 24, varied, 0, 0)
    seen = 0
    for image, target in zip(x[:, 0], targets, strict=True):
        rows, columns = torch.nonzero(image, as_tuple=True)
        for left, top, right, bottom in target["boxes"].tolist():
            got = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            assert got == (left, top, right, bottom)
            seen += 1
    assert seen == 24


def test_without_labels_the_untouched_network_says_what_is_learned():
    images, *_ = taskworld.squares(20, 1)
    original = taskworld.seeded(taskworld.Segmenter)
    split = _split(images, None, Imitation(Segmentation()), original)
    batch = next(evaluation_batches(split, 20))
    with torch.no_grad():
        assert torch.equal(batch[1], original(batch[0]))
    assert evaluate_quality(original, split) == 1.0
    assert evaluate_loss(original, split) == pytest.approx(0, abs=1e-6)
    other = taskworld.seeded(taskworld.Segmenter, seed=1)
    assert evaluate_quality(other, split) < 1
    assert evaluate_loss(other, split) > 0.01


def test_what_is_learned_without_labels_comes_nearer_to_the_original():
    images, *_ = taskworld.squares(64, 1)
    original = taskworld.seeded(taskworld.Segmenter)
    split = _split((images / 64 - 2).astype(np.float32), None, Imitation(Segmentation()), original)
    with torch.no_grad():
        original.head.weight.mul_(20)
    student = taskworld.seeded(taskworld.Segmenter, seed=1)
    before = evaluate_loss(student, split)
    result = fit(student, TrainingData(split, split), FitSettings(epochs=3, batch_size=16, learning_rate=0.05))
    assert evaluate_loss(student, split) < 0.5 * before
    assert evaluate_quality(student, split) == max(epoch.validation for epoch in result.epochs)
    assert not any(parameter.device.type != "cpu" for parameter in original.parameters())


def test_less_is_better_where_the_task_says_so(monkeypatch):
    images, masks, *_ = taskworld.squares(32, 1)
    split = _split(images, (masks > 0).mean((1, 2)).astype(np.float32), Regression())
    told = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(epochs_module, "measure_quality", lambda *_, **__: (next(told), None))
    module = taskworld.Reader()
    result = fit(module, TrainingData(split, split), FitSettings(epochs=3, batch_size=16, learning_rate=0.001))
    assert result.chosen_epoch == 2


def test_mixing_is_refused_without_classes():
    images, masks, *_ = taskworld.squares(32, 1)
    split = _split(images, masks, Segmentation())
    with pytest.raises(ConfigValueError, match="cutmix must be 0 where targets are no class indices"):
        fit(taskworld.Segmenter(), TrainingData(split, split), FitSettings(augmentation=Augmentation(cutmix=1.0)))


LOSSES = """
import torch, compress
class Base(compress.Task):
    metric = "found"
    def metrics(self, outputs, targets): return {"found": 1.0}
class Fine(Base):
    def loss(self, outputs, targets): return (outputs - targets).square().mean()
class Each(Base):
    def loss(self, outputs, targets): return (outputs - targets).square()
class Number(Base):
    def loss(self, outputs, targets): return (outputs - targets).square().mean().detach().item()
class Cut(Base):
    def loss(self, outputs, targets): return (outputs.detach() - targets).square().mean()
"""


def test_a_loss_of_the_users_own_is_one_number_with_gradients(tmp_path):
    file = tmp_path / "losses.py"
    file.write_text(LOSSES)
    outputs, targets = torch.ones(4, requires_grad=True), torch.zeros(4)
    assert float(own_task(f"{file}:Fine", {}).loss(outputs, targets).detach()) == 1.0
    with torch.no_grad():  # as images are judged
        assert float(own_task(f"{file}:Fine", {}).loss(outputs, targets)) == 1.0
    for name, match in (
        ("Each", r"must return a scalar torch tensor, got shape \(4,\)"),
        ("Number", "must return a scalar torch tensor, got float"),
        ("Cut", "must depend on the outputs in a way that has gradients"),
    ):
        for method in ("loss", "training_loss"):
            with pytest.raises(ModelError, match=match):
                getattr(own_task(f"{file}:{name}", {}), method)(outputs, targets, *([0.0] if method != "loss" else []))


@pytest.mark.parametrize("name", ["distances", "distance"])
def test_without_labels_a_users_own_distance_is_what_is_learned_and_measured(tmp_path, name):
    file = tmp_path / "task.py"
    said = {"distances": "(outputs - wanted).abs().flatten(1).sum(1)", "distance": "(outputs - wanted).abs().sum()"}
    extra = ", temperature=1.0" if name == "distance" else ""
    file.write_text(
        f"import compress\nclass Mine(compress.Task):\n    metric = 'a'\n"
        f"    def {name}(self, outputs, wanted{extra}):\n        return {said[name]}\n"
    )
    outputs, wanted = np.arange(6.0).reshape(3, 2), np.zeros((3, 2))
    imitation = Imitation(own_task(f"{file}:Mine", {}))
    facts = imitation.facts(outputs, wanted)
    assert facts["distance"].tolist() == [1.0, 5.0, 9.0]
    assert imitation.aggregate(facts)["distance"] == 5.0
    losses = imitation.image_losses(torch.from_numpy(outputs), torch.from_numpy(wanted))
    assert losses.tolist() == [1.0, 5.0, 9.0]


def test_without_labels_a_users_task_that_says_no_distance_is_measured_by_all_outputs(tmp_path):
    file = tmp_path / "task.py"
    file.write_text("import compress\nclass Mine(compress.Task):\n    metric = 'a'\n")
    outputs, wanted = np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])
    for task in (own_task(f"{file}:Mine", {}), Task()):
        imitation = Imitation(task)
        assert imitation.aggregate(imitation.facts(outputs, wanted))["distance"] == pytest.approx(5 / 4)


def test_a_task_of_an_earlier_revision_is_aggregated_by_its_figures(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(
        "import compress\nclass Mine(compress.Task):\n    metric = 'a'\n"
        "    def facts(self, outputs, targets): return {'n': targets}\n"
        "    def figures(self, facts): return {'a': float(facts['n'].sum())}\n"
        "class Newer(Mine):\n    def aggregate(self, facts): return {'a': -1.0}\n"
    )
    targets = np.arange(4)
    assert own_task(f"{file}:Mine", {}).aggregate({"n": targets}) == {"a": 6.0}
    assert own_task(f"{file}:Newer", {}).aggregate({"n": targets}) == {"a": -1.0}
