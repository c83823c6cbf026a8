"""The training loop learns, resumes to the same bits, keeps the best epoch, and refuses what it cannot use."""

import copy
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from compress.data.batches import Augmentation, training_batches
from compress.data.preprocessing import Preprocessing
from compress.data.sources.classification import ArraySource
from compress.data.splits import Split
from compress.errors import ArtifactError, DataError, ModelError, NonFinite, OutOfMemory, StageError
from compress.progress import SilentProgress, SilentTask
from compress.training import device as device_module
from compress.training import epochs as epochs_module
from compress.training import loop as loop_module
from compress.training.device import flushed_denormals
from compress.training.evaluate import measure_quality
from compress.training.interrupts import deferred_interrupts
from compress.training.loop import fit
from compress.training.memory_format import fastest_memory_format, in_fastest_memory_format
from compress.training.schedule import schedule
from compress.training.settings import Distillation, FitResult, FitSettings, TrainingData
from compress.training.state import StateFile, read_state

SETTINGS = FitSettings(
    epochs=3, batch_size=16, learning_rate=0.05, augmentation=Augmentation(1, True), label_smoothing=0.05
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _network(seed: int = 0) -> nn.Module:
    """A convolution, batch norm, dropout and a linear layer: everything that has a state or draws numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
        )


def _splits(count: int = 96) -> TrainingData:
    """Images that are brightest in the colour that their label says."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, count)
    images = random.integers(0, 120, (count, 6, 6, 3), np.uint8)
    images[np.arange(count), :, :, labels] += 100
    source = ArraySource(images, labels)
    wanted = Preprocessing(mean=(0.4,), std=(0.3,))
    border = count * 2 // 3
    return TrainingData(
        Split("train", source, np.arange(border), wanted),
        Split("validation", source, np.arange(border, count), wanted),
    )


class Killed(Exception):
    """Stands for the end of the process."""


class _KillsIn(SilentProgress):
    """Ends the run at a step of an epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.epoch, self.step = epoch, step
        self.notes: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[SilentTask]:
        outer = self

        class Task(SilentTask):
            done = 0

            def advance(self, amount: int = 1, **fields: str) -> None:
                self.done += 1
                if label.startswith(f"epoch {outer.epoch} ") and self.done == outer.step:
                    raise Killed

        yield Task()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(f"warning: {text}")


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _records(result: FitResult) -> list[tuple[int, float, float]]:
    return [(record.epoch, record.loss, record.validation) for record in result.epochs]


def test_a_learnable_problem_is_learned() -> None:
    network = _network()
    result = fit(network, _splits(), replace(SETTINGS, epochs=6))
    assert result.epochs[-1].loss < 0.75 * result.epochs[0].loss
    assert result.epochs[-1].validation > 0.8
    assert [record.epoch for record in result.epochs] == [1, 2, 3, 4, 5, 6]
    assert not any(part.training for part in network.modules())
    assert all(value.is_contiguous() for value in network.state_dict().values())


def test_the_same_run_twice_is_the_same_to_the_bit() -> None:
    runs = []
    for outer_seed in (1, 2):
        torch.manual_seed(outer_seed)
        network = _network()
        before = torch.random.get_rng_state()
        fit(network, _splits(), SETTINGS)
        assert torch.equal(torch.random.get_rng_state(), before)
        runs.append(_weights(network))
    assert _equal(*runs)
    other = _network()
    fit(other, _splits(), replace(SETTINGS, seed=1))
    assert not _equal(runs[0], _weights(other))


@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "last", "augmentation": Augmentation(1, True, 0.4, 0.5)},
        {"optimizer": "adamw", "learning_rate": 0.01, "ema": 0.9, "average_ratio": 0.6},
        {"batch_size": 8, "accumulation": 2, "ema": 0.9, "keep": "last", "gradient_clip": 0.5, "schedule": "step"},
    ],
    ids=["sgd", "mixed", "adamw", "accumulated"],
)
@pytest.mark.parametrize("save_minutes", [0.0, 5.0])
def test_a_killed_run_ends_like_an_undisturbed_one(
    tmp_path: Path, epoch: int, step: int, changes, save_minutes: float
) -> None:
    settings, state = replace(SETTINGS, save_minutes=save_minutes, **changes), tmp_path / "deep" / "state.pt"
    undisturbed = _network()
    expected = fit(undisturbed, _splits(), settings)
    with pytest.raises(Killed):
        fit(_network(), _splits(), settings, state_file=StateFile(state), progress=_KillsIn(epoch, step))
    steps_saved = 4 * (epoch - 1) + (0 if save_minutes else step - 1)
    assert state.is_file() == (steps_saved > 0)
    resumed, progress = _network(), _KillsIn(99, 0)
    torch.manual_seed(12345)
    result = fit(resumed, _splits(), settings, state_file=StateFile(state), progress=progress)
    assert _equal(_weights(undisturbed), _weights(resumed))
    assert _records(result) == _records(expected)
    assert result.chosen_epoch == expected.chosen_epoch
    reached = f"step {steps_saved} of 12" if steps_saved % 4 else f"epoch {epoch - 1} of 3"
    assert any(f"goes on after {reached}." in note for note in progress.notes) == (steps_saved > 0)
    assert list(state.parent.glob("*")) == []


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_an_interrupted_run_makes_its_step_saves_and_goes_on_from_there(tmp_path: Path, step: int) -> None:
    class Interrupting(_KillsIn):
        def train_step(self) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == step:
                signal.raise_signal(signal.SIGINT)

    undisturbed, interrupted, state = _network(), _network(), tmp_path / "state.pt"
    expected = fit(undisturbed, _splits(), SETTINGS)
    progress = Interrupting(99, 0)
    interrupted[0].register_forward_hook(lambda part, *_: progress.train_step() if part.training else None)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, _splits(), SETTINGS, state_file=StateFile(state), progress=progress)
    assert signal.getsignal(signal.SIGINT) is handler
    assert progress.notes[-1] == f"Training stopped after step {step} of 12; it can go on there."
    resumed, again = _network(), _KillsIn(99, 0)
    result = fit(resumed, _splits(), SETTINGS, state_file=StateFile(state), progress=again)
    assert any(f"goes on after step {step} of 12" in note or "after epoch 1 of 3" in note for note in again.notes)
    assert _equal(_weights(undisturbed), _weights(resumed))
    assert _records(result) == _records(expected)


def test_an_interrupt_in_the_last_validation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, interrupted, state = _network(), _network(), tmp_path / "state.pt"
    expected, measured = fit(undisturbed, _splits(), SETTINGS), []

    def measure(*args: object, **named: object) -> tuple[float, object]:
        if len(measured) == 2:
            signal.raise_signal(signal.SIGINT)
        measured.append(measure_quality(*args, **named))
        return measured[-1]

    monkeypatch.setattr(epochs_module, "measure_quality", measure)
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, _splits(), SETTINGS, state_file=StateFile(state))
    resumed = _network()
    trained: list[nn.Module] = []
    resumed.register_forward_hook(lambda part, *_: trained.append(part) if part.training else None)
    result = fit(resumed, _splits(), SETTINGS, state_file=StateFile(state))
    assert trained == []
    assert result.steps == 12
    assert _equal(_weights(undisturbed), _weights(resumed))
    assert _records(result) == _records(expected)
    assert not state.exists()


def test_a_second_interrupt_does_not_wait() -> None:
    with deferred_interrupts() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_interrupts_are_not_deferred_outside_of_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, _network(), _splits(), replace(SETTINGS, epochs=1)).result().steps == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_a_step_that_does_not_fit_into_memory_says_what_to_do(error: Exception) -> None:
    network = _network()

    def fail(part: nn.Module, *_: object) -> None:
        if part.training:
            raise error

    network[6].register_forward_hook(fail)
    with pytest.raises(OutOfMemory, match=r"batch_size 16 does not\.\nHint: Lower batch_size and raise accumulation"):
        fit(network, _splits(), SETTINGS)


def test_images_that_do_not_fit_onto_a_device_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loop_module, "placed", full)
    with pytest.raises(OutOfMemory, match="Lower batch_size"):
        fit(_network(), _splits(), SETTINGS)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_weights_that_a_step_broke_are_neither_saved_nor_returned(tmp_path: Path, keep: str) -> None:
    """The loss of the sixth step is finite, and what follows from it is not."""
    network, state = _network(), tmp_path / "state.pt"
    settings = replace(SETTINGS, save_minutes=0.0, keep=keep)
    with pytest.raises(NonFinite, match=r"Weights must be finite, '6\.weight' is not after step 6 of 12"):
        fit(network, _splits(), settings, state_file=StateFile(state), hooks=_Breaks(network[6], 5, "inf"))
    saved = torch.load(read_state(state), weights_only=True)
    assert saved["step"] == 5
    assert all(bool(value.isfinite().all()) for value in saved["module"].values())


def test_a_broken_last_step_is_an_error_without_a_state_too() -> None:
    network = _network()
    with pytest.raises(NonFinite, match="after step 12 of 12"):
        fit(network, _splits(), replace(SETTINGS, keep="last"), hooks=_Breaks(network[6], 11, "nan"))


def test_the_last_good_state_stays_when_the_loss_breaks(tmp_path: Path) -> None:
    network, state = _network(), tmp_path / "state.pt"

    def break_down(part: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        calls.append(part.training)
        return output * float("nan") if sum(calls) == 6 else output

    calls: list[bool] = []
    network[6].register_forward_hook(break_down)
    with pytest.raises(NonFinite, match="at step 6 of 12"):
        fit(network, _splits(), replace(SETTINGS, save_minutes=0), state_file=StateFile(state))
    kept = torch.load(read_state(state), weights_only=True)
    assert kept["step"] == 5
    assert all(value.isfinite().all() for value in kept["module"].values())


def test_the_average_of_the_weights_is_measured_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []
    told = lambda module, *_, **__: (float(not seen.append(_weights(module))), None)  # noqa: E731
    monkeypatch.setattr(epochs_module, "measure_quality", told)
    averaged, plain = _network(), _network()
    fit(averaged, _splits(), replace(SETTINGS, ema=0.9, keep="last"))
    assert _equal(seen[-1], _weights(averaged))
    fit(plain, _splits(), replace(SETTINGS, keep="last"))
    assert not torch.allclose(plain[6].weight, averaged[6].weight, atol=1e-4)
    apart = (_network()[6].weight - plain[6].weight).norm()
    assert (averaged[6].weight - plain[6].weight).norm() < 0.5 * apart, "of the last steps, not of the first"


@pytest.mark.parametrize(("keep", "told", "is_taken"), [("best", 0.9, True), ("best", 0.8, False), ("last", 0.1, True)])
def test_the_average_of_the_last_steps_is_one_more_candidate(monkeypatch, keep: str, told: float, is_taken) -> None:
    seen: list[dict[str, Tensor]] = []
    tops = iter((0.3, 0.85, 0.5, told))

    def measure(module: nn.Module, *_: object, **__: object) -> tuple[float, None]:
        seen.append(_weights(module))
        return next(tops), None

    monkeypatch.setattr(epochs_module, "measure_quality", measure)
    after_each: list[Tensor] = []
    network = _network()

    def keep_weight(part: nn.Module, _inputs: object) -> None:
        if part is network:  # not a copy of it
            after_each.append(network[6].weight.detach().clone())

    network.register_forward_pre_hook(keep_weight)
    result = fit(network, _splits(), replace(SETTINGS, average_ratio=0.25, keep=keep))
    assert (result.averaged, result.is_averaged) == (told, is_taken)
    assert result.chosen_epoch == (3 if is_taken else 2)
    assert _equal(seen[3 if is_taken else 1], _weights(network))
    last = torch.stack([*after_each[-2:], seen[2]["6.weight"]])  # before steps 11 and 12 is after 10 and 11
    assert torch.allclose(seen[3]["6.weight"], last.mean(0), atol=1e-6)
    assert not torch.allclose(seen[3]["1.running_mean"], seen[2]["1.running_mean"], atol=1e-6)


def test_statistics_of_the_average_are_of_batches_of_one_size_from_all_over_the_split() -> None:
    """Images that are sorted by class, and one more than fits into a batch."""
    torch.manual_seed(0)
    images = np.concatenate([np.full((65, 6, 6, 3), 40), np.full((64, 6, 6, 3), 200)]).astype(np.uint8)
    source = ArraySource(images, np.repeat([0, 1], [65, 64]), ("a", "b"))
    split = Split("train", source, np.arange(129), Preprocessing((0.5,) * 3, (0.25,) * 3))
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 2))
    settings = FitSettings(steps=2, batch_size=64, average_ratio=1.0, keep="last")
    assert fit(network, TrainingData(split, split), settings).is_averaged
    values = (np.array([40, 200]) / 255 - 0.5) / 0.25
    assert float(network[0].running_mean[0]) == pytest.approx(values.mean(), abs=0.05)
    assert float(network[0].running_var[0]) == pytest.approx(values.var(), rel=0.05)


def test_several_batches_a_step_are_one_large_batch() -> None:
    """Without batch norm and dropout, which see one batch at a time."""
    weights = []
    for batch_size, accumulation in ((32, 1), (8, 4)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
        settings = replace(SETTINGS, augmentation=Augmentation(), batch_size=batch_size, accumulation=accumulation)
        result = fit(network, _splits(), settings)
        assert result.steps == 6
        weights.append(network[1].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_more_batches_a_step_than_an_epoch_has_are_one_step_of_all() -> None:
    result = fit(_network(), _splits(), replace(SETTINGS, epochs=2, accumulation=100))
    assert result.steps == len(result.epochs) == 2


def test_gradients_are_clipped_together() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    steps = {}
    for clip in (None, 0.1, 1e9):
        network = copy.deepcopy(start)
        settings = replace(SETTINGS, steps=1, gradient_clip=clip, weight_decay=0.0, momentum=0.0, warmup_ratio=0.0)
        fit(network, _splits(), settings)
        moved = [a - b for a, b in zip(network.parameters(), start.parameters(), strict=True)]
        steps[clip] = torch.cat([part.flatten() for part in moved]).detach().norm()
    assert float(steps[0.1]) == pytest.approx(0.1 * SETTINGS.learning_rate, rel=1e-3)
    assert steps[None] == steps[1e9] > 2 * steps[0.1]


def test_adamw_decays_weights_apart_from_the_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.fill_(-1.0)  # nothing passes: no gradient comes to the first layer
    settings = replace(SETTINGS, steps=1, optimizer="adamw", learning_rate=0.1, weight_decay=0.5, warmup_ratio=0.0)
    fit(network, _splits(), settings)
    assert torch.allclose(network[1].bias, torch.full((3,), -1 + 0.1 * 0.5))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(_network(), _splits(), SETTINGS, state_file=StateFile(state), progress=_KillsIn(2, 1))
    with pytest.raises(ArtifactError, match=r"it is of one with learning_rate 0\.05 instead of 0\.01\.\nHint: Remove"):
        fit(_network(), _splits(), replace(SETTINGS, learning_rate=0.01), state_file=StateFile(state))
    wider = _network()
    wider[6] = nn.Linear(32, 4)
    with pytest.raises(ArtifactError, match=r"of one with shape of 6\.weight \[3, 32\] instead of \[4, 32\]"):
        fit(wider, _splits(), SETTINGS, state_file=StateFile(state))
    assert state.is_file()


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_an_unreadable_state_starts_again_with_a_warning(tmp_path: Path, content: bytes | None) -> None:
    state, progress, network = tmp_path / "state.pt", _KillsIn(99, 0), _network()
    if content is None:
        torch.save([1, 2], state)
    else:
        state.write_bytes(content)
    fit(network, _splits(), SETTINGS, state_file=StateFile(state), progress=progress)
    assert any(note.startswith("warning: The saved training state is unreadable") for note in progress.notes)
    expected = _network()
    fit(expected, _splits(), SETTINGS)
    assert _equal(_weights(network), _weights(expected))


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    network = _network()
    network[6].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFinite, match=r"must be finite, got nan at step 1 of 12 \(learning rate 0\.05\)"):
        fit(network, _splits(), SETTINGS)
    with pytest.raises(NonFinite, match=r"at step \d+ of 12 .*\nHint: Lower learning_rate"):
        fit(_network(), _splits(), replace(SETTINGS, learning_rate=1e30, weight_decay=1e10, warmup_ratio=0.0))


@pytest.mark.parametrize(("keep", "chosen"), [("best", 2), ("last", 3)])
def test_the_epoch_with_the_best_validation_is_kept(monkeypatch: pytest.MonkeyPatch, keep: str, chosen: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def measure(module: nn.Module, split: Split, *_: object) -> tuple[float, None]:
        assert split.name == "validation"
        seen.append(_weights(module))
        return (0.3, 0.9, 0.5)[len(seen) - 1], None

    monkeypatch.setattr(epochs_module, "measure_quality", measure)
    network = _network()
    result = fit(network, _splits(), replace(SETTINGS, keep=keep))
    assert result.chosen_epoch == chosen
    assert _equal(seen[chosen - 1], _weights(network))


@pytest.mark.parametrize(
    ("lost", "chosen"),
    [((4, 0, 4), 3), ((9, 0, 9), 2), ((0, 5, 9), 2), ((0, 5, 5), 3)],
    ids=["4 more in the last", "9 more in the last", "5, then 9 more", "5 more twice"],
)
def test_a_later_epoch_is_kept_unless_it_is_shown_to_be_worse_than_the_best(
    monkeypatch, tmp_path, lost, chosen
) -> None:
    """Of 32 images: 5 lost are p = 0.06, 6 lost are p = 0.03. A kill after the second epoch changes nothing."""

    def measured() -> object:
        left = iter(lost)

        def measure(*_: object, **__: object) -> tuple[float, np.ndarray]:
            right = np.arange(32) >= next(left)
            return float(right.mean()), right

        return measure

    monkeypatch.setattr(epochs_module, "measure_quality", measured())
    assert fit(_network(), _splits(), SETTINGS).chosen_epoch == chosen
    monkeypatch.setattr(epochs_module, "measure_quality", measured())
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(_network(), _splits(), SETTINGS, state_file=StateFile(state), progress=_KillsIn(3, 1))
    assert fit(_network(), _splits(), SETTINGS, state_file=StateFile(state)).chosen_epoch == chosen


def test_the_best_epoch_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tops = iter((0.9, 0.2, 0.3))
    monkeypatch.setattr(epochs_module, "measure_quality", lambda *_, **__: (next(tops), None))
    state, after_one = tmp_path / "state.pt", _network()
    with pytest.raises(Killed):
        fit(after_one, _splits(), SETTINGS, state_file=StateFile(state), progress=_KillsIn(2, 1))
    best = torch.load(read_state(state), weights_only=True)["module"]
    resumed = _network()
    result = fit(resumed, _splits(), SETTINGS, state_file=StateFile(state))
    assert result.chosen_epoch == 1
    assert [record.validation for record in result.epochs] == [0.9, 0.2, 0.3]
    assert _equal(best, _weights(resumed))


def test_steps_go_before_epochs_and_a_fraction_of_an_epoch_is_trained() -> None:
    per_epoch = 4
    for changes, steps in (({"steps": 6}, 6), ({"epochs": 0.5}, 2), ({"epochs": 0.01}, 1), ({"epochs": 1.75}, 7)):
        network = _network()
        result = fit(network, _splits(), replace(SETTINGS, **changes))
        assert int(network[1].num_batches_tracked) <= steps
        assert len(result.epochs) == -(-steps // per_epoch)
        last = fit(_network(), _splits(), replace(SETTINGS, keep="last", **changes))
        assert last.epochs[-1].learning_rate == pytest.approx(
            SETTINGS.learning_rate * schedule(steps - 1, steps, SETTINGS.warmup_ratio)
        )


def test_distillation_alone_pulls_the_outputs_to_the_teacher() -> None:
    teacher, student = _network(1).eval(), _network(2)
    frozen = _weights(teacher)
    train, validation = _splits()
    images = torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def gap(network: nn.Module) -> float:
        with torch.no_grad():
            wanted = nn.functional.log_softmax(teacher(images), 1)
            got = nn.functional.log_softmax(copy.deepcopy(network).eval()(images), 1)
        return float(nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True))

    before = gap(student)
    settings = replace(SETTINGS, epochs=15, augmentation=Augmentation(), keep="last")
    fit(student, TrainingData(train, validation), settings, Distillation(teacher, 1.0, 2.0))
    assert gap(student) < 0.5 * before
    assert _equal(frozen, _weights(teacher))


def test_distillation_alone_does_not_read_the_labels() -> None:
    train, validation = _splits()
    assert isinstance(train.source, ArraySource)
    shuffled = replace(train, source=replace(train.source, labels=(train.source.labels + 1) % 3))
    results = []
    for split in (train, shuffled):
        student = _network(2)
        fit(student, TrainingData(split, validation), SETTINGS, Distillation(_network(1).eval(), 1.0, 4.0))
        results.append(_weights(student))
    assert _equal(*results)


def test_loss_mixes_labels_and_softened_teacher() -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(108, 3)) for _ in range(2))
    train, validation = _splits()
    labels = torch.from_numpy(train.labels)
    with torch.no_grad():
        images = torch.from_numpy(train.preprocessing.normalize(train.read(np.arange(len(train)))))
        got, wanted = student(images), teacher(images).div(2.0).softmax(1)
    hard = nn.functional.cross_entropy(got, labels, label_smoothing=0.05)
    soft = (wanted * (wanted.log() - got.div(2.0).log_softmax(1))).sum(1).mean() * 4.0
    settings = replace(SETTINGS, steps=1, batch_size=len(train), augmentation=Augmentation())
    result = fit(student, TrainingData(train, validation), settings, Distillation(teacher, 0.3, 2.0))
    assert result.epochs[0].loss == pytest.approx(float(0.7 * hard + 0.3 * soft), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_pairs_of_images_and_asks_for_both_labels(smoothing: float) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    start, seen = copy.deepcopy(student), []
    handle = student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    train, validation = _splits()
    settings = replace(
        SETTINGS, steps=1, batch_size=len(train), label_smoothing=smoothing, augmentation=Augmentation(mixup=1.0)
    )
    result = fit(student, TrainingData(train, validation), settings)
    handle.remove()
    mixed = next(images for images in seen if len(images) == len(train)).flatten(1)
    images, labels = next(training_batches(train, len(train), Augmentation(), 0, 0))
    images = images.flatten(1)
    apart = images.roll(1, 0) - images
    share = ((mixed - images) * apart).sum(1) / apart.square().sum(1)
    assert torch.allclose(mixed, images + share[:, None] * apart, atol=1e-5)
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.std() > 0.2, "every pair has a share of its own"
    wanted = torch.eye(3)[labels] * (1 - share[:, None]) + torch.eye(3)[labels.roll(1, 0)] * share[:, None]
    expected = nn.functional.cross_entropy(start(mixed), wanted, label_smoothing=smoothing)
    assert result.epochs[0].loss == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_with_the_teacher_itself_has_no_loss() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).eval()
    student = copy.deepcopy(teacher)
    settings = replace(SETTINGS, weight_decay=0.0)
    result = fit(student, _splits(), settings, Distillation(teacher, 1.0, 3.0))
    assert result.epochs[-1].loss == pytest.approx(0, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_labels_and_splits_that_do_not_fit_are_refused() -> None:
    train, validation = _splits()
    narrow = _network()
    narrow[6] = nn.Linear(32, 2)
    with pytest.raises(DataError, match=r"classes the network has \(2\), got label 2"):
        fit(narrow, TrainingData(train, validation), SETTINGS)
    for empty, name in (((train.first(0), validation), "train"), ((train, validation.first(0)), "validation")):
        network = _network()
        with pytest.raises(DataError, match=f"Split '{name}' must hold at least one image"):
            fit(network, TrainingData(*empty), SETTINGS)
        assert _equal(_weights(network), _weights(_network()))


def test_denormals_are_flushed_while_it_lasts_and_not_after() -> None:
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    with flushed_denormals():
        assert float(tiny * 1) == 0.0
        with flushed_denormals():
            pass
        assert float(tiny * 1) == 0.0
    assert float(tiny * 1) != 0.0


class _Viewing(nn.Module):
    """Flattens its feature map by a view, which channels-last memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)), 4)
        return self.head(features.view(len(x), -1))


def test_a_network_that_views_its_features_is_trained_in_contiguous_memory() -> None:
    train, validation = _splits()
    assert fastest_memory_format(_Viewing(), train) is torch.contiguous_format
    assert fastest_memory_format(_network(), train) is torch.channels_last
    assert len(fit(_Viewing(), TrainingData(train, validation), FitSettings(steps=2, batch_size=16)).epochs) == 1


def test_a_network_is_in_its_fastest_memory_format_for_a_while() -> None:
    train, _ = _splits()
    network = _network()
    weight = next(part.weight for part in network.modules() if isinstance(part, nn.Conv2d))
    with in_fastest_memory_format(network, train) as found:
        assert found is torch.channels_last
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert weight.is_contiguous()


def test_batches_too_small_for_batch_norm_are_refused() -> None:
    train, validation = _splits()
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(DataError, match="more than one value for each channel, batch_size 1 does not"):
        fit(network, TrainingData(train, validation), FitSettings(steps=2, batch_size=1))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler, there is none")
def test_a_compiled_network_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "compile", lambda module, real=torch.compile: seen.append(1) or real(module))
    compiled, plain = _network(), _network()
    compiled[3] = plain[3] = nn.Identity()  # what dropout draws is another thing when compiled
    settings = replace(SETTINGS, steps=6)
    got = fit(compiled, _splits(), replace(settings, compiled=True))
    wanted = fit(plain, _splits(), settings)
    assert [one.loss for one in got.epochs] == pytest.approx([one.loss for one in wanted.epochs], rel=1e-3)
    assert seen == [1]


def test_a_network_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: nn.Module) -> object:
        def forward(_images: Tensor) -> Tensor:
            raise TorchDynamoException("no compiler here")

        return forward

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(StageError, match=r"torch\.compile must be able to compile the network, it is not: no compiler"):
        fit(_network(), _splits(), replace(SETTINGS, compiled=True))


def test_a_teacher_of_other_classes_is_refused() -> None:
    teacher = _network()
    teacher[6] = nn.Linear(32, 5)
    with pytest.raises(ModelError, match=r"teaches, \[\(3,\)\] an image, it has \[\(5,\)\]"):
        fit(_network(), _splits(), SETTINGS, Distillation(teacher.eval(), 0.5, 2.0))


def test_a_frozen_network_is_refused() -> None:
    train, validation = _splits()
    with pytest.raises(ModelError, match="must have a parameter that requires a gradient"):
        fit(_network().requires_grad_(False), TrainingData(train, validation), SETTINGS)


def test_bfloat16_that_is_emulated_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.cpu.get_capabilities()
    for there in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {**known, "avx512_bf16": there})
        monkeypatch.setattr(device_module.platform, "machine", lambda: "x86_64")
        assert device_module.has_bf16() is there
    monkeypatch.setattr(device_module.platform, "machine", lambda: "aarch64")
    assert device_module.has_bf16() == bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_half_precision_needs_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_bf16", lambda: False)
    with pytest.raises(StageError, match="precision bf16 must be one that this CPU has instructions for, it has"):
        fit(_network(), _splits(), replace(SETTINGS, precision="bf16"))


def test_half_precision_learns_as_well_with_full_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_bf16", lambda: True)
    seen: list[torch.dtype] = []
    module, plain = _network(), _network()
    module[0].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    teacher = Distillation(_network(1).eval(), 0.5, 2.0)
    result = fit(module, _splits(), replace(SETTINGS, precision="bf16"), teacher)
    full = fit(plain, _splits(), SETTINGS, teacher)
    assert torch.bfloat16 in seen[:3]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert result.epochs[-1].loss == pytest.approx(full.epochs[-1].loss, rel=0.05)
    assert result.epochs[-1].loss != full.epochs[-1].loss


def test_losses_read_for_several_steps_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, late, resumed = _network(), _network(), _network()
    wanted = fit(plain, _splits(), SETTINGS)
    monkeypatch.setattr(loop_module, "loss_sync_interval", lambda _device: 3)  # of 4 steps an epoch
    got = fit(late, _splits(), SETTINGS)
    assert _records(got) == _records(wanted)
    assert _equal(_weights(late), _weights(plain))
    state = tmp_path / "state.pt"
    settings = replace(SETTINGS, save_minutes=0.0)
    with pytest.raises(Killed):
        fit(_network(), _splits(), settings, state_file=StateFile(state), progress=_KillsIn(2, 3))
    assert _records(fit(resumed, _splits(), settings, state_file=StateFile(state))) == _records(wanted)
    assert _equal(_weights(resumed), _weights(plain))


@pytest.mark.parametrize("together", [1, 3])
def test_a_broken_loss_is_named_by_its_step_however_late_it_is_read(
    monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(loop_module, "loss_sync_interval", lambda _device: together)
    module, steps = _network(), []

    def broken(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        steps.append(module.training)
        return output * float("nan") if sum(steps) >= 5 else output

    module.register_forward_hook(broken)
    with pytest.raises(NonFinite, match="got nan at step 5 of 12"):
        fit(module, _splits(), SETTINGS)


def test_fp16_scales_the_loss_and_learns_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop_module, "require_precision", lambda *_: None)  # which refuses it on the CPU
    settings = replace(SETTINGS, precision="fp16", gradient_clip=5.0)
    half, plain = _network(), _network()
    result = fit(half, _splits(), settings)
    full = fit(plain, _splits(), replace(SETTINGS, gradient_clip=5.0))
    assert result.epochs[-1].loss == pytest.approx(full.epochs[-1].loss, rel=0.1)
    assert result.epochs[-1].loss != full.epochs[-1].loss
    state, resumed = tmp_path / "state.pt", _network()
    with pytest.raises(Killed):
        fit(
            _network(),
            _splits(),
            replace(settings, save_minutes=0.0),
            state_file=StateFile(state),
            progress=_KillsIn(2, 3),
        )
    scale = torch.load(read_state(state), weights_only=True)["scaler"]["scale"]
    assert scale > 1
    fit(resumed, _splits(), settings, state_file=StateFile(state))
    assert _equal(_weights(resumed), _weights(half))


class _Breaks:
    """Hooks that set one weight of a layer at the end of a step."""

    def __init__(self, layer: nn.Linear, last: int, value: str) -> None:
        self.layer, self.last, self.value = layer, last, float(value)
        self.on_step_begin = self.on_gradients = lambda step: None
        self.parameters = self.state_dict = self.load_state_dict = lambda *_: {}

    def on_step_end(self, step: int) -> None:
        if step == self.last:
            self.layer.weight.data[0, 0] = self.value


class _Recorder:
    """Hooks that note when they are called and what the loop had done by then, and take the last layer's gradient."""

    def __init__(self, layer: nn.Linear, dies_after: int | None = None) -> None:
        self.layer, self.dies_after = layer, dies_after
        self.calls: list[tuple[str, int, bool]] = []
        self.weight = layer.weight.detach().clone()
        self.restored: dict[str, int] | None = None

    def parameters(self) -> tuple[()]:
        return ()

    def on_step_begin(self, step: int) -> None:
        self.calls.append(("begin", step, self.layer.weight.grad is None))

    def on_gradients(self, step: int) -> None:
        assert self.layer.weight.grad is not None
        self.calls.append(("gradients", step, bool(self.layer.weight.grad.any())))
        self.layer.weight.grad.zero_()

    def on_step_end(self, step: int) -> None:
        self.calls.append(("end", step, torch.equal(self.layer.weight, self.weight)))
        if step == self.dies_after:
            raise Killed

    def state_dict(self) -> dict[str, int]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.restored = state


def test_hooks_are_called_in_every_step_in_order_and_may_change_gradients() -> None:
    module = _network()
    hooks = _Recorder(module[-1])
    fit(module, _splits(), replace(SETTINGS, steps=3, weight_decay=0.0), hooks=hooks)
    # without its gradient and without decay the layer stays as it was
    assert hooks.calls == [(when, step, True) for step in range(3) for when in ("begin", "gradients", "end")]


def test_what_hooks_remember_goes_into_the_state_and_back(tmp_path: Path) -> None:
    settings, state = replace(SETTINGS, steps=4, save_minutes=0.0), tmp_path / "state.pt"
    module = _network()
    with pytest.raises(Killed):
        fit(module, _splits(), settings, state_file=StateFile(state), hooks=_Recorder(module[-1], dies_after=2))
    again = _network()
    hooks = _Recorder(again[-1])
    fit(again, _splits(), settings, state_file=StateFile(state), hooks=hooks)
    assert hooks.restored == {"calls": 6}  # the state is that after the second step
    assert hooks.calls[0][:2] == ("begin", 2)


class _ReachesOptimizer(_Recorder):
    """Hooks that note the momentum of the layer's weight when they get the optimizer, and when they are called."""

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.at_first = optimizer, self.momentum(optimizer)

    def momentum(self, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        return optimizer.state.get(self.layer.weight, {}).get("momentum_buffer")

    def on_gradients(self, step: int) -> None:
        self.calls.append(("gradients", step, True))


def test_hooks_may_have_the_optimizer_with_its_saved_state(tmp_path: Path) -> None:
    settings, state = replace(SETTINGS, steps=4, save_minutes=0.0), tmp_path / "state.pt"
    module, again = _network(), _network()
    before = _ReachesOptimizer(module[-1], dies_after=2)
    with pytest.raises(Killed):
        fit(module, _splits(), settings, state_file=StateFile(state), hooks=before)
    assert before.at_first is None
    assert before.momentum(before.optimizer) is not None
    hooks = _ReachesOptimizer(again[-1])
    fit(again, _splits(), settings, state_file=StateFile(state), hooks=hooks)
    assert hooks.at_first is not None
    assert hooks.at_first.abs().max() > 0


class _FiveAxes(nn.Module):
    """Convolves an image's channels as a volume, with a parameter and a buffer of five axes and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.conv, self.twin = nn.Conv3d(1, 2, 3, padding=1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
        self.twin.weight = self.conv.weight
        self.gain = nn.Parameter(torch.ones(1, 2, 3, 1, 1))
        self.register_buffer("offset", torch.zeros(1, 2, 3, 1, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        volume = self.volume(x[:, None]) * self.gain + self.offset
        return self.head(self.twin(self.conv(volume.flatten(1, 2))).mean((2, 3)))


def test_only_tensors_of_four_axes_become_channels_last() -> None:
    train, validation = _splits()
    network = _FiveAxes()
    weight, volume = network.conv.weight, network.volume.weight
    with in_fastest_memory_format(network, train) as found:
        assert found is torch.channels_last
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert volume.is_contiguous()
        assert network.twin.weight is network.conv.weight is weight
    assert weight.is_contiguous()
    assert len(fit(network, TrainingData(train, validation), FitSettings(steps=2, batch_size=16)).epochs) == 1


def test_a_changed_bit_of_a_saved_state_is_noticed(tmp_path: Path) -> None:
    """torch reads most of them without a word, and training would go on with other weights."""
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(_network(), _splits(), SETTINGS, state_file=StateFile(state), progress=_KillsIn(2, 1))
    whole = state.read_bytes()
    read_state(state)
    for place in range(30, len(whole), max(1, len(whole) // 40)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        state.write_bytes(changed)
        with pytest.raises(ValueError, match="differs from its digest"):
            read_state(state)
