"""The page on YOLO: its example is the file beside it, and as short as the page says."""

import re
from pathlib import Path

import yaml

from compress.config.load import parse_pipeline

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "yolo.md").read_text(encoding="utf-8")
FEW_YAML, FEW_PYTHON = 20, 10


def code_lines(text: str) -> list[str]:
    """Return the lines that are neither empty nor a comment."""
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_the_example_is_the_file_and_short() -> None:
    (shown,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def train" in block)
    file = (DOCS / "examples" / "yolo.py").read_text(encoding="utf-8")
    assert file.partition('"""\n\n')[2].strip() == shown.strip()
    count = len(code_lines(shown))
    assert count <= FEW_PYTHON
    pipeline = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "stages:" in block)
    assert len(code_lines(pipeline)) <= FEW_YAML
    assert f"You write {len(code_lines(pipeline))} lines of YAML and {count} of Python." in PAGE


def test_the_pipeline_of_every_task_is_valid(tmp_path: Path) -> None:
    pipeline = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "stages:" in block)
    (tmp_path / "yolo.py").write_text("def build():\n    pass\n\n\ndef train():\n    pass\n", encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.splitlines()
        if re.match(r"\| \w+ \| `yolo", line)
    ]
    assert [row[0] for row in rows] == ["detect", "segment", "pose", "classify"]
    for name, cfg, build, outputs, task, beside, gate in rows:
        values = yaml.safe_load(pipeline)
        model = values["stages"][0]["model"]
        model["kwargs"] = {"cfg": cfg.strip("`")} | yaml.safe_load(f"{{{build.strip('`')}}}")
        model["outputs"] = yaml.safe_load(outputs.strip("`"))
        further = yaml.safe_load(beside.strip("`")) if beside else {}
        for half in ("train", "evaluation"):
            values["data"][half] |= further
        if name == "classify":
            values["task"] = task.strip("`")
            values["data"] |= {"train": {"folder": "data/train"}, "evaluation": {"folder": "data/val"}}
        elif "kwargs" in task:
            values["task"] |= yaml.safe_load(task.split("`")[1])
        values["stages"][-1]["gates"]["max_drop"] = {gate.strip("`"): 0.02}
        parse_pipeline(yaml.safe_dump(values), tmp_path / "yolo.yaml")
