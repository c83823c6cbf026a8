"""Training elsewhere than on the CPU. No GPU is needed: what must not mix is found with tensors that hold no values."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.data.batches import Augmentation, PlacedSplit, evaluation_batches, fast_batch_size, training_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import StageError
from compress.progress import SilentProgress
from compress.pruning.groups import ChannelGroup, Member
from compress.pruning.methods.csgd import _means
from compress.pruning.methods.group_tensors import GroupTensors, rows_of
from compress.training import device as device_module
from compress.training import loop as loop_module
from compress.training.device import CPU, moved, placed, require_precision, resident, training_device
from compress.training.learner import build_optimizer
from compress.training.loop import TrainingRun
from compress.training.mixing import mixed
from compress.training.settings import Distillation, FitSettings, TrainingData
from compress.training.weight_averaging import WeightAverage

ALL = Augmentation(crop_padding=1, flip=True)


def _split(count: int = 20, **changes: object) -> Split:
    random = np.random.default_rng(0)
    source = ArraySource(random.integers(0, 256, (count, 6, 6, 3), np.uint8), random.integers(0, 3, count))
    return replace(Split("train", source, np.arange(4, count), Preprocessing(mean=(0.4,), std=(0.3,))), **changes)


def test_a_device_is_found_by_name(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("cpu") == training_device("auto") == CPU
    with pytest.raises(StageError, match="device cuda needs a GPU that torch can use, it sees none"):
        training_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert training_device("cpu") == CPU
    assert training_device("auto") == training_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training_device("cuda") == torch.device("cuda", 1)
    assert taken == [0, 0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(StageError, match="torch sees 2, this is process 3"):
        training_device("cuda")


def test_a_precision_needs_a_device_that_has_it(monkeypatch):
    gpu = torch.device("cuda", 0)
    require_precision("fp32", CPU)
    require_precision("fp16", gpu)
    with pytest.raises(StageError, match="precision fp16 needs a GPU"):
        require_precision("fp16", CPU)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Old One")
    with pytest.raises(StageError, match="bf16 must be one that this GPU has instructions for, Old One has none"):
        require_precision("bf16", gpu)


def test_images_that_lie_on_the_device_give_the_same_batches():
    plain = _split()
    whole = resident(plain.source, CPU)
    assert whole is not None
    there = PlacedSplit(plain.name, plain.source, plain.indices, plain.preprocessing, device=CPU, resident=whole)
    for one, other in zip(training_batches(plain, 8, ALL, 1, 2), training_batches(there, 8, ALL, 1, 2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    for one, other in zip(evaluation_batches(plain.first(7), 3), evaluation_batches(there.first(7), 3), strict=True):
        assert torch.equal(one[0], other[0])


def test_only_what_lies_in_memory_as_it_is_goes_to_the_device_and_only_where_there_is_room(monkeypatch):
    source = _split().source
    assert resident(ArraySource(source.images, source.labels, (), lambda image: image), CPU) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (source.images.nbytes * 2, 10**12))
    assert resident(source, torch.device("cuda", 0)) is None


def test_splits_of_one_source_share_what_lies_on_the_device():
    split = _split()
    train, first = placed((split, split.first(5)), torch.device("meta"))
    assert train.resident is first.resident
    assert train.resident is not None
    assert train.resident.device == train.device == torch.device("meta")
    assert len(first) == 5
    assert fast_batch_size(train) == 256
    assert placed((split,), CPU)[0] is split


@pytest.mark.parametrize("is_resident", [True, False])
def test_batches_are_made_on_the_device(is_resident):
    (split,) = placed((_split(),), torch.device("meta"))
    split = split if is_resident else replace(split, resident=None)
    for images, labels in (next(training_batches(split, 8, ALL, 0, 0)), next(evaluation_batches(split, 8))):
        assert images.device == labels.device == torch.device("meta")
        assert images.shape == (8, 3, 6, 6)


@pytest.mark.parametrize("augmentation", [Augmentation(mixup=0.2), Augmentation(cutmix=1.0)])
def test_images_are_mixed_on_the_device(augmentation):
    images, share = mixed(torch.zeros(4, 3, 6, 6, device="meta"), augmentation)
    assert images.device.type == "meta"
    assert share.device == CPU


def _group() -> tuple[GroupTensors, nn.Module]:
    """A convolution and its batch norm on a GPU, without values, and with gradients."""
    with FakeTensorMode(), torch.device("cuda"):
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    slots = torch.arange(4)
    conv, norm = (Member(name, part, "out", slots, slots) for name, part in (("0", module[0]), ("1", module[1])))
    return GroupTensors(ChannelGroup("0", 4, 1, (conv, norm), (norm,))), module


def test_methods_work_on_parameters_that_lie_elsewhere():
    tensors, module = _group()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tensors.derivatives().device.type == "cuda"
        assert tensors.strength().device == CPU
        tensors.stop(torch.tensor([True, False, False, True]))
        tensors.decay(torch.ones(4), with_filters=True)
        for rows in tensors.every():
            rows.set_values(rows.values)
    assert all(parameter.grad.device.type == "cuda" for parameter in module.parameters())


def test_means_of_clusters_are_where_the_parameters_are():
    slots = torch.arange(4)
    rows, _ = rows_of(Member("0", nn.Conv2d(3, 4, 3).to("meta"), "out", slots, slots))
    assert _means(rows.values, rows, torch.tensor([0, 0, 1, 1])).device.type == "meta"


def test_averages_follow_their_network():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    average = WeightAverage(module, 0.9)
    for network in (module, average.module):
        network.to("meta")
    average.update(module)
    assert {value.device.type for value in average.module.state_dict().values()} == {"meta"}


def test_networks_come_back_to_the_cpu(monkeypatch):
    wanted = []
    module = nn.Linear(2, 2)
    monkeypatch.setattr(module, "to", wanted.append)
    with pytest.raises(ValueError, match="stop"), moved([module], torch.device("cuda", 1)):
        raise ValueError("stop")
    assert wanted == [torch.device("cuda", 1), CPU]


@pytest.mark.parametrize("is_resident", [True, False])
def test_steps_can_be_made_elsewhere(monkeypatch, is_resident):
    """The loop's own steps on tensors without values, with all that it can do: what mixes devices raises."""
    there = torch.device("meta")
    monkeypatch.setattr(loop_module, "training_device", lambda _name: there)
    if not is_resident:
        monkeypatch.setattr(device_module, "resident", lambda *_: None)
    settings = FitSettings(
        batch_size=8, augmentation=Augmentation(1, True, mixup=0.2), ema=0.9, average_ratio=0.9, steps=6
    )
    networks = [
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
        for _ in range(2)
    ]
    distillation = Distillation(networks[1].eval(), 0.5, 2.0, features=1.0)
    data = TrainingData(_split(52), _split(52))
    run = TrainingRun(networks[0].train(), data, settings, distillation, None, SilentProgress())
    monkeypatch.setattr(run.loss, "autocast", nullcontext)  # which knows real devices only
    for network in run.networks:
        network.to(there)
    # parameters stay the same on their way to a GPU only
    run.learner.optimizer = build_optimizer(run.learner.module, settings)
    with run.surroundings():
        for batch in training_batches(run.data.train, 8, settings.augmentation, 0, 0):
            run.train_step([batch])
    assert run.step == 6
    assert run.losses.values == []  # none was read back
    assert {value.device for value in run.networks[0].state_dict().values()} == {there}
    assert {value.device for values in run.learner.optimizer.state.values() for value in values.values()} == {there}


def test_where_hooks_wait_for_the_gpu_anyway_each_loss_is_read(monkeypatch):
    monkeypatch.setattr(loop_module, "training_device", lambda _name: torch.device("meta"))
    module, data = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), TrainingData(_split(), _split())
    arguments = (module, data, FitSettings(), None, None, SilentProgress())
    assert TrainingRun(*arguments).losses.interval == 20
    assert TrainingRun(*arguments, hooks=object()).losses.interval == 1
