"""The support matrix finds what is wrong, keeps what it knows, and lists every network it should."""

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import nets
import pytest
from exported import exported
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
MODULES = ("support_matrix", "support_networks", "support_table", "support_trial")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the matrix, which lie beside each other outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield {name: __import__(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def tried(trial: ModuleType, module: nn.Module, share: float = 0.5) -> dict[str, Any]:
    record: dict[str, Any] = trial.try_module(lambda _: (module, nets.EXAMPLE), (share,))
    return record


def steps(record: dict[str, Any]) -> list[str]:
    return [failure["step"] for failure in record["failures"]]


def test_every_classifier_of_torchvision_is_listed_or_left_out(modules: dict[str, ModuleType]) -> None:
    from torchvision import models

    networks = modules["support_networks"]
    listed = [entry.name for entry in networks.listed("torchvision")]
    out = [name for names in networks.left_out("torchvision").values() for name in names]
    assert len(set(listed)) == len(listed)
    assert set(listed) | set(out) == set(models.list_models(module=models))
    assert not set(listed) & set(out)
    for name in ("segmentation", "detection", "video"):
        package = getattr(models, name)
        out = [one for names in networks.left_out(name).values() for one in names]
        assert {*(entry.name for entry in networks.listed(name)), *out} == set(models.list_models(module=package))


def test_sixty_families_of_timm_are_listed_by_names_that_exist(modules: dict[str, ModuleType]) -> None:
    entries = modules["support_networks"].listed("timm")
    assert len({entry.family for entry in entries}) >= 60
    timm = pytest.importorskip("timm")
    assert {entry.name for entry in entries} <= set(timm.list_models())


def test_entries_survive_json_and_take_a_size(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    networks = modules["support_networks"]
    for name in ("torchvision", "video"):
        for entry in networks.listed(name):
            assert networks.entry_of(json.loads(json.dumps(entry.to_dict()))) == entry
    assert {entry.size for entry in networks.listed("torchvision", size=96)} == {96}
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.onnx").touch()
    (found,) = networks.listed("onnx", tmp_path)
    assert (found.key, found.path) == ("onnx/a.onnx", str(tmp_path / "inner" / "a.onnx"))


def test_detectors_and_segmenters_return_tensors(modules: dict[str, ModuleType]) -> None:
    networks = modules["support_networks"]
    entry = networks.Entry("detection", "ssdlite320_mobilenet_v3_large", "SSDlite", 64)
    module, shape, _ = networks.build(entry)
    outputs = module(nets.torch.zeros(1, *shape))
    assert len(outputs) > 1
    assert all(isinstance(output, Tensor) for output in outputs)
    entry = networks.Entry("segmentation", "lraspp_mobilenet_v3_large", "LR-ASPP", 64)
    module, shape, own = networks.build(entry)
    assert tuple(module(nets.torch.zeros(1, *shape)).shape) == (1, 21, 64, 64)
    entry = networks.Entry("detection", "fasterrcnn_mobilenet_v3_large_320_fpn", "Faster R-CNN", 64)
    module, shape, _ = networks.build(entry)
    assert [output.shape[1] for output in module(nets.torch.zeros(1, *shape))] == [15] * 3 + [60] * 3
    assert own != shape == (3, 64, 64)


def test_a_whole_trial_has_its_figures(modules: dict[str, ModuleType]) -> None:
    record = tried(modules["support_trial"], nets.build("residual"))
    assert record["failures"] == []
    assert list(record["seconds"]) == ["load", "inspect", "cut", "compare", "export", "parity", "reload"]
    (cut,) = record["cuts"]
    assert cut["reached"] * record["macs"] == pytest.approx(cut["file_macs"])
    assert record["groups"] + sum(record["uncut"].values()) == 4
    assert record["peak_memory_mb"] > 100


def test_a_wrong_cut_is_found(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    trial = modules["support_trial"]
    right = trial.remove_channels

    def shifted(module: nn.Module, edit: Any, example: Tensor) -> nn.Module:
        removed = {name: tuple((index + 1) % 16 for index in indices) for name, indices in edit.removed.items()}
        return right(module, trial.RemoveChannels(removed), example)

    monkeypatch.setattr(trial, "remove_channels", shifted)
    record = tried(trial, nets.build("residual"))
    assert steps(record) == ["compare"]
    assert "must equal the original with its channels masked" in record["failures"][0]["reason"]


def test_a_comparison_that_says_nothing_is_a_failure(modules: dict[str, ModuleType]) -> None:
    class Deaf(nn.Module):
        """Nothing of what its convolutions compute reaches the output."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.heard, self.ignored = nn.Linear(3, 4), nn.Linear(16, 4)
            nn.init.zeros_(self.ignored.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.heard(x.mean((2, 3))) + self.ignored(self.second(self.first(x)).mean((2, 3)))

    record = tried(modules["support_trial"], Deaf())
    assert steps(record) == ["compare"]
    assert "Silencing channels must change the outputs" in record["failures"][0]["reason"]


def test_what_cannot_be_reached_is_a_failure_and_cut_as_far_as_it_goes(modules: dict[str, ModuleType]) -> None:
    record = tried(modules["support_trial"], nets.build("chain"), share=0.001)
    assert steps(record) == ["cut"]
    assert "cannot be reached" in record["failures"][0]["reason"]
    (cut,) = record["cuts"]
    assert cut["reached"] == pytest.approx(record["least_share"])
    assert cut["parity"] < 1e-4


def test_networks_that_go_no_further(modules: dict[str, ModuleType]) -> None:
    trial = modules["support_trial"]
    nothing = tried(trial, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)))
    assert (steps(nothing), nothing["groups"]) == (["inspect"], 0)
    wrong = tried(trial, nn.Linear(5, 4))
    assert steps(wrong) == ["load"]
    assert wrong["failures"][0]["reason"].startswith("RuntimeError: ")
    chain = nets.build("chain")
    nn.init.constant_(chain.head.weight, float("nan"))
    assert "must be finite" in tried(trial, chain)["failures"][0]["reason"]


def test_what_is_to_be_tried(modules: dict[str, ModuleType]) -> None:
    matrix, networks = modules["support_matrix"], modules["support_networks"]
    entries = networks.listed("segmentation")
    records = {entries[0].key: {"failures": []}, entries[1].key: {"failures": [{"step": "cut", "reason": ""}]}}
    assert matrix.wanted(entries, records, [], "missing") == entries[2:]
    assert matrix.wanted(entries, records, [], "failed") == entries[1:]
    assert matrix.wanted(entries, records, [], "all") == entries
    only = matrix.wanted(entries, {}, ["fcn_*"], "missing")
    assert [entry.name for entry in only] == [entry.name for entry in entries if fnmatch(entry.name, "fcn_*")]


@pytest.mark.parametrize(
    ("code", "step", "reason"),
    [
        ('print(\'{"step": "load"}\', flush=True); import time; time.sleep(60)', "load", "it did not end within 2 s"),
        ("import sys; sys.exit('no such thing')", "start", "its process ended with exit code 1: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "start", "its process ended by signal 9"),
    ],
)
def test_a_process_that_ends_early_is_a_failure(
    modules: dict[str, ModuleType], code: str, step: str, reason: str
) -> None:
    entry = modules["support_networks"].Entry("timm", "a", "A")
    record = modules["support_matrix"].try_apart(entry, 2.0, (sys.executable, "-c", code))
    assert record["failures"] == [{"step": step, "reason": reason}]
    assert (record["family"], record["seconds"]) == ("A", {})


def test_a_network_in_a_process_of_its_own(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    matrix = modules["support_matrix"]
    entry = modules["support_networks"].Entry("torchvision", "no_such_network", "None")
    record = matrix.try_apart(entry, 120.0)
    assert steps(record) == ["load"]
    assert "no_such_network" in record["failures"][0]["reason"]
    results = matrix.Results(tmp_path / "support.json")
    results.add(entry, record)
    again = matrix.Results(tmp_path / "support.json")
    assert again.records == {entry.key: record}
    assert "torch" in json.loads((tmp_path / "support.json").read_text("utf-8"))["environment"]


def test_a_process_ends_with_the_one_that_started_it(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, parents = modules["support_trial"], iter([7, 7, 1])
    monkeypatch.setattr(trial.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(trial.os, "_exit", lambda code: sys.exit(code))
    monkeypatch.setattr(trial.time, "sleep", lambda _: None)
    with pytest.raises(SystemExit, match="1"):
        trial._end_with(7)
    assert next(parents, None) is None


def test_the_page_has_every_network_and_groups_failures(modules: dict[str, ModuleType]) -> None:
    good = {"failures": [], "seconds": {"inspect": 1.0, "cut": 2.0, "export": 3.0}, "family": "A", "input": [3, 64, 64],
            "own_input": [3, 224, 224], "macs": 2_000_000_000, "params": 11_000_000, "groups": 3, "blocks": 1,
            "least_share": 0.05, "uncut": {"it has only 3 channels in 3 parts": 2}, "peak_memory_mb": 1500,
            "cuts": [{"reached": 0.7, "difference": 1e-15, "parity": 1e-6}]}  # fmt: skip
    reasons = [f"Layer '{name}' has {count} channels." for name, count in (("a.b", 3), ("c", 12))]
    bad = [
        {"failures": [{"step": "load", "reason": reason}], "seconds": {}, "family": "B", "cuts": []}
        for reason in reasons
    ]
    networks = {"torchvision/good": good, "torchvision/bad": bad[0], "timm/worse": bad[1]}
    page = modules["support_table"].render({"environment": {"torch": "2.0", "cores": 2}, "networks": networks})
    assert "| torchvision, classification | 1 of 2 | 50.0% | 1 | 0 | 1e-15 | 1e-06 |" in page
    assert "- **load** (2): `Layer '…' has n channels.`\n  - `bad: Layer 'a.b' has 3 channels.`\n  - `worse: " in page
    assert (
        "| good | A | 3 x 64 x 64 * | 2.00 | 11.0 | 3 of 5 | 1 | 0.05 | 0.70 | 1e-15 | 1e-06 | 1.0 | 2.0 | 3.0 | 1.5 |"
        in page
    )
    assert page.count("| failed: load |") == 2
    assert "| it has only n channels in n parts | 2 | 1 | good |" in page
    assert "vit_b_16" in page
    for line in page.splitlines():
        assert "timm, one small network" not in line or "0 of 1" in line or line.startswith("## ")


def test_an_onnx_file_keeps_its_own_weights(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    trial, networks = modules["support_trial"], modules["support_networks"]
    chain = nets.build("chain")
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    monkeypatch.setattr(trial, "build", lambda _: (chain, (3, 16, 16), (3, 16, 16)))
    monkeypatch.setattr(trial, "SHARES", ())
    record = trial.try_network(networks.Entry("onnx", "chain.onnx", "file", None, str(exported("chain"))))
    assert record["failures"] == []
    assert all(value.equal(before[name]) for name, value in chain.state_dict().items())
