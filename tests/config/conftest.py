"""A small pipeline that the tests of configuration change."""

from pathlib import Path

import pytest

TINY = """\
name: tiny
data:
  train: {arrays: train.npz}
  evaluation: {arrays: test.npz}
  array_folder_env: TINY_DATA
stages:
  - stage: load
    model: {factory: "nets.py:build"}
    weights: tiny.safetensors
  - stage: prune
    target: {macs: 0.5}
  - stage: finetune
    epochs: 1
  - stage: low_rank
    relative_error: 0.1
  - stage: finetune
    epochs: 2
  - stage: export
  - stage: verify
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Path of a pipeline file of its own."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path
