"""Kept outputs of the teacher: a second training reads them and ends with the same weights; others are not read."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from compress.data.batches import Augmentation
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.progress import SilentProgress
from compress.storage.digest import sealed, unsealed
from compress.training.device import has_bf16
from compress.training.loop import TrainingRun, fit
from compress.training.settings import Distillation, FitSettings, TrainingData
from compress.training.state import StateFile
from compress.training.teacher_outputs import TeacherOutputs

SETTINGS = FitSettings(epochs=2, batch_size=16, augmentation=Augmentation(1, True))
STEPS = 4  # of an epoch
NEEDS_BF16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 instructions")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Teacher(nn.Sequential):
    """Classifier that counts its forward passes."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = super().forward(images)
        return result


def _network(seed: int, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


def _data(seed: int = 0) -> TrainingData:
    random = np.random.default_rng(seed)
    source = ArraySource(random.integers(0, 255, (80, 6, 6, 3), np.uint8), random.integers(0, 3, 80))
    split = Split("train", source, np.arange(64), Preprocessing(mean=(0.4,), std=(0.3,)))
    return TrainingData(split, replace(split, name="validation", indices=np.arange(64, 80)))


def _trained(
    folder: Path | None, settings: FitSettings = SETTINGS, data: TrainingData | None = None, teacher_seed: int = 1
) -> tuple[dict[str, Tensor], int]:
    """Return the weights after a training, and the number of batches that the teacher saw."""
    student, teacher = _network(2), _network(teacher_seed, Teacher).eval()
    fit(student, data or _data(), settings, Distillation(teacher, 0.9, 4.0, folder=folder))
    return student.state_dict(), teacher.calls  # type: ignore[return-value]


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("augmentation", [Augmentation(1, True), Augmentation(mixup=0.5, cutmix=1.0)])
def test_second_training_reads_and_ends_with_the_same_weights(tmp_path: Path, augmentation: Augmentation) -> None:
    settings = replace(SETTINGS, augmentation=augmentation)
    alone, calls = _trained(None, settings)
    assert calls == 2 * STEPS
    first, calls = _trained(tmp_path, settings)
    assert calls == 2 * STEPS
    second, calls = _trained(tmp_path, settings)
    assert calls == 2, "the first batch of each epoch is computed and compared"
    assert _equal(alone, first)
    assert _equal(alone, second)


@pytest.mark.parametrize(
    ("settings", "data_seed", "teacher_seed"),
    [
        (replace(SETTINGS, seed=1), 0, 1),
        (replace(SETTINGS, batch_size=32), 0, 1),
        pytest.param(replace(SETTINGS, precision="bf16"), 0, 1, marks=NEEDS_BF16),
        (replace(SETTINGS, augmentation=Augmentation()), 0, 1),
        (SETTINGS, 1, 1),
        (SETTINGS, 0, 3),
    ],
    ids=["seed", "batch size", "precision", "augmentation", "images", "teacher"],
)
def test_outputs_of_another_training_are_not_read(
    tmp_path: Path, settings: FitSettings, data_seed: int, teacher_seed: int
) -> None:
    alone, calls = _trained(None, settings, _data(data_seed), teacher_seed)
    _trained(tmp_path)
    there, again = _trained(tmp_path, settings, _data(data_seed), teacher_seed)
    assert again == calls
    assert _equal(alone, there)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _cut(content: bytes) -> bytes:
    return content[:-5]


def _flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _without_outputs(content: bytes) -> bytes:
    return sealed(save({"batches": load(unsealed(content) or b"")["batches"]}))


def _of_another_machine(content: bytes) -> bytes:
    tensors = load(unsealed(content) or b"")
    return sealed(save({**tensors, "outputs": tensors["outputs"] + 1e-6}))


@pytest.mark.parametrize("damage", [_cut, _flipped, _without_outputs, _of_another_machine])
def test_files_that_cannot_be_trusted_are_computed_again(tmp_path: Path, damage: object) -> None:
    alone, _ = _trained(tmp_path)
    assert len(_files(tmp_path)) == 2
    for path in _files(tmp_path):
        path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    there, calls = _trained(tmp_path)
    assert calls == 2 * STEPS
    assert _equal(alone, there)
    assert _trained(tmp_path)[1] == 2, "good outputs replace them"


def test_a_part_of_an_epoch_is_completed(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1, steps=2)
    assert _trained(tmp_path, settings)[1] == 2
    assert _trained(tmp_path, replace(SETTINGS, epochs=1))[1] == 1 + 2
    assert _trained(tmp_path, replace(SETTINGS, epochs=1))[1] == 1


def test_resumed_training_reads_what_is_there(tmp_path: Path) -> None:
    alone, _ = _trained(tmp_path / "kept")
    student, teacher = _network(2), _network(1, Teacher).eval()
    taught = Distillation(teacher, 0.9, 4.0, folder=tmp_path / "kept")

    class Stopped(SilentProgress):
        def note(self, text: str) -> None:
            if text.startswith("epoch 1"):
                raise InterruptedError

    state = StateFile(tmp_path / "state.pt")
    saving = replace(SETTINGS, save_minutes=0)
    with pytest.raises(InterruptedError):
        fit(student, _data(), saving, taught, state, Stopped())
    assert state.path.is_file()
    student = _network(2)
    fit(student, _data(), saving, taught, state)
    assert _equal(alone, student.state_dict())
    assert teacher.calls <= 3


def test_outputs_of_another_machine_are_noticed_where_the_first_batch_is_not_kept(tmp_path: Path) -> None:
    teacher, images, read = _network(1).eval(), torch.rand(3, 16, 3, 6, 6), []
    for factor, batches in ((1.001, images[1:]), (1.0, images)):
        outputs = TeacherOutputs(lambda one, by=factor: by * teacher(one), teacher, tmp_path, {}, print)
        outputs.open_epoch(0)
        read = [outputs(batch) for batch in batches]
        outputs.close_epoch()
    assert (outputs.read, outputs.computed) == (0, 3)
    assert all(torch.equal(got, teacher(batch)) for got, batch in zip(read, images, strict=True))


def test_size_is_bounded(tmp_path: Path) -> None:
    teacher = _network(1, Teacher).eval()
    images = torch.rand(3, 16, 3, 6, 6)
    size = 16 * 3 * 4
    for _ in range(2):
        outputs = TeacherOutputs(teacher, teacher, tmp_path, {}, lambda _: None, 2 * size)
        outputs.open_epoch(0)
        for batch in images:
            outputs(batch)
        outputs.close_epoch()
    assert (outputs.read, outputs.computed) == (1, 2)
    (path,) = _files(tmp_path)
    assert load(unsealed(path.read_bytes()) or b"")["outputs"].shape == (2, 16, 3)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_maps_keep_their_memory_format(tmp_path: Path, form: torch.memory_format) -> None:
    teacher, images = nn.Conv2d(3, 4, 3), torch.rand(2, 2, 3, 8, 8)
    for _ in range(2):
        outputs = TeacherOutputs(lambda one: teacher(one).contiguous(memory_format=form), teacher, tmp_path, {}, print)
        outputs.open_epoch(0)
        found = [outputs(batch) for batch in images]
        outputs.close_epoch()
    assert outputs.read == 1
    assert found[1].stride() == found[0].stride() == teacher(images[0]).contiguous(memory_format=form).stride()
    assert torch.equal(found[1], teacher(images[1]))


def test_a_folder_that_cannot_be_written_warns_and_trains(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    warned: list[str] = []

    class Listener(SilentProgress):
        def warn(self, text: str) -> None:
            warned.append(text)

    alone, _ = _trained(None)
    student = _network(2)
    taught = Distillation(_network(1).eval(), 0.9, 4.0, folder=tmp_path / "file" / "below")
    fit(student, _data(), SETTINGS, taught, progress=Listener())
    assert _equal(alone, student.state_dict())
    assert warned == ["Outputs of the teacher cannot be kept for later trainings: Not a directory."]


def test_teachers_with_several_outputs_or_maps_are_computed(tmp_path: Path) -> None:
    outputs = TeacherOutputs(lambda images: {"a": images, "b": images}, nn.Identity(), tmp_path, {}, lambda _: None)
    outputs.open_epoch(0)
    assert set(outputs(torch.rand(2, 3, 4, 4))) == {"a", "b"}
    outputs.close_epoch()

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.head(self.inner(images))
            return result

    taught = Distillation(Nested().eval(), 0.5, 2.0, features=1.0, folder=tmp_path)
    run = TrainingRun(copy.deepcopy(taught.teacher), _data(), SETTINGS, taught, None, SilentProgress())
    assert run.teacher_outputs is None
    assert not _files(tmp_path)
