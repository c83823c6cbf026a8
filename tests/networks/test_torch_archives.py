"""Weights are read out of TorchScript archives and torch.export programs by hand, and no code in them is run."""

import io
import json
import pickle  # noqa: TID251 - to write archives that must be refused
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.rebuild import load_strict, read_weights
from compress.errors import ArtifactError, CompressError
from compress.networks.torch_archives import read_archive

Change = Callable[[dict[str, bytes]], None]


class _WithBuffers(nn.Module):
    """Has a buffer, one that is not saved, a plain tensor, a bias that is None, and a layer in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.low = nets.build("chain"), nn.Linear(4, 4, bias=False).to(torch.bfloat16)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)
        self.plain = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.low((self.body(x) * self.scale + self.unsaved + self.plain).to(torch.bfloat16))


def network() -> nn.Module:
    torch.manual_seed(0)
    return _WithBuffers().eval()


def write_scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; its files are still around
        torch.jit.script(network()).save(path)


def write_traced(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network(), nets.EXAMPLE).save(path)


def write_exported(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network(), (nets.images(2),)), path)


def write_older_export(path: Path) -> None:
    stream = io.BytesIO()
    torch.save(network().state_dict(), stream)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", stream.getvalue())


WRITERS = {"w.pt": write_scripted, "traced.pt": write_traced, "w.pt2": write_exported, "older.pt2": write_older_export}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """Write an archive again with other members."""
    with zipfile.ZipFile(source) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def member(members: dict[str, bytes], ending: str) -> str:
    return next(name for name in members if name.endswith(ending))


@pytest.mark.parametrize("name", WRITERS)
def test_weights_of_an_archive_are_those_of_the_network(files: Path, name: str):
    module, wanted = network(), network().state_dict()
    state = read_weights(files / name, list(wanted))
    assert set(wanted) <= set(state)
    assert "plain" not in state
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in wanted.items())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_strict(module, state, name)  # a buffer that a state dict does not have is no surprise
    assert torch.equal(module(nets.images()), network()(nets.images()))


def test_an_ordinary_checkpoint_is_no_archive(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_archive(tmp_path / "w.pt") is None
    assert read_archive(tmp_path / "old.pt") is None


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_scripted_archive_whose_pickle_would_run_code_is_refused(files: Path, tmp_path: Path):
    victim = tmp_path / "created_by_the_pickle"

    def poison(members: dict[str, bytes]) -> None:
        members[member(members, "data.pkl")] = pickle.dumps(_Trap(str(victim)), protocol=2)

    path = rewritten(files / "w.pt", tmp_path / "w.pt", poison)
    with pytest.raises(
        ArtifactError, match=r"was refused: reading it could run code \(\w+\.open\)(.|\n)*Hint: Load it"
    ):
        read_weights(path)
    assert not victim.exists()


def _point_outside(members: dict[str, bytes]) -> None:
    name = member(members, "model_weights_config.json")
    config = json.loads(members[name])
    next(iter(config["config"].values()))["path_name"] = "../../../models/model.json"
    members[name] = json.dumps(config).encode()


def _too_large(members: dict[str, bytes]) -> None:
    name = member(members, "model_weights_config.json")
    config = json.loads(members[name])
    next(iter(config["config"].values()))["tensor_meta"]["sizes"][0]["as_int"] = 10**6
    members[name] = json.dumps(config).encode()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("w.pt2", _point_outside, r"files of its own only, weight '.*' is in '\.\./\.\./"),
        ("w.pt2", _too_large, "no readable archive of a network, got RuntimeError: setStorage"),
        ("w.pt2", lambda m: m.update({"../evil": b""}), r"files of its own only, it names '\.\./evil'"),
        ("w.pt2", lambda m: m.update({"/etc/evil": b""}), "files of its own only, it names '/etc/evil'"),
        ("w.pt2", lambda m: m.pop(member(m, "weight_0")), "must hold 'data/weights/weight_0', it is missing"),
        ("w.pt2", lambda m: m.update({member(m, "byteorder"): b"big"}), "must have little-endian numbers, it has big-"),
        ("w.pt", lambda m: m.pop(member(m, "w/data/0")), "must hold 'data/0', it is missing"),
        ("w.pt", lambda m: m.update({member(m, "data.pkl"): b"\x80\x02]."}), "must hold a scripted network"),
        ("w.pt", lambda m: m.update({member(m, "data.pkl"): b"x"}), "no readable archive of a network, got"),
    ],
)
def test_an_archive_that_is_not_as_torch_wrote_it_is_refused(
    files: Path, tmp_path: Path, name: str, change: Change, match: str
):
    with pytest.raises(ArtifactError, match=match):
        read_weights(rewritten(files / name, tmp_path / name, change))


def test_an_archive_without_weights_under_names_is_refused(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(network())).save(tmp_path / "frozen.pt")
    with pytest.raises(ArtifactError, match="no weights under names: a frozen network keeps them as constants"):
        read_weights(tmp_path / "frozen.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.pt2"])
def test_a_corrupt_archive_is_never_a_crash(files: Path, tmp_path: Path, name: str):
    content, numbers, refused = (files / name).read_bytes(), random.Random(0), 0
    for _ in range(150):
        broken = bytearray(content)
        for _ in range(numbers.choice([1, 10, 200])):
            broken[numbers.randrange(len(broken))] = numbers.randrange(256)
        (tmp_path / name).write_bytes(bytes(broken))
        try:
            read_weights(tmp_path / name)
        except CompressError:
            refused += 1
    assert refused > 50
