"""Functions on networks in memory, from inspection to a verdict, and bad input to each."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import compress
from compress.errors import ArtifactError, BudgetUnreachable, ConfigError, DataError, ExportFailed, ModelError

SIZE = 12


class Block(nn.Module):
    """A small residual network."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def samples() -> TensorDataset:
    """Images of three classes, told by their colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    images = 0.3 * torch.randn(96, 3, SIZE, SIZE, generator=generator)
    images[torch.arange(96), labels] += 1.0
    return TensorDataset(images, labels)


@pytest.fixture(scope="module")
def trained(samples: TensorDataset) -> nn.Module:
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(6):
        for images, labels in DataLoader(samples, 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.zeros(1, 3, SIZE, SIZE)


@pytest.fixture(scope="module")
def slim(trained: nn.Module, samples: TensorDataset, example: torch.Tensor) -> nn.Module:
    return compress.prune(trained, example, macs=0.5, data=DataLoader(samples, 16), multiple_of=1, progress=False)


def _params(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def test_inspect_names_groups_and_the_least_macs(trained: nn.Module, example: torch.Tensor) -> None:
    what = compress.inspect(trained, example, progress=False)
    assert what.potential is not None
    assert {group.name for group in what.potential.groups} == {"body.0", "stem.0"}
    assert 0 < what.potential.least_share < 1
    page = what._repr_html_()
    assert page.count("<table>") == page.count("</table>") > 0
    assert "prunable channel groups" in page


def test_prune_returns_a_smaller_network_and_leaves_the_given_one(
    trained: nn.Module, slim: nn.Module, example: torch.Tensor
) -> None:
    assert _params(slim) < 0.7 * _params(trained)
    assert slim.stem[0].out_channels < 16 or slim.body[0].out_channels < 24
    assert (trained.stem[0].out_channels, trained.body[0].out_channels) == (16, 24)
    assert not slim.training
    assert all(value.requires_grad for value in slim.parameters())
    assert slim(example).shape == (1, 3)
    assert type(slim).__name__ == "Block"
    share = compress.inspect(slim, progress=False).potential.macs / compress.inspect(
        trained, example, progress=False
    ).potential.macs  # fmt: skip
    assert share <= 0.5


def test_a_slim_network_is_pruned_again_against_the_same_baseline(
    trained: nn.Module, slim: nn.Module, samples: TensorDataset, example: torch.Tensor
) -> None:
    again = compress.prune(slim, macs=0.3, data=samples, multiple_of=1, progress=False)
    macs = [compress.inspect(one, example, progress=False).potential.macs for one in (trained, again)]
    assert macs[1] <= 0.3 * macs[0]


def test_kept_layers_keep_their_channels(trained: nn.Module, samples: TensorDataset, example: torch.Tensor) -> None:
    slim = compress.prune(trained, example, macs=0.8, data=samples, keep=["stem.*"], multiple_of=1, progress=False)
    assert slim.stem[0].out_channels == 16
    assert slim.body[0].out_channels < 24


def test_only_some_layers_lose_channels_within_their_own_limits(
    trained: nn.Module, samples: TensorDataset, example: torch.Tensor
) -> None:
    def widths(**settings: object) -> tuple[int, int]:
        slim = compress.prune(trained, example, data=samples, progress=False, **{"multiple_of": 1, **settings})
        return slim.stem[0].out_channels, slim.body[0].out_channels

    assert widths(macs=0.8, only=["body.*"])[0] == 16
    assert widths(macs=0.95, limits={"body.*": {"min_width": 22}})[1] >= 22
    assert all(width % 8 == 0 for width in widths(macs=0.5, limits={"*": {"multiple_of": 8}}))
    for settings, message in (
        ({"only": ["nothing"]}, "only must name layers with prunable channels, 'nothing' names none"),
        ({"limits": {"nothing": {"min_width": 2}}}, "limits must name layers with prunable channels"),
        ({"limits": {"*": {}}}, "must hold at least one of max_removed_ratio, min_width, multiple_of"),
    ):
        with pytest.raises(ConfigError, match=message):
            widths(macs=0.7, **settings)


def test_latency_budgets_are_measured(trained: nn.Module, samples: TensorDataset, example: torch.Tensor) -> None:
    slim = compress.prune(
        trained, example, latency=0.9, data=samples, deploy={"threads": 1, "repeats": 10}, progress=False
    )
    assert _params(slim) < _params(trained)


def test_sensitivity_rises_towards_narrow_widths(
    trained: nn.Module, samples: TensorDataset, example: torch.Tensor
) -> None:
    found = compress.sensitivity(trained, example, data=samples, validation=samples, multiple_of=4, progress=False)
    assert {one.name for one in found.curves} == {"stem.0", "body.0"}
    for one in found.curves:
        assert one.widths[-1] in (16, 24)
        assert one.rises[-1] == 0.0
        assert all(wider <= narrower for narrower, wider in zip(one.rises, one.rises[1:], strict=False))
        assert one.rises[0] > 0.0
        assert len(one.errors) == len(one.widths)
    assert found.images == 96
    (title, columns, rows) = found.tables()[0]
    assert "96 validation images" in title
    assert len(columns) == len(rows[0]) == 5
    picture = found.to_svg()
    assert picture.startswith("<svg ")
    assert "var(" not in picture
    assert "body.0" in picture


def test_a_loop_of_ones_own_trains_the_slim_network(slim: nn.Module, samples: TensorDataset, tmp_path: Path) -> None:
    model = copy.deepcopy(slim).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for images, labels in DataLoader(samples, 32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    file = compress.export(model, tmp_path / "m.onnx")
    compress.save(model, tmp_path / "slim")
    again = compress.load(tmp_path / "slim", factory=Block)
    images = samples.tensors[0][:4]
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
        assert not torch.equal(again(images), slim(images))
    verdict = compress.verify(file, data=samples, reference=model, gates={"min": {"top1": 0.5}}, progress=False)
    assert verdict.passed


def test_finetune_learns_from_the_teacher(trained: nn.Module, slim: nn.Module, samples: TensorDataset) -> None:
    tuned = compress.finetune(
        slim, data=DataLoader(samples, 16), teacher=trained, epochs=2, batch_size=16, learning_rate=0.01, progress=False
    )
    assert _params(tuned) == _params(slim)
    changed = [name for name, value in tuned.state_dict().items() if not torch.equal(value, slim.state_dict()[name])]
    assert changed


def test_low_rank_factorises(trained: nn.Module, samples: TensorDataset, example: torch.Tensor) -> None:
    slim = compress.low_rank(trained, example, macs=0.8, data=samples, progress=False)
    assert _params(slim) < _params(trained)


def test_the_file_is_verified_against_the_baseline(
    trained: nn.Module, slim: nn.Module, samples: TensorDataset, tmp_path: Path
) -> None:
    file = compress.export(slim, tmp_path / "m.onnx")
    verdict = compress.verify(
        file,
        baseline=trained,
        reference=slim,
        data=DataLoader(samples, 16),
        gates={"max_drop": {"top1": 0.9}},
        repeats=5,
        resources=None,
        progress=False,
    )
    assert verdict.passed
    assert verdict.slim.macs <= 0.5 * verdict.baseline.macs
    statuses = {check.name: check.status for check in verdict.checks}
    assert statuses["parity"] == "pass"
    assert statuses["max_drop.top1"] == "pass"
    assert str(verdict).splitlines()[-1].startswith("PASSED: ")
    assert "top1 (%)" in verdict._repr_html_()
    failed = compress.verify(file, data=samples, gates={"max_size_mb": 0.0001}, resources=None, progress=False)
    assert failed.outcome == "failed"


@pytest.mark.parametrize("kind", ["tuples", "tensors", "mappings", "generator", "without targets"])
def test_data_come_in_every_usual_form(
    trained: nn.Module, samples: TensorDataset, example: torch.Tensor, kind: str
) -> None:
    images, labels = samples.tensors
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 96, 32)]
    data = {
        "tuples": batches,
        "tensors": (images, labels),
        "mappings": [{"images": x, "label": y} for x, y in batches],
        "generator": (batch for batch in batches),
        "without targets": [x for x, _ in batches],
    }[kind]
    slim = compress.prune(trained, example, macs=0.7, data=data, multiple_of=1, progress=False)
    assert _params(slim) < _params(trained)


def test_a_loss_of_ones_own_is_lowered(example: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    images = torch.rand(40, 3, SIZE, SIZE)
    slim = compress.prune(
        model, example, macs=0.6, data=(images, images), loss=nn.functional.l1_loss, multiple_of=1, progress=False
    )
    assert slim[0].out_channels < 16
    with torch.no_grad():
        assert np.isfinite(float(nn.functional.l1_loss(slim(images), images)))


class TwoInputs(nn.Module):
    """An image and a vector, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.features = nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16 + 4, 5)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.features(torch.relu(self.conv(image)))).mean((2, 3))
        return self.head(torch.cat([x, vector], 1))


def test_networks_of_several_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    images, vectors, labels = torch.rand(30, 3, 8, 8), torch.rand(30, 4), torch.arange(30) % 5
    data = DataLoader(TensorDataset(images, vectors, labels), 10)
    slim = compress.prune(model, (images[:1], vectors[:1]), macs=0.6, data=data, multiple_of=1, progress=False)
    assert slim(images[:2], vector=vectors[:2]).shape == (2, 5)
    file = compress.export(slim, tmp_path / "two.onnx")
    verdict = compress.verify(
        file, data=data, baseline=model, gates={"max_drop": {"top1": 1.0}}, resources=None, progress=False
    )
    assert verdict.outcome in ("passed", "inconclusive")


def test_wrapped_networks_are_unwrapped(trained: nn.Module, slim: nn.Module) -> None:
    assert compress.inspect(nn.DataParallel(slim), progress=False).potential is not None
    assert compress.inspect(torch.compile(slim), progress=False).potential is not None


def test_a_copy_of_a_slim_network_keeps_its_recipe_and_a_pickle_loses_it(slim: nn.Module, tmp_path: Path) -> None:
    compress.save(copy.deepcopy(slim), tmp_path / "copied")
    torch.save(slim, tmp_path / "pickle.pt")
    again = torch.load(tmp_path / "pickle.pt", weights_only=False)
    with pytest.raises(ModelError, match="this one has no recipe"):
        compress.save(again, tmp_path / "lost")


def test_run_takes_a_file_or_its_contents() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        compress.run("no_such.yaml", progress=False)
    with pytest.raises(ConfigError, match=r"pipeline.yaml.*stages"):
        compress.run({"name": "x"}, progress=False)


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, strange: torch.Tensor) -> torch.Tensor:
        return x + strange


def test_bad_input_is_refused_with_a_reason(
    trained: nn.Module, slim: nn.Module, samples: TensorDataset, example: torch.Tensor, tmp_path: Path
) -> None:
    images, labels = samples.tensors

    def prune(model: nn.Module = trained, sample: object = example, **given: object) -> None:
        compress.prune(model, sample, progress=False, **{"macs": 0.5, "data": samples, **given})

    with pytest.raises(ConfigError, match="one of macs, params, latency, latency_ms, size_mb must be given"):
        compress.prune(trained, example, data=samples, progress=False)
    with pytest.raises(ConfigError, match=r"^prune: target.macs must be .*1.5"):
        prune(macs=1.5)
    with pytest.raises(ConfigError, match=r"^prune: criterion must be one of .*, got 'l3'"):
        prune(criterion="l3")
    with pytest.raises(ConfigError, match=r"^prune: .*critreion"):
        prune(critreion="l2")
    with pytest.raises(ConfigError, match="example must be given"):
        prune(sample=None)
    with pytest.raises(ConfigError, match="'nothing' names none"):
        prune(keep=["nothing"])
    with pytest.raises(ConfigError, match="loss and task must not both be given"):
        prune(loss=nn.functional.mse_loss, task=compress.Task())
    with pytest.raises(ConfigError, match="loss or task must be given"):
        prune(data=(images, images))
    with pytest.raises(ConfigError, match="data must be given"):
        prune(data=None)
    with pytest.raises(ModelError, match=r"must run on images.*strange"):
        prune(Nested())
    with pytest.raises(ModelError, match="model must be a network, got the class Block itself"):
        prune(Block)
    with pytest.raises(DataError, match=r"samples of shape \(3, 12, 12\), as example, got \(3, 9, 9\)"):
        prune(data=(torch.rand(20, 3, 9, 9), labels[:20]))
    with pytest.raises(DataError, match="'images' holds NaN or infinity"):
        prune(data=(torch.full_like(images, torch.nan), labels))
    with pytest.raises(DataError, match="must hold at least one image"):
        prune(data=[])
    with pytest.raises(DataError, match="'images' is uint8"):
        prune(data=(images.to(torch.uint8), labels))
    with pytest.raises(DataError, match="same number of samples"):
        prune(data=(images, labels[:5]))
    with pytest.raises(DataError, match="must give its batches, got ZeroDivisionError"):
        prune(data=(1 / 0 for _ in range(3)))
    with pytest.raises(BudgetUnreachable, match="cannot be reached"):
        prune(macs=0.001)
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        compress.export(slim, tmp_path / "m.pt")
    with pytest.raises(ExportFailed, match="differs from PyTorch by"):
        compress.export(slim, tmp_path / "m.onnx", tolerance=-1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="does not exist"):
        compress.verify(tmp_path / "m.onnx", data=samples, progress=False)
    changed = copy.deepcopy(slim)
    changed.head = nn.Linear(16, 9)
    with pytest.raises(ArtifactError, match="structure of the slim network was changed"):
        compress.export(changed, tmp_path / "m.onnx")
    compress.save(slim, tmp_path / "slim")
    with pytest.raises(ArtifactError, match="names no factory"):
        compress.load(tmp_path / "slim")
    with pytest.raises(ArtifactError, match="must be a new or empty folder"):
        compress.save(slim, tmp_path / "slim")


def test_progress_is_printed_unless_it_is_off(
    trained: nn.Module, example: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress.inspect(trained, example, progress=False)
    assert capsys.readouterr().out == ""
    compress.inspect(trained, example)
    assert "done in" in capsys.readouterr().out
