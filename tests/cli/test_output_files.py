"""Options that name an output replace earlier outputs of their kind and nothing else."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import smallrun
from typer.testing import CliRunner

from compress.bundle.check import main as check_bundle
from compress.cli.commands import app
from compress.errors import ConfigError
from compress.report.page import render
from compress.storage.files import KINDS, remove_earlier, require_output

SUFFIXES = {"JUnit file": ".xml", "page": ".html", "page of a verdict": ".html", "bundle": ".zip"}
ONLY_POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and devices of POSIX")


def place(folder: Path, kind: str) -> Path:
    return folder / f"out{SUFFIXES.get(kind, '.json')}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"dear", b"{}", b"[1]", b"\x00\xff\x80", b"PK\x03\x04", b"<html>", b"[" * 10**5])
def test_another_file_stays(tmp_path: Path, kind: str, content: bytes) -> None:
    path = place(tmp_path, kind)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--out replaces only a {kind.split('(')[0]}") as caught:
        remove_earlier("--out", path, kind)
    assert caught.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_and_an_empty_file_are_taken(tmp_path: Path, kind: str) -> None:
    path = place(tmp_path, kind)
    remove_earlier("--out", path, kind)
    path.touch()
    remove_earlier("--out", path, kind)
    assert not path.exists()


@ONLY_POSIX
@pytest.mark.parametrize("kind", KINDS)
def test_links_pipes_and_devices_are_never_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "dear").touch()
    link, dangling, pipe = tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe"
    link.symlink_to(tmp_path / "dear")
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    for path, said in (
        (link, "symbolic link"),
        (dangling, "symbolic link"),
        (pipe, "a pipe"),
        (Path("/dev/null"), "a"),
    ):
        with pytest.raises(ConfigError, match=said):
            remove_earlier("--out", path, kind)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x/" * 4000 + "y"])
def test_names_that_no_file_has_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--out must be a file to write"):
        require_output("--out", tmp_path / name, "page")


def test_earlier_outputs_of_the_kind_are_replaced(tmp_path: Path) -> None:
    page = render("page.html.j2", "title", "name")
    texts = {
        "JSON verdict": '{"name": "x", "verdict": {}}',
        "JSON overview": '{"target": "x", "potential": 1, "latency": 1, "nodes": 1}',
        "JUnit file": "<?xml version='1.0'?>\n<testsuites/>",
        "page": page,
        "page of a verdict": page,
        "latency table": '{"kind": "", "conditions": {}, "samples": []}',
    }
    for kind, text in texts.items():
        path = place(tmp_path, kind)
        path.write_text(text, encoding="utf-8")
        remove_earlier("--out", path, kind)
        assert not path.exists()
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.writestr("model.onnx", "")
    require_output("-o", tmp_path / "out.zip", "bundle")


def test_the_files_of_a_run_are_no_earlier_outputs(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 1, "name": "x", "verdict": {}, "stages": []}', encoding="utf-8")
    (tmp_path / "report.html").write_text(render("page.html.j2", "t", "n"), encoding="utf-8")
    for name, kind in (("report.json", "JSON verdict"), ("report.html", "page of a verdict")):
        with pytest.raises(ConfigError, match="is another file"):
            require_output("--x", tmp_path / name, kind)
    require_output("--out", tmp_path / "report.html", "page")


@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [("run p.yaml", "--json", ".json"), ("run p.yaml", "--junit", ".xml"),
     ("verify m.onnx --pipeline p.yaml", "--json", ".json"), ("verify m.onnx --pipeline p.yaml", "--junit", ".xml"),
     ("verify m.onnx --pipeline p.yaml", "--report", ".html"), ("inspect p.yaml", "--json", ".json"),
     ("profile p.yaml", "--out", ".json"), ("bundle runs/x --force", "-o", ".zip")],
)  # fmt: skip
def test_every_option_that_names_an_output_leaves_other_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    world = smallrun.World(tmp_path)
    Path("p.yaml").write_text(world.write(world.values()).read_text(encoding="utf-8"), encoding="utf-8")
    dear = Path(f"dear{suffix}")
    dear.write_text("dear", encoding="utf-8")
    done = CliRunner().invoke(app, [*command.split(), option, str(dear)])
    assert done.exit_code == 2, done.output
    assert f"{option} replaces only" in done.output
    assert dear.read_text(encoding="utf-8") == "dear"


def test_init_with_force_replaces_no_weights(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"PK\x03\x04dear")
    done = CliRunner().invoke(app, ["init", "CIFAR10", "m:f", "--weights", "w.pt", "--force", "-o", str(weights)])
    assert done.exit_code == 2
    assert weights.read_bytes() == b"PK\x03\x04dear"


@ONLY_POSIX
def test_the_check_of_a_bundle_writes_to_devices_and_replaces_only_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    assert check_bundle([str(bundle), "--json", "/dev/null"]) == 4
    assert Path("/dev/null").is_char_device()
    dear, link, own = tmp_path / "dear.json", tmp_path / "link.json", tmp_path / "own.json"
    dear.write_text('{"dear": 1}', encoding="utf-8")
    link.symlink_to(dear)
    for path in (dear, link):
        with pytest.raises(SystemExit):
            check_bundle([str(bundle), "--json", str(path)])
    assert dear.read_text(encoding="utf-8") == '{"dear": 1}'
    assert link.is_symlink()
    for _ in range(2):
        assert check_bundle([str(bundle), "--json", str(own)]) == 4
        assert json.loads(own.read_text(encoding="utf-8"))["exit_code"] == 4
    capsys.readouterr()
