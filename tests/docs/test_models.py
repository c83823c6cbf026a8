"""The reference networks are what their cards say, and what is shipped stays small."""

import hashlib
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from compress.checkpoint.rebuild import build_module, load_strict, read_weights
from compress.cost.macs import count_macs, count_params
from compress.model.artifacts import FactorySpec

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "models").glob("*/card.yaml"))
BINARY_SUFFIXES = (".gz", ".npz", ".npy", ".onnx", ".safetensors", ".png")


def test_there_are_cards() -> None:
    assert len(CARDS) >= 2


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_card_describes_the_network(path: Path) -> None:
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec = FactorySpec("factory", f"{path.parent / card['factory']}", card["kwargs"])
    module = build_module(spec)
    example = torch.zeros([1, *card["input"]["shape"]])
    assert count_macs(module, example) == card["baseline"]["macs"]
    assert count_params(module) == card["baseline"]["params"]
    weights = path.parent / card["weights"]
    if "sha256" not in card:
        assert not weights.exists(), "weights that are shipped have their digest and their top-1 on the card"
        return
    assert 0.9 < card["baseline"]["top1"] <= 1
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    load_strict(module, read_weights(weights), weights.name)


def test_shipped_binaries_stay_under_8_mb_and_the_quickstart_under_7() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    names = [name for name in listed.split("\0") if name.endswith(BINARY_SUFFIXES)]
    if not names:
        pytest.skip("not a git checkout: nothing says which files are shipped")
    sizes = {name: (ROOT / name).stat().st_size for name in names}
    assert sum(sizes.values()) < 8e6
    assert 4e6 < sum(size for name, size in sizes.items() if "mnist" in name) < 7e6
