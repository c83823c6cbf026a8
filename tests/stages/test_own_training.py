"""Fine-tuning by code of the user's own, and by weights that were trained elsewhere."""

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import make_context, make_model, make_splits

from compress.config.schema.training import FinetuneConfig
from compress.errors import ArtifactError, ModelError, NonFinite
from compress.search.teacher import LoadedTeacher
from compress.stages.finetune import FinetuneStage

LOOP = """
import torch
from torch.nn import functional as F

def train(model, context, rate=0.05, epochs=2):
    state_file = context.folder / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state["epoch"] + 1
        model.load_state_dict(state["model"])
        context.log(f"resumed at epoch {first}")
    assert model.training
    assert not context.teacher.training
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9)
    for epoch in range(first, epochs):
        for images, labels in context.batches("train", 16, epoch, flip=True):
            with torch.no_grad():
                taught = context.teacher(images)
            optimizer.zero_grad()
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels) + F.mse_loss(outputs, taught)
            loss.backward()
            optimizer.step()
        context.log_metrics(epoch, loss=loss.item())
        torch.save({"model": model.state_dict(), "epoch": epoch}, state_file)
    return model

def killed(model, context):
    train(model, context, epochs=1)
    raise KeyboardInterrupt

def returns_nothing(model, context):
    train(model, context)

def returns_state(model, context):
    return train(model, context).state_dict()

def raises(model, context):
    return model.nothing

def another(model, context):
    return torch.nn.Linear(2, 2)

def infinite(model, context):
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    return model

def with_loader(model, context):
    from torch.utils.data import DataLoader
    data = context.dataset("train")
    images, labels = next(iter(DataLoader(data, batch_size=8)))
    assert images.shape == (8, 3, 16, 16), images.shape
    assert labels.dtype == torch.int64
    first, _ = next(context.batches("validation", 4))
    assert torch.equal(context.dataset("validation")[0][0], first[0])
    return model
"""


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(textwrap.dedent(LOOP))
    return file


def _run(name: str, loop: Path, tmp_path: Path, **kwargs: object):
    config = FinetuneConfig(stage="finetune", own=f"{loop}:{name}", kwargs=kwargs)
    data = make_splits(tmp_path, calibration=48, bright=True)
    (tmp_path / "stage").mkdir(exist_ok=True)
    ctx, listener = make_context(tmp_path / "stage", data)
    model = make_model("chain", tmp_path)
    ctx = replace(ctx, teacher=LoadedTeacher(model.module))
    return FinetuneStage(config).run(model, ctx), model, listener


def test_the_loop_trains_the_network_and_leaves_the_given_one(loop: Path, tmp_path: Path) -> None:
    (trained, record), given, _ = _run("train", loop, tmp_path, rate=0.02)
    assert record.own.endswith("train.py:train")
    assert 0 <= record.validation_before <= 1
    assert not trained.module.training
    before = given.module.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained.module.state_dict().items())
    assert trained.recipe == given.recipe


def test_a_killed_loop_goes_on_from_its_folder(loop: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got KeyboardInterrupt"):  # not a real Ctrl-C, which passes
        _run("killed", loop, tmp_path)
    (resumed, _), _, listener = _run("train", loop, tmp_path, epochs=2)
    assert "resumed at epoch 1" in listener.notes
    other = tmp_path / "other"
    other.mkdir()
    (undisturbed, _), _, _ = _run("train", loop, other, epochs=2)
    for name, value in undisturbed.module.state_dict().items():
        assert value.shape == resumed.module.state_dict()[name].shape


@pytest.mark.parametrize("name", ["returns_state", "with_loader"])
def test_other_ways_of_a_loop(name: str, loop: Path, tmp_path: Path) -> None:
    (trained, _), _, _ = _run(name, loop, tmp_path)
    assert all(value.isfinite().all() for value in trained.module.state_dict().values())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("returns_nothing", ModelError, r"must return the trained network or its state dict, got NoneType"),
        ("raises", ModelError, r"Training '.*:raises' must train the network, got AttributeError.*train.py:\d+"),
        ("another", ModelError, r"must return a network of the same structure"),
        ("infinite", NonFinite, r"must return finite weights"),
        ("unknown", ModelError, r"unknown"),
    ],
)
def test_a_loop_that_gives_something_else_is_refused(
    name: str, kind: type[Exception], message: str, loop: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        _run(name, loop, tmp_path)


def test_weights_that_were_trained_elsewhere_are_loaded_strictly(tmp_path: Path) -> None:
    model = make_model("chain", tmp_path)
    state = {
        name: value * 1.5 if value.is_floating_point() else value for name, value in model.module.state_dict().items()
    }
    torch.save(state, tmp_path / "trained.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    ctx, _ = make_context(tmp_path, make_splits(tmp_path, calibration=48, bright=True))

    def run(file: str):
        return FinetuneStage(FinetuneConfig(stage="finetune", trained=str(tmp_path / file))).run(model, ctx)

    trained, record = run("trained.pt")
    for name, value in trained.module.state_dict().items():
        assert torch.equal(value, state[name])
    assert "validation_top1_after" in record.to_dict()
    with pytest.raises(ArtifactError, match=r"other.pt.*(?s:.)*slim network of this run"):
        run("other.pt")
    with pytest.raises(ArtifactError, match="does not exist"):
        run("missing.pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own": "a.py:b", "epochs": 2}, "epochs must be left out with own"),
        ({"epochs": 1, "kwargs": {"a": 1}}, "kwargs must be left out without own"),
        ({}, "exactly one of epochs, steps"),
        ({"own": "a b"}, "own"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(stage="finetune", **settings)
