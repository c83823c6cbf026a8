"""Feature maps of the same name and shape are compared, each once, and training by them learns and resumes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import apply_edits
from compress.data.batches import Augmentation
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ModelError
from compress.lowrank.surgery import factorized_copy
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.progress import SilentProgress, SilentTask
from compress.pruning.surgery import cut_copy, remove_block
from compress.pruning.survival import surviving_channels
from compress.training.feature_maps import MapPairs
from compress.training.loop import fit
from compress.training.settings import Distillation, FitSettings, TrainingData
from compress.training.state import StateFile

SETTINGS = FitSettings(epochs=3, batch_size=16, learning_rate=0.05, augmentation=Augmentation(1, True))


def _split(name: str = "train", count: int = 64) -> Split:
    images = np.random.default_rng(len(name)).integers(0, 256, (count, 16, 16, 3), np.uint8)
    wanted = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Split(name, ArraySource(images, np.arange(count) % 4), np.arange(count), wanted)


def _hooks(network: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules())


def _outputs(network: nn.Module, part: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(part).register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    network(images)
    handle.remove()
    return seen[0]


def _difference(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    with MapPairs(student, teacher, _split()) as pairs, torch.no_grad():
        student(images)
        teacher(images)
        return float(pairs.difference())


@pytest.mark.parametrize("name", nets.NAMES)
def test_equal_networks_do_not_differ(name):
    assert _difference(nets.build(name), nets.build(name), nets.images()) == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("chain", ("body.0", "body.1", "body")),
        ("residual", ("body.0", "body.1", "body")),
        ("concat", ("body.left", "body.right", "body.join")),
        ("linear_head", ("features.0", "features")),
    ],
)
def test_difference_is_the_mean_of_relative_squared_differences(name, parts):
    student, teacher, images = nets.build(name, 1), nets.build(name, 2), nets.images(6)
    by_hand = []
    with torch.no_grad():
        for part in parts:
            ours, theirs = (_outputs(network, part, images) for network in (student, teacher))
            by_hand.append(float(((ours - theirs) ** 2).sum() / (theirs**2).sum()))
    assert len(set(by_hand)) == len(parts)
    found = _difference(student, teacher, images)
    assert found == pytest.approx(np.mean(by_hand), rel=1e-5)
    backwards = _difference(teacher, student, images)
    assert found != pytest.approx(backwards, rel=1e-3), "shares are of the teacher's"


def test_a_map_of_zeros_divides_nothing_by_zero():
    student, teacher = nets.build("chain", 1), nets.build("chain", 2)
    with torch.no_grad():
        for norm in (teacher.body[2][1], student.body[2][1]):
            norm.weight.zero_()
            norm.bias.fill_(-1.0)
    assert np.isfinite(_difference(student, teacher, nets.images()))


def test_of_parts_that_give_the_same_tensor_the_outermost_counts():
    networks = nets.build("chain"), nets.build("chain")
    assert sorted(MapPairs(*networks, _split()).names) == ["body", "body.0", "body.1"]
    residual = nets.build("residual"), nets.build("residual")
    assert sorted(MapPairs(*residual, _split()).names) == ["body", "body.0", "body.1"]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())))
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.outer(x).mean((2, 3)))

    assert MapPairs(Wrapped(), Wrapped(), _split()).names == ("outer",)


def test_maps_of_other_shapes_are_not_compared():
    teacher = nets.build("residual")
    inner = cut_copy(teacher, {"body.1.conv1": (0, 3, 5)}, nets.EXAMPLE)  # narrower inside a block only
    assert sorted(MapPairs(inner, teacher, _split()).names) == ["body", "body.0", "body.1"]
    chain = nets.build("chain")
    slim = cut_copy(chain, {"body.0.0": (1, 2)}, nets.EXAMPLE)
    pairs = MapPairs(slim, chain, _split())
    assert sorted(pairs.names) == ["body", "body.1"]
    images = nets.images()
    with torch.no_grad():
        by_hand = [
            float(((ours - theirs) ** 2).sum() / (theirs**2).sum())
            for ours, theirs in (
                (_outputs(slim, part, images), _outputs(chain, part, images)) for part in ("body", "body.1")
            )
        ]
    assert _difference(slim, chain, images) == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_factorised_layers_and_removed_blocks_leave_the_other_maps():
    teacher = nets.build("residual")
    factorised, _ = factorized_copy(teacher, [Factorize("body.1.conv1", "nc", (4,))])
    assert isinstance(factorised.body[1].conv1, nn.Sequential)
    assert sorted(MapPairs(factorised, teacher, _split()).names) == ["body", "body.0", "body.1"]
    shorter = remove_block(copy.deepcopy(teacher), RemoveBlock("body.1"))
    names = MapPairs(shorter, teacher, _split()).names
    assert "body.1" not in names
    assert "body" in names
    assert _difference(shorter, teacher, nets.images()) > 0


def test_networks_with_nothing_in_common_are_refused_with_a_way_out():
    teacher = nets.build("chain")
    slim = cut_copy(teacher, {"body.0.0": (1,), "body.1.0": (2,), "body.2.0": (3,)}, nets.EXAMPLE)
    with pytest.raises(ModelError, match=r"of the same name and shape as the baseline's .*, it has none\.") as caught:
        MapPairs(slim, teacher, _split())
    assert caught.value.hint == "Set distillation.features to 0."
    assert _hooks(slim) == _hooks(teacher) == 0
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with pytest.raises(ModelError):
        MapPairs(flat, copy.deepcopy(flat), _split())


@pytest.mark.parametrize("is_training", [True, False])
def test_looking_for_maps_changes_neither_network(is_training):
    networks = [nets.build("residual", seed).train(is_training) for seed in (1, 2)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    MapPairs(*networks, _split())
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(part.training == is_training for part in network.modules())
        assert _hooks(network) == 0


def test_hooks_are_there_while_entered_and_gone_after():
    student, teacher = nets.build("chain", 1), nets.build("chain", 2)
    pairs = MapPairs(student, teacher, _split())
    for _ in range(2):
        with pairs:
            assert _hooks(student) == _hooks(teacher) == len(pairs.names)
        assert _hooks(student) == _hooks(teacher) == 0
    with pytest.raises(KeyError, match="stop"), pairs:
        raise KeyError("stop")
    assert _hooks(student) == _hooks(teacher) == 0


def test_each_difference_is_of_the_last_pair_of_passes():
    student, teacher = nets.build("chain", 1), nets.build("chain", 2)
    first, second = nets.images(seed=1), nets.images(seed=2)
    with MapPairs(student, teacher, _split()) as pairs, torch.no_grad():
        found = []
        for images in (first, second):
            student(images)
            teacher(images)
            found.append(float(pairs.difference()))
    assert found == [_difference(student, teacher, first), _difference(student, teacher, second)]
    assert found[0] != found[1]


class _InPlace(nn.Module):
    """What its blocks give is overwritten by what comes behind them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        return self.head(self.relu(self.second(x)).mean((2, 3)))


def test_maps_are_those_before_an_activation_in_place_and_gradients_go_through():
    student, teacher = _InPlace(1), _InPlace(2).eval()
    images = nets.images(8)
    reference = copy.deepcopy(student)
    with MapPairs(student, teacher, _split()) as pairs:
        student(images)
        with torch.no_grad():
            teacher(images)
        difference = pairs.difference()
        difference.backward()
    wanted = torch.zeros(())
    ours = reference.first(images)
    for part, inputs in (("first", ours), ("second", reference.second(torch.relu(ours)))):
        with torch.no_grad():
            theirs = _outputs(teacher, part, images)
        assert theirs.min() < 0, "before the activation"
        wanted = wanted + ((inputs - theirs) ** 2).sum() / (theirs**2).sum() / 2
    wanted.backward()
    assert float(difference.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for (name, got), expected in zip(student.named_parameters(), reference.parameters(), strict=True):
        if name.startswith("head"):
            assert got.grad is None
        else:
            assert got.grad.abs().sum() > 0
            assert torch.allclose(got.grad, expected.grad, rtol=1e-3, atol=1e-5), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Killed(Exception):
    """Stands for the end of the process."""


class _KillsIn(SilentProgress):
    """Ends the run at the first step of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[SilentTask]:
        outer = self

        class Task(SilentTask):
            def advance(self, amount: int = 1, **fields: str) -> None:
                if label.startswith(f"epoch {outer.epoch} "):
                    raise Killed

        yield Task()


def _student() -> nn.Module:
    return cut_copy(nets.build("residual", 5), {"body.1.conv1": (0, 3, 5)}, nets.EXAMPLE)


def _fitted(features: float, student: nn.Module | None = None, **others) -> dict[str, Tensor]:
    student = student or _student()
    teacher = nets.build("residual", 6).requires_grad_(False)
    settings = replace(SETTINGS, keep="last")
    fit(
        student,
        TrainingData(_split(), _split("validation")),
        settings,
        Distillation(teacher, 0.5, 2.0, features),
        **others,
    )
    assert _hooks(student) == _hooks(teacher) == 0
    return {name: value.clone() for name, value in student.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_by_feature_maps_is_another_training_and_always_the_same():
    without, with_maps = _fitted(0.0), _fitted(1.0)
    assert not _equal(without, with_maps)
    assert not _equal(with_maps, _fitted(2.0))
    assert _equal(with_maps, _fitted(1.0))
    assert all(value.isfinite().all() for value in with_maps.values())


def test_training_by_feature_maps_brings_them_nearer():
    teacher, images = nets.build("residual", 6), nets.images(16)
    after = []
    for features in (0.0, 5.0):
        student = _student()
        before = _difference(student, teacher, images)
        _fitted(features, student)
        after.append(_difference(student, teacher, images))
    assert after[1] < 0.8 * after[0]
    assert after[1] < 0.8 * before


def test_the_loss_holds_the_difference_times_its_weight():
    student, teacher = nets.build("chain", 1), nets.build("chain", 2).requires_grad_(False)
    for norm in (part for part in student.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.track_running_stats = False  # in training as in eval mode: those of the batch
        norm.running_mean = norm.running_var = None
    split = _split()
    settings = replace(SETTINGS, steps=1, batch_size=len(split), augmentation=Augmentation())
    losses = [
        fit(copy.deepcopy(student), TrainingData(split, split), settings, Distillation(teacher, 0.5, 2.0, features))
        .epochs[0]
        .loss
        for features in (0.0, 1.0, 3.0)
    ]
    images = torch.from_numpy(split.preprocessing.normalize(split.read(np.arange(len(split)))))
    difference = _difference(student, teacher, images)
    assert losses[1] - losses[0] == pytest.approx(difference, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(3 * difference, rel=1e-4)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_killed_run_with_feature_maps_ends_like_an_undisturbed_one(tmp_path: Path, epoch: int):
    expected, state = _fitted(1.0), tmp_path / "state.pt"
    broken = _student()
    with pytest.raises(Killed):
        _fitted(1.0, broken, state_file=StateFile(state), progress=_KillsIn(epoch))
    assert _hooks(broken) == 0
    assert state.is_file() == (epoch > 1)
    assert _equal(_fitted(1.0, state_file=StateFile(state)), expected)
    assert not state.exists()


def test_networks_without_a_common_map_are_refused_before_any_training():
    teacher = nets.build("chain", 2)
    slim = cut_copy(nets.build("chain"), {"body.0.0": (1,), "body.1.0": (2,), "body.2.0": (3,)}, nets.EXAMPLE)
    before = copy.deepcopy(slim.state_dict())
    for features in (0.0, 1.0):
        distillation = Distillation(teacher, 0.5, 2.0, features)
        if features:
            with pytest.raises(ModelError, match=r"for distillation\.features, it has none"):
                fit(slim, TrainingData(_split(), _split("validation")), SETTINGS, distillation)
            assert _equal(slim.state_dict(), before)
        else:
            fit(
                copy.deepcopy(slim),
                TrainingData(_split(), _split("validation")),
                replace(SETTINGS, steps=1),
                distillation,
            )


def test_maps_that_lost_channels_are_compared_by_those_that_are_left():
    teacher, images = nets.build("residual", 2), nets.images(6)
    student = cut_copy(nets.build("residual", 1), {"body.0.0": (0, 5), "body.1.conv1": (3,)}, nets.EXAMPLE)
    recipe = Recipe((RemoveChannels({"body.0.0": (0, 5), "body.1.conv1": (3,)}),))
    kept = surviving_channels(teacher, recipe, nets.EXAMPLE, apply_edits)
    left = [channel for channel in range(16) if channel not in (0, 5)]
    assert {path: kept[path].tolist() for path in ("body", "body.0", "body.1", "body.2")} == dict.fromkeys(
        ("body", "body.0", "body.1", "body.2"), left
    )
    by_hand = []
    with torch.no_grad():
        for part in ("body.0", "body.1", "body"):
            ours, theirs = _outputs(student, part, images), _outputs(teacher, part, images)[:, left]
            by_hand.append(float(((ours - theirs) ** 2).sum() / (theirs**2).sum()))
    with MapPairs(student, teacher, _split(), kept) as pairs, torch.no_grad():
        student(images)
        teacher(images)
        assert float(pairs.difference()) == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_channels_survive_one_edit_after_the_other():
    teacher = nets.build("residual")
    recipe = Recipe(
        (RemoveChannels({"body.0.0": (0, 5)}), RemoveBlock("body.2"), RemoveChannels({"body.0.0": (0, 13)}))
    )
    kept = surviving_channels(teacher, recipe, nets.EXAMPLE, apply_edits)
    assert kept["body.1"].tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert surviving_channels(teacher, Recipe((RemoveBlock("body.2"),)), nets.EXAMPLE, apply_edits) == {}
    assert len(teacher.body[0][0].weight) == 16
