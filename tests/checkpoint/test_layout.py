"""A TorchModel comes back from its folder to the bit, anywhere, and a folder that was changed is refused."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import nets
import pytest
import torch
from torch import nn

import compress
from compress.checkpoint.layout import load_slim, load_torch_model, save_torch_model, write_digests, write_slim
from compress.checkpoint.rebuild import write_weights
from compress.data.preprocessing import Preprocessing
from compress.errors import ArtifactError, CompressError, ModelError, RebuildMismatch
from compress.lowrank.surgery import apply_factorize
from compress.model.artifacts import Baseline, FactorySpec, ModelMetrics, Signature, TensorSpec, TorchModel
from compress.model.recipe import Factorize, Recipe, RemoveBlock, RemoveChannels
from compress.pruning.surgery import remove_block, remove_channels

NETS = Path(nets.__file__)
EDITS = (RemoveBlock("body.1"), RemoveChannels({"body.2.conv1": (0, 3)}), Factorize("body.2.conv2", "vh", (4,)))


@pytest.fixture
def model(tmp_path):
    """A slim network whose factory is a file of its own."""
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "nets_copy.py").write_text(NETS.read_text(encoding="utf-8"), encoding="utf-8")
    module = remove_block(nets.build("residual"), EDITS[0])
    module = apply_factorize(remove_channels(module, EDITS[1], nets.EXAMPLE), EDITS[2])
    (folder / "baseline.onnx").write_bytes(b"onnx")
    write_weights(nets.build("residual"), folder / "baseline.safetensors")
    figures = ModelMetrics(100, 10, 1000, {"top1": 0.9}, {"p50": 1.0, "p95": 2.0})
    return TorchModel(
        module.eval(),
        FactorySpec("factory", f"{folder / 'nets_copy.py'}:build", {"name": "residual"}),
        Recipe(EDITS),
        Signature((TensorSpec("images", ("batch", 3, 16, 16)),), (TensorSpec("logits", ("batch", 4)),)),
        Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5,), crop=(16, 16)),
        ("a", "b", "c", "ü"),
        Baseline(figures, folder / "baseline.onnx", folder / "baseline.safetensors"),
    )


@pytest.fixture
def stored(model, tmp_path):
    folder = tmp_path / "stored"
    folder.mkdir()
    save_torch_model(model, folder)
    return folder


@pytest.fixture
def run(model, stored, tmp_path):
    """A folder laid out as a run's, from which the origin is gone."""
    write_slim(stored, tmp_path / "run" / "slim", model.factory)
    (tmp_path / "origin" / "nets_copy.py").unlink()
    return tmp_path / "run"


def test_round_trip_is_the_same_to_the_bit(model, stored):
    loaded = load_torch_model(stored)
    assert torch.equal(loaded.module(nets.images()), model.module(nets.images()))
    assert list(loaded.module.state_dict()) == list(model.module.state_dict())
    assert not any(part.training for part in loaded.module.modules())
    same = ("factory", "recipe", "signature", "preprocessing", "classes")
    assert [getattr(loaded, name) for name in same] == [getattr(model, name) for name in same]
    assert loaded.baseline.metrics == model.baseline.metrics
    assert loaded.baseline.onnx_path.read_bytes() == b"onnx"
    assert loaded.baseline.weights_path.parent == stored


def test_another_factory_may_stand_in_for_one_that_moved(model, stored, tmp_path):
    (tmp_path / "origin").rename(tmp_path / "moved")
    moved = replace(model.factory, reference=f"{tmp_path / 'moved' / 'nets_copy.py'}:build")
    loaded = load_torch_model(stored, moved)
    assert loaded.factory == moved
    assert torch.equal(loaded.module(nets.images()), model.module(nets.images()))
    with pytest.raises(ModelError, match=r"nets_copy\.py' does not exist"):
        load_torch_model(stored)


def test_saving_again_into_the_same_folder_gives_the_same_files(stored):
    before = {file.name: file.read_bytes() for file in stored.iterdir()}
    save_torch_model(load_torch_model(stored), stored)
    assert {file.name: file.read_bytes() for file in stored.iterdir()} == before


def test_no_pickle_is_written(stored, run):
    files = [*stored.iterdir(), *(run / "slim").iterdir()]
    assert {file.name for file in files} == {
        "recipe.json",
        "weights.safetensors",
        "meta.json",
        "baseline.json",
        "baseline.onnx",
        "baseline.safetensors",
        "factory.py",
        "digests.json",
    }
    for file in files:
        assert not zipfile.is_zipfile(file)
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", [".", "slim"])
def test_slim_network_loads_from_the_run_alone(model, run, place):
    loaded = compress.load(run / place)
    assert torch.equal(loaded(nets.images()), model.module(nets.images()))
    assert not loaded.training


def test_slim_network_loads_from_a_relative_folder(model, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert torch.equal(compress.load("run")(nets.images()), model.module(nets.images()))


@pytest.mark.parametrize("factory", [nets.build, "nets:build", f"{NETS}:build"])
def test_slim_network_loads_with_another_factory(model, run, factory):
    (run / "slim" / "factory.py").unlink()
    assert torch.equal(load_slim(run, factory)(nets.images()), model.module(nets.images()))


def _raises(name: str) -> nn.Module:
    raise ValueError(f"cannot build {name}")


@pytest.mark.parametrize(
    ("factory", "error", "match"),
    [
        (_raises, ModelError, "'_raises' must build .* with name='residual' .*got ValueError: cannot build residual"),
        (lambda: None, ModelError, "must build .*got TypeError"),
        (lambda name: None, ModelError, r"must return a torch\.nn\.Module, got NoneType"),
        (lambda name: nets.build("linear_head"), RebuildMismatch, "'remove_block' must fit .*a block 'body.1'"),
        ("nets:nothing", ModelError, "must have a callable 'nothing'"),
    ],
)
def test_factory_that_does_not_fit_is_refused(run, factory, error, match):
    with pytest.raises(error, match=match):
        load_slim(run, factory)


def test_factory_with_other_widths_is_a_mismatch(run):
    def wider(name: str) -> nn.Module:
        module = nets.build(name)
        module.head = nn.Linear(16, 5)
        return module

    with pytest.raises(RebuildMismatch, match=r"other shape: head\.weight \(4, 16\) instead of \(5, 16\)"):
        load_slim(run, wider)


def _change_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            del meta[key]
        else:
            meta[key] = value
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": 9}, r"meta\.json' must have schema 1, got 9"),
        ({"factory": None}, r"meta\.json' lacks a value, or holds one of another kind: KeyError\('factory'\)"),
        ({"factory": {"kind": "factory"}}, r"meta\.json' lacks a value.*reference"),
        ({"factory": {"kind": "factory", "reference": 5}}, r"meta\.json' lacks a value"),
        ({"factory": ["x"]}, r"meta\.json' lacks a value"),
        ({"signature": None}, r"meta\.json' lacks a value.*signature"),
        ({"signature": {"inputs": 5, "outputs": []}}, r"meta\.json' lacks a value"),
    ],
)
def test_changed_meta_is_refused(stored, run, changes, match):
    for folder, load in ((stored, load_torch_model), (run / "slim", load_slim)):
        _change_meta(folder, **changes)
        write_digests(folder)  # as whoever changes a checkpoint on purpose
        with pytest.raises(ArtifactError, match=match):
            load(folder)


@pytest.mark.parametrize("changes", [{"preprocessing": None}, {"preprocessing": {"mena": 1}}, {"classes": 5}])
def test_changed_preprocessing_is_refused(stored, changes):
    _change_meta(stored, **changes)
    with pytest.raises(ArtifactError, match=r"meta\.json' lacks a value, or holds one of another kind"):
        load_torch_model(stored)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("meta.json", None, r"meta\.json' does not exist"),
        ("meta.json", b"{", r"meta\.json' must be readable JSON"),
        ("meta.json", b"[]", r"meta\.json' must hold a JSON object"),
        ("meta.json", b"\xff\xfe\x00", r"meta\.json' must be a readable text file"),
        ("meta.json", b"[" * 100_000, r"meta\.json' must be readable JSON"),
        ("recipe.json", None, r"recipe\.json' does not exist"),
        ("recipe.json", b"\xff", r"recipe\.json' must be a readable text file"),
        ("recipe.json", b"{}", "recipe must be a list of known edits"),
        ("weights.safetensors", None, r"weights\.safetensors' does not exist"),
        ("weights.safetensors", b"", r"weights\.safetensors' must be a safetensors file"),
        ("weights.safetensors", b"\x80\x04c__builtin__\nexec\n.", r"weights\.safetensors' must be a safetensors file"),
    ],
)
def test_changed_file_is_refused(run, name, content, match):
    path = run / "slim" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    write_digests(run / "slim")
    with pytest.raises(ArtifactError, match=match):
        compress.load(run)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "meta.json", "factory.py", "digests.json"])
def test_changed_bits_of_a_checkpoint_are_refused(run, name):
    path = run / "slim" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), -(-len(whole) // 40)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"damaged|must be readable JSON|twice|digest") as caught:
            compress.load(run)
        assert caught.value.hint


def test_a_file_of_a_checkpoint_that_is_gone_is_told_by_name(run):
    (run / "slim" / "recipe.json").unlink()
    with pytest.raises(ArtifactError, match=r"recipe\.json"):
        compress.load(run)


def test_code_that_was_edited_is_used_only_where_it_is_named(run, model):
    path = run / "slim" / "factory.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"factory\.py' must be as the run wrote it") as caught:
        compress.load(run)
    assert f"factory='{path}:NAME'" in str(caught.value.hint)
    assert torch.equal(compress.load(run, f"{path}:build")(nets.images()), model.module(nets.images()))


def test_a_checkpoint_of_an_older_version_loads_with_a_warning(run, model):
    (run / "slim" / "digests.json").unlink()
    with pytest.warns(UserWarning, match=r"has no digests\.json: damage of its files is not noticed"):
        loaded = compress.load(run)
    assert torch.equal(loaded(nets.images()), model.module(nets.images()))


def test_recipe_or_weights_of_another_network_are_a_mismatch(run, model):
    recipe = run / "slim" / "recipe.json"
    recipe.write_text(Recipe(EDITS[:2]).to_json(), encoding="utf-8")
    write_digests(run / "slim")
    with pytest.raises(RebuildMismatch, match=r"saved weights must fit .*missing: body\.2\.conv2\.weight"):
        compress.load(run)
    recipe.write_text(Recipe((RemoveBlock("body.7"),)).to_json(), encoding="utf-8")
    write_digests(run / "slim")
    with pytest.raises(RebuildMismatch, match=r"must have a block 'body\.7'"):
        compress.load(run)
    recipe.write_text(model.recipe.to_json(), encoding="utf-8")
    write_weights(nets.build("chain"), run / "slim" / "weights.safetensors")
    write_digests(run / "slim")
    with pytest.raises(RebuildMismatch, match="saved weights must fit the replayed network"):
        compress.load(run)


@pytest.mark.parametrize("content", [b"{}", b'{"macs": 1, "more": 2}'])
def test_changed_baseline_is_refused(stored, content):
    (stored / "baseline.json").unlink()
    (stored / "baseline.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"baseline\.json' lacks a value, or holds one of another kind"):
        load_torch_model(stored)


def test_factory_named_in_the_checkpoint_must_be_there(run):
    (run / "slim" / "factory.py").unlink()
    write_digests(run / "slim")
    with pytest.raises(ModelError, match=r"Factory file '.*factory\.py' does not exist"):
        compress.load(run)


def test_factory_in_a_module_is_not_copied(model, tmp_path):
    model = replace(model, factory=FactorySpec("factory", "nets:build", {"name": "residual"}))
    folder = tmp_path / "module"
    folder.mkdir()
    save_torch_model(model, folder)
    write_slim(folder, tmp_path / "portable", model.factory)
    assert not (tmp_path / "portable" / "factory.py").exists()
    assert torch.equal(compress.load(tmp_path / "portable")(nets.images()), model.module(nets.images()))


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(CompressError, match=r"meta\.json' does not exist"):
        compress.load(tmp_path / "nowhere")
