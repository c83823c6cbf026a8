"""Code of the page on kinds of networks, which runs block by block."""

import re
from pathlib import Path

import pytest
import torch

import compress

PAGE = Path(__file__).parents[2] / "docs" / "kinds-of-networks.md"
SECTIONS = re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_kind_has_an_example() -> None:
    assert [title for title, _ in SECTIONS] == [
        "One-dimensional signals", "Three-dimensional scans", "Super-resolution", "An image and a vector",
        "Text lines with an LSTM", "Segmentation",
    ]  # fmt: skip


@pytest.mark.parametrize(("title", "code"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_an_example_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, title, "exec"), names)
    model, slim = names["model"], names["slim"]
    assert isinstance(slim, torch.nn.Module)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    assert list(tmp_path.glob("*.onnx"))
    assert compress.inspect(slim, progress=False).potential is not None
    if "verdict" in names:
        assert names["verdict"].outcome in ("passed", "inconclusive")
