"""Factories are called and their errors shown; weights are read as data, and nothing in them is ever run."""

import pickle  # noqa: TID251 - to write the files that must be refused
import random
import sys
from collections import OrderedDict
from pathlib import Path

import nets
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.checkpoint.rebuild import build_module, load_strict, read_weights, reinitialized, write_weights
from compress.errors import ArtifactError, CompressError, ModelError, NonFinite
from compress.model.artifacts import FactorySpec

FACTORY = """
import helper_next_to_it
from torch import nn

VERSION = 3

def build(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))

def build_lazily():
    import lazy_next_to_it
    return lazy_next_to_it.network()

def build_wide():
    return nn.Linear(2, helper_next_to_it.WIDTH)

def fails(depth):
    raise ValueError(f"depth must be even, got {depth}")

def no_network():
    return [1, 2]
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "helper_next_to_it.py").write_text("WIDTH = 7\n", encoding="utf-8")
    (tmp_path / "lazy_next_to_it.py").write_text("from torch import nn\ndef network(): return nn.Linear(2, 3)\n")
    path = tmp_path / "my_nets.py"
    path.write_text(FACTORY, encoding="utf-8")
    yield path
    for name in ("helper_next_to_it", "lazy_next_to_it"):
        sys.modules.pop(name, None)


def _build(reference: object, **kwargs: object) -> nn.Module:
    return build_module(FactorySpec("factory", str(reference), kwargs))


def test_factory_in_a_file_is_called_with_its_arguments(factory):
    path, random_state = list(sys.path), torch.get_rng_state()
    module = _build(f"{factory}:build", width=6)
    assert module[0].out_channels == 6
    assert not module.training
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(_build(f"{factory}:build").state_dict()["0.weight"], _build(f"{factory}:build")[0].weight)


def test_factory_may_import_what_lies_next_to_it_at_once_or_later(factory):
    assert _build(f"{factory}:build_wide").out_features == 7
    assert _build(f"{factory}:build_lazily").out_features == 3


def test_factory_in_a_module():
    assert isinstance(_build("nets:chain"), nn.Module)
    assert _build("torch.nn:Linear", in_features=2, out_features=3).out_features == 3


def test_factory_in_a_module_of_the_working_folder(factory, monkeypatch):
    monkeypatch.chdir(factory.parent)
    try:
        assert _build("my_nets:build_lazily").out_features == 3
    finally:
        sys.modules.pop("my_nets", None)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("biuld", {}, r"must have a callable 'biuld', it has none\.\nHint: did you mean 'build'\?"),
        ("VERSION", {}, "must have a callable 'VERSION', it has none"),
        ("fails", {"depth": 3}, r"with depth=3 \(it takes \(depth\)\), got ValueError: depth must be even, got 3"),
        ("build", {"widht": 3}, r"with widht=3 \(it takes \(width=4\)\), got TypeError: .*widht"),
        ("no_network", {}, r"no_network' must return a torch\.nn\.Module, got list"),
    ],
)
def test_factory_that_does_not_work_is_shown(factory, name, kwargs, match):
    with pytest.raises(ModelError, match=match):
        _build(f"{factory}:{name}", **kwargs)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("import no_such_package", "must import, got ModuleNotFoundError: No module named 'no_such_package'"),
        ("def build(:", "must import, got SyntaxError"),
        ("1 / 0", "must import, got ZeroDivisionError: division by zero"),
    ],
)
def test_file_that_does_not_import_is_shown(tmp_path, text, match):
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=f"Factory file '.*broken.py' {match}"):
        _build(f"{tmp_path / 'broken.py'}:build")


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"Factory file '.*gone\.py' does not exist"):
        _build(f"{tmp_path / 'gone.py'}:build")
    with pytest.raises(ModelError, match=r"Factory module 'no_such\.package' must import, got ModuleNotFoundError"):
        _build("no_such.package:build")


def test_torchvision_network_by_name():
    module = build_module(FactorySpec("torchvision", "squeezenet1_1", {"num_classes": 3}))
    assert module.classifier[1].out_channels == 3
    with pytest.raises(ModelError, match=r"no network named 'resnet81'\.\nHint: did you mean 'resnet18'\?"):
        build_module(FactorySpec("torchvision", "resnet81"))
    with pytest.raises(ModelError, match=r"'squeezenet1_1' must build .*num_clases=3.*got TypeError"):
        build_module(FactorySpec("torchvision", "squeezenet1_1", {"num_clases": 3}))


def _state() -> dict[str, torch.Tensor]:
    return nets.build("chain").state_dict()


def _hold_reads(path: Path) -> None:
    state, expected = read_weights(path), _state()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_safetensors_are_read(tmp_path):
    save_file(_state(), tmp_path / "weights.safetensors")
    _hold_reads_in_any_order(tmp_path / "weights.safetensors")
    write_weights(nets.build("chain"), tmp_path / "again.safetensors")
    _hold_reads_in_any_order(tmp_path / "again.safetensors")


def _hold_reads_in_any_order(path: Path) -> None:
    state = read_weights(path)
    assert state.keys() == _state().keys()
    assert all(torch.equal(value, _state()[name]) for name, value in state.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".tar", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_are_read_whatever_their_suffix(tmp_path, suffix, zipped):
    torch.save(_state(), tmp_path / f"weights{suffix}", _use_new_zipfile_serialization=zipped)
    _hold_reads(tmp_path / f"weights{suffix}")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights"])
def test_wrapped_state_dict_is_unwrapped_and_its_prefix_stripped(tmp_path, key):
    prefixed = OrderedDict((f"module.{name}", value) for name, value in _state().items())
    torch.save({"epoch": 3, "best": 0.9, key: prefixed, "optimizer": {"lr": 0.1}}, tmp_path / "w.th")
    _hold_reads(tmp_path / "w.th")


def test_prefix_stays_where_not_every_name_has_it(tmp_path):
    torch.save({"module.weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "w.pt")
    assert set(read_weights(tmp_path / "w.pt")) == {"module.weight", "bias"}


def test_strict_load_fits_and_may_lack_batch_counters():
    module, state = nets.build("chain", seed=5), _state()
    load_strict(module, {name: v for name, v in state.items() if "num_batches" not in name}, "'w'")
    assert torch.equal(module(nets.images()), nets.build("chain")(nets.images()))


def test_strict_load_names_what_does_not_fit():
    state = _state()
    state["extra.weight"] = state.pop("body.1.0.weight")
    state["head.weight"] = torch.zeros(10, 16)
    module = nets.build("chain")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load_strict(module, state, "'w.pt'")
    assert caught.value.message == (
        "'w.pt' must fit the network exactly; missing: body.1.0.weight; unexpected: extra.weight; "
        "other shape: head.weight (10, 16) instead of (4, 16)."
    )
    assert "model.kwargs" in str(caught.value.hint)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(ArtifactError, match=r"missing: .* and 13 more"):
        load_strict(module, {}, "'w.pt'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    state = _state()
    state["body.1.0.weight"] = state["body.1.0.weight"].clone()
    state["body.1.0.weight"][0, 0, 0, 0] = value
    with pytest.raises(NonFinite, match=r"'w' must be finite, NaN or infinity in body\.1\.0\.weight\."):
        load_strict(nets.build("chain"), state, "'w'")


class _Malicious:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _write_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def _write_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def _write_plain(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [_write_zip, _write_legacy, _write_plain])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path, write, wrapped):
    victim = tmp_path / "created_by_the_pickle"
    payload = _Malicious(victim)
    write({"state_dict": {"weight": payload}} if wrapped else payload, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"was refused: .* could run code(.|\n)*Hint: Save `model\.state_dict"):
        read_weights(tmp_path / "w.pt")
    assert not victim.exists()
    victim.unlink(missing_ok=True)
    pickle.loads(pickle.dumps(payload)).close()
    assert victim.exists()  # the pickle does what it is refused for


@pytest.mark.parametrize("write", [_write_zip, _write_legacy])
def test_pickled_network_is_refused_and_its_class_named(tmp_path, write):
    write(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match=r"was refused: .* could run code \(torch\.nn\.modules"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("w.pt", b"", r"Weights file '.*w\.pt' is empty"),
        ("w.pt", b"hello, I am text", r"is no readable torch checkpoint, got (.|\n)*Hint: Whole files"),
        ("w.safetensors", b"", "must be a safetensors file: .*header too small"),
        ("w.safetensors", b"\xff" * 300, "must be a safetensors file"),
        ("w.safetensors", b"\x02\0\0\0\0\0\0\0{]", "must be a safetensors file"),
    ],
)
def test_file_that_is_no_weights_file(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=match):
        read_weights(tmp_path / name)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"Weights file '.*w\.pt' does not exist"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [{}, [1, 2], {"a": 1}, torch.ones(2), {"state_dict": {}}, {"model": [1]}])
def test_checkpoint_without_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(ArtifactError, match="must hold a state dict"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_file_is_refused(tmp_path, name):
    if name == "w.pt":
        torch.save(_state(), tmp_path / name)
    else:
        save_file(_state(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(ArtifactError, match=r"no readable torch checkpoint|must be a safetensors file"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_corrupt_checkpoint_is_never_a_crash(tmp_path, zipped):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(2, 2), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    content, numbers, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(numbers.choice([1, 4, 20])):
            broken[numbers.randrange(min(len(broken), 900))] = numbers.randrange(256)
        path.write_bytes(bytes(broken))
        try:
            read_weights(path)
        except CompressError:
            refused += 1
    assert refused > 100


def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(ArtifactError, match="must be dense, weight is not"):
        read_weights(tmp_path / "sparse.pt")


class _WithOwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.conv(x) * self.scale


def test_weights_drawn_anew_depend_on_the_seed_alone():
    module = nets.build("chain")
    before = torch.random.get_rng_state()
    first, again, other = (reinitialized(module, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = nets.build("chain").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    weight = "body.0.0.weight"
    assert not torch.equal(first[weight], other[weight])
    assert not torch.equal(first[weight], kept[weight])
    assert float(first["body.0.1.running_mean"].abs().max()) == 0


def test_a_parameter_that_cannot_be_drawn_anew_is_named():
    with pytest.raises(ModelError, match=r"'' \(_WithOwnParameter\) cannot: scale"):
        reinitialized(_WithOwnParameter(), 0)
