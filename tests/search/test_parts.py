"""A stage that is stopped at any of its parts goes on there: nothing is done twice, and the result is the same."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import RecordingProgress, make_context, make_model, make_splits
from torch import nn

import compress.search.parts as parts_module
from compress.config.schema.low_rank import LowRankConfig
from compress.config.schema.prune import PruneConfig, SlimConfig
from compress.config.schema.targets import TargetConfig
from compress.data.from_config import Splits
from compress.model.tensors import weights_digest
from compress.search.parts import FOLDER, Part, Parts
from compress.stages.low_rank import LowRankStage
from compress.stages.prune import PruneStage
from compress.stages.slim import SlimStage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return make_splits(tmp_path_factory.mktemp("data"), calibration=48, bright=True)


class Counted:
    """Which parts are made; stops the stage after one of them was kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.stop_after: int | None = None
        add = Parts.add

        def counting(parts: Parts, key: Mapping[str, Any], part: Part) -> Part:
            kept = add(parts, key, part)
            self.made.append(str(key))
            if len(self.made) == self.stop_after:
                raise KeyboardInterrupt
            return kept

        monkeypatch.setattr(Parts, "add", counting)


def prune(folder: Path, data: Splits, **config: Any) -> tuple[dict[str, torch.Tensor], Any]:
    folder.mkdir(exist_ok=True)
    ctx, _ = make_context(folder, data)
    settings = {"target": TargetConfig(macs=0.5), "multiple_of": 1, "score_images": 32, "blocks": "auto", **config}
    model, record = PruneStage(PruneConfig(stage="prune", **settings)).run(make_model("residual", folder), ctx)
    return model.module.state_dict(), (record, model.recipe.to_json())


def is_same(one: tuple[dict[str, torch.Tensor], Any], other: tuple[dict[str, torch.Tensor], Any]) -> bool:
    same_weights = one[0].keys() == other[0].keys() and all(torch.equal(one[0][n], other[0][n]) for n in one[0])
    return same_weights and one[1] == other[1]


@pytest.mark.parametrize("config", [{}, {"criterion": "taylor", "blocks": 1, "residual": "auto"}])
def test_prune_goes_on_after_every_part(
    tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    counted = Counted(monkeypatch)
    undisturbed = prune(tmp_path / "undisturbed", data, **config)
    whole = list(counted.made)
    assert len(whole) == len(set(whole)), "a part is made twice without any kill"
    kinds = {
        kind for kind in ("block", "scores", "order", "choice", "repair", "loss", "trial") if f"'{kind}'" in str(whole)
    }
    assert {"block", "scores", "choice", "repair"} <= kinds
    stops = range(1, len(whole) + 1, max(1, len(whole) // 6))
    for stop in stops:
        counted.made.clear()
        counted.stop_after = stop
        folder = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            prune(folder, data, **config)
        counted.stop_after = None
        assert is_same(prune(folder, data, **config), undisturbed), f"after part {stop} of {len(whole)}"
        assert counted.made == whole, "each part is made once, in the same order"


def test_slim_makes_no_part_twice_and_goes_on(tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)

    def slim(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
        folder.mkdir(exist_ok=True)
        ctx, _ = make_context(folder, data)
        config = SlimConfig.model_validate(
            {"stage": "slim", "target": {"macs": 0.5}, "multiple_of": 1, "score_images": 32}
        )
        model, record = SlimStage(config).run(make_model("residual", folder), ctx)
        return model.module.state_dict(), (record, model.recipe.to_json())

    undisturbed = slim(tmp_path / "undisturbed")
    whole = list(counted.made)
    assert len(whole) == len(set(whole))
    counted.made.clear()
    counted.stop_after = len(whole) - 2
    with pytest.raises(KeyboardInterrupt):
        slim(tmp_path / "stopped")
    counted.stop_after = None
    assert is_same(slim(tmp_path / "stopped"), undisturbed)
    assert counted.made == whole


@pytest.mark.parametrize("error_of", ["kernels", "outputs"])
def test_low_rank_goes_on(tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch, error_of: str) -> None:
    counted = Counted(monkeypatch)

    def factorise(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
        ctx, _ = make_context(folder, data)
        values = {"stage": "low_rank", "relative_error": 0.4, "multiple_of": 1, "error_of": error_of}
        model, record = LowRankStage(LowRankConfig.model_validate(values)).run(make_model("residual", folder), ctx)
        return model.module.state_dict(), (record, model.recipe.to_json())

    undisturbed = factorise(tmp_path / "undisturbed")
    whole = list(counted.made)
    for stop in (1, 2):
        counted.made.clear()
        counted.stop_after = stop
        with pytest.raises(KeyboardInterrupt):
            factorise(tmp_path / f"stopped{stop}")
        counted.stop_after = None
        assert is_same(factorise(tmp_path / f"stopped{stop}"), undisturbed)
        assert counted.made == whole


def test_other_settings_have_parts_of_their_own(tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    prune(tmp_path / "one", data, blocks=0)
    counted.made.clear()
    other = prune(tmp_path / "one", data, blocks=0, score_images=16)
    assert any("'scores'" in key for key in counted.made)
    assert is_same(other, prune(tmp_path / "two", data, blocks=0, score_images=16))


def test_a_part_comes_back_with_its_record_and_the_random_state(tmp_path: Path) -> None:
    listener = RecordingProgress()
    parts = Parts(tmp_path, listener)
    tensors = {"a.b": torch.randn(2, 3), "count": torch.tensor(7), "empty": torch.zeros(0), "order": torch.arange(3)}

    def make() -> Part:
        torch.rand(5)
        return Part({"loss": float("nan"), "names": ["ü", None], "x": 0.1}, tensors)

    first = parts.keep({"part": 1}, make)
    following = torch.rand(3)
    torch.manual_seed(1)
    again = Parts(tmp_path, listener).keep({"part": 1}, lambda: pytest.fail("made again"))
    assert torch.equal(torch.rand(3), following), "what is drawn afterwards is the same"
    assert repr(again.record) == repr(first.record)
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)
    assert Parts(tmp_path, listener).find({"part": 2}) is None


def test_a_damaged_part_is_made_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path, RecordingProgress())
    parts.add({}, Part([1], {"a": torch.arange(4)}))
    (path,) = (tmp_path / FOLDER).iterdir()
    whole = path.read_bytes()
    damages: list[Callable[[bytes], bytes]] = [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"]
    damages += [
        lambda data, at=at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(whole), 97)
    ]
    for damage in damages:
        path.write_bytes(damage(whole))
        listener = RecordingProgress()
        assert Parts(tmp_path, listener).find({}) is None
        assert listener.warnings == ["A part of an interrupted run is damaged and is made again."]


def test_of_several_processes_none_goes_on_from_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them finds another may not; they would no longer do the same."""
    Parts(tmp_path, RecordingProgress()).add({}, Part([1]))

    class Two:
        size = 2

    monkeypatch.setattr(parts_module, "current_ranks", Two)
    assert Parts(tmp_path, RecordingProgress()).find({}) is None
    Parts(tmp_path, RecordingProgress()).add({"other": 1}, Part([1]))
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_weights_digest_is_that_of_names_and_values() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    before = weights_digest(module)
    assert weights_digest(module.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        module[1].running_mean[0] = 1e-30
    assert weights_digest(module) != before
