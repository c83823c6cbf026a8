"""Support of networks of other libraries: list, page, verdicts, and independence of the package from the libraries."""

import ast
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import nets
import pytest
import yaml
from torch import Tensor, nn

from compress.errors import InternalError, UnsupportedLayer

ROOT = Path(__file__).parents[2]
MODULES = ("other_libraries", "support_matrix", "support_networks", "support_table", "support_trial")
LISTS = yaml.safe_load((ROOT / "benchmarks" / "library_networks.yaml").read_text("utf-8"))
IMPORTED_AS = {"facenet-pytorch": "facenet_pytorch", "super-image": "super_image", "panns-inference": "panns_inference"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of the page, which lie beside each other outside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield {name: __import__(name) for name in MODULES}
    for name in (*MODULES, "library_networks"):
        sys.modules.pop(name, None)


def test_sixty_networks_are_listed(modules: dict[str, ModuleType]) -> None:
    networks = modules["support_networks"]
    entries = [entry for library in networks.libraries() for entry in networks.listed_of_library(library)]
    assert len({entry.key for entry in entries}) == len(entries) >= 60
    for entry in entries:
        assert networks.entry_of(json.loads(json.dumps(entry.to_dict()))) == entry


def test_the_page_is_that_of_the_results(modules: dict[str, ModuleType]) -> None:
    values = json.loads((ROOT / "docs" / "other-libraries.json").read_text("utf-8"))
    page = (ROOT / "docs" / "other-libraries.md").read_text("utf-8")
    assert page == modules["other_libraries"].render(values)
    networks = modules["support_networks"]
    listed = {entry.key for library in networks.libraries() for entry in networks.listed_of_library(library)}
    assert set(values["networks"]) <= listed
    assert len(values["networks"]) >= 60


def test_the_page_has_versions_counts_and_reasons(modules: dict[str, ModuleType]) -> None:
    good = {"failures": [], "seconds": {}, "family": "A", "input": [1, 32, 32], "macs": 2_000_000, "params": 500_000,
            "groups": 3, "uncut": {"it has only 3 channels in 3 parts": 2}, "least_share": 0.05,
            "cuts": [{"reached": 0.7, "difference": 1e-15}, {"reached": 0.4, "parity": 1e-6}]}  # fmt: skip
    refusal = {"step": "load", "reason": "No prunable\nchannel group found.", "refused": True,
               "hint": "Do so."}  # fmt: skip
    wrong = {"step": "compare", "reason": "in /home/me/site-packages/monai/nets/a.py, line 3"}
    records = [good] + [{"failures": found, "seconds": {}, "family": "B", "cuts": []} for found in ([refusal], [wrong])]
    networks = dict(zip(("monai/a", "kornia/b", "kornia/c"), records, strict=True))
    page = modules["other_libraries"].render({"environment": {"torch": "2.0", "monai": "1.5"}, "networks": networks})
    assert "Made with torch 2.0.\n" in page
    assert "| monai | 1.5 | 1 | 0 | 0 |\n| kornia |  | 0 | 1 | 1 |\n| all |  | 1 | 1 | 1 |" in page
    assert "| kornia/b | refused | load | `No prunable channel group found.` Hint: `Do so.` |" in page
    assert "| kornia/c | failed | compare | `in nets/a.py, line 3` |" in page
    assert "| a | A | 1 x 32 x 32 | 2.0 | 0.50 | 3 of 5 | 0.05 | 0.70, 0.40 | 1e-15 | 1e-06 | passed |" in page


def test_a_refusal_of_a_cut_says_why_groups_are_not_prunable(modules: dict[str, ModuleType]) -> None:
    uncut = {"its channels are mixed by 'a' in 'b'": 2, "its channels are mixed by 'a' in 'c.d'": 3, "it is odd": 1}
    refusal = {"step": "cut", "reason": "Target 0.4 cannot be reached.", "refused": True}
    record = {"failures": [refusal], "seconds": {}, "family": "A", "cuts": [], "groups": 4, "uncut": uncut}
    page = modules["other_libraries"].render({"environment": {}, "networks": {"monai/a": record}})
    reasons = "`its channels are mixed by '…' in '…'` (5); `it is odd` (1)"
    assert f"`Target 0.4 cannot be reached.` 6 of 10 channel groups are not prunable: {reasons} |" in page


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize(
    ("code", "limit_s", "reason"),
    [
        ("print('no such thing', flush=True); os._exit(3)", 60.0, "its process ended with exit code 3: no such thing"),
        ("import time; time.sleep(60)", 0.5, "it did not end within 0 s"),
    ],
)
def test_a_process_that_ends_early_is_a_failure(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, code: str, limit_s: float, reason: str
) -> None:
    def end(_entry: object, say: Callable[[Any], None]) -> None:
        say({"step": "load"})
        exec(code, {"os": os})

    monkeypatch.setattr(modules["support_trial"], "try_network", end)
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        record = modules["other_libraries"].try_forked(modules["support_networks"].Entry("any", "a", "A"), limit_s)
    assert record["failures"] == [{"step": "load", "reason": reason}]
    assert record["family"] == "A"


def test_only_an_error_of_the_package_is_a_refusal(modules: dict[str, ModuleType]) -> None:
    trial = modules["support_trial"].Trial()
    for reason in (
        UnsupportedLayer("a"),
        InternalError("b"),
        ValueError("c"),
        modules["support_trial"].WrongResult("d"),
    ):
        trial.fail("cut", reason)
    assert [failure.get("refused", False) for failure in trial.record["failures"]] == [True, False, False, False]
    verdict = modules["other_libraries"].verdict
    assert verdict({"failures": []}) == "passed"
    assert verdict({"failures": trial.record["failures"][:1]}) == "refused"
    assert verdict(trial.record) == "failed"


def test_a_wrong_reload_is_found(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    trial = modules["support_trial"]

    def halved(path: Path) -> dict[str, Tensor]:
        return {name: value / 2 if value.is_floating_point() else value for name, value in read(path).items()}

    read = trial.read_weights
    monkeypatch.setattr(trial, "read_weights", halved)
    record = trial.try_module(lambda _: (nets.build("chain"), nets.EXAMPLE), (0.6, 0.5), exported=(0.5,))
    assert [failure["step"] for failure in record["failures"]] == ["reload"]
    assert "must equal the slim one" in record["failures"][0]["reason"]
    assert ["parity" in cut for cut in record["cuts"]] == [False, True]


@pytest.mark.parametrize("library", LISTS)
def test_every_factory_exists_where_its_library_is_installed(modules: dict[str, ModuleType], library: str) -> None:
    for package in LISTS[library]["packages"]:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in modules["support_networks"].listed_of_library(library):
            module, _, name = entry.factory.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_a_network_of_a_factory_is_built_with_its_input(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signal(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.unread = nn.Conv1d(1, width, 3), nn.Linear(3, 3)

        def forward(self, wave: Tensor) -> dict[str, Any]:
            values = self.conv(wave)
            return {"kept": values.mean(2), "raw": values}

    nets.Signal = Signal  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nets", nets)
    networks = modules["support_networks"]
    entry = networks.Entry("any", "signal", "A", (1, 20), None, "nets:Signal", {"width": 8}, ("kept",))
    module, spec, example = networks.build_from_library(entry)
    assert spec.inputs == {"wave": {"shape": [1, 20]}}
    assert tuple(example.shape) == (1, 20)
    assert tuple(module(example).shape) == (1, 8)
    assert not any("unread" in name for name, _ in module.named_parameters())


def test_the_package_imports_none_of_the_libraries() -> None:
    forbidden = {IMPORTED_AS.get(name, name) for name in LISTS}
    for path in (ROOT / "compress").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & forbidden, path
