"""Whatever code of the user's raises becomes an error of ours with its file and line; a real Ctrl-C stays one."""

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import smallrun
import torch
from blame import in_package
from safetensors.torch import save_file

from compress import user_code
from compress.checkpoint.rebuild import build_module
from compress.data.sources.user import read_own
from compress.errors import CompressError, DataError, InternalError, ModelError, StageError
from compress.model.artifacts import FactorySpec
from compress.networks.wiring import run_network
from compress.tasks.from_config import guarded, own_task
from compress.user_code import as_stage_error, import_callable, is_interrupt, raise_as, user_place

RAISED = ["SystemExit(0)", "GeneratorExit()", "KeyboardInterrupt()", "BaseException('odd')",
          "FileNotFoundError(2, 'gone')", "ValueError('no')", "StopIteration()"]  # fmt: skip
NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {init}
        self.a = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        {forward}
        return self.a(x).mean((2, 3))
class Data:
    def __len__(self): return 3
    def __getitem__(self, place):
        if place == 2: {item}
        return torch.zeros(3, 8, 8)
def fail(*_):
    raise {error}
class Task:
    def __init__(self): raise {error}
"""


def write(folder: Path, error: str, **places: str) -> str:
    code = {name: f"raise {error}" if name in places else "pass" for name in ("init", "forward", "item")}
    path = folder / "mine.py"
    path.write_text(NET.format(error=error, **code), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("error", RAISED)
def test_a_file_that_raises_while_it_is_imported(tmp_path: Path, error: str):
    (tmp_path / "mine.py").write_text(f"import os\nraise {error}\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"mine\.py' must import, got .*\(mine\.py:2\)"):
        import_callable(f"{tmp_path / 'mine.py'}:Net")


@pytest.mark.parametrize("error", RAISED)
def test_a_factory_and_a_forward_pass(tmp_path: Path, error: str):
    name = error.partition("(")[0]
    path = write(tmp_path, error, init="")
    with pytest.raises(ModelError, match=rf"Factory '.*' must build the network .*got {name}.*\(mine\.py:7\)"):
        build_module(FactorySpec("factory", f"{path}:Net"))
    module = build_module(FactorySpec("factory", f"{write(tmp_path, error, forward='')}:Net"))
    with pytest.raises(ModelError, match=rf"The network must run on images .*got {name}.*\(mine\.py:10\)"):
        run_network(module, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("error", RAISED)
def test_a_data_set_a_task_and_a_loss(tmp_path: Path, error: str):
    path = write(tmp_path, error, item="")
    source = read_own(f"{path}:Data", {})
    with pytest.raises(DataError, match=r"must give entry 2, got .*\(mine\.py:15\)"):
        source.read(torch.tensor([2]).numpy())
    with pytest.raises(ModelError, match=r"must open, got .*\(mine\.py:20\)"):
        own_task(f"{path}:Task", {})
    with pytest.raises(ModelError, match=r"Loss 'x' must work on these outputs, got .*\(mine\.py:18\)"):
        guarded(import_callable(f"{path}:fail"), "Loss 'x'")(1, 2)


def ours(run: Callable[[], Any]) -> CompressError | None:
    try:
        run()
    except BaseException as error:
        return as_stage_error(error)
    raise AssertionError("it must raise")


def _fails() -> None:
    torch.ones(2) @ torch.ones(3)


def _fills() -> None:
    raise OSError(28, "No space left on device", "/somewhere")


def test_only_what_the_users_code_raised_is_theirs():
    assert isinstance(ours(_fails), StageError)  # torch, called by this file
    assert "(test_user_code.py:" in str(ours(_fails))
    assert isinstance(ours(in_package("fails()", fails=_fails)), StageError)
    assert ours(in_package("a @ b", a=torch.ones(2), b=torch.ones(3))) is None  # torch, called by the package
    assert isinstance(ours(in_package("raise SystemExit(0)")), StageError)  # no command ends a process by itself
    assert ours(in_package("raise error", error=InternalError("broken"))) is None
    assert ours(in_package("raise KeyboardInterrupt")) is None  # the training loop, when its step is done
    assert ours(in_package("fails()", fails=lambda: [0] * 10**18)) is None  # want of memory has its own words
    assert ours(in_package("fails()", fails=_fills)) is None  # and so has a full disk


def test_an_error_of_ours_passes_and_the_place_is_the_innermost_of_the_user():
    with pytest.raises(DataError, match="mine"), raise_as(ModelError, "It must work"):
        raise DataError("mine")
    expected = pytest.raises(ModelError, match=r"^It must work, got RuntimeError")
    with expected as caught, raise_as(ModelError, "It must work"):
        in_package("fails()", fails=_fails)()
    assert caught.value.__cause__ is not None
    assert str(user_place(caught.value.__cause__)).startswith("test_user_code.py:")


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to a process of its own")
def test_a_real_interrupt_stays_one_and_a_made_up_one_does_not(tmp_path: Path):
    def caught(run: Callable[[], Any]) -> BaseException:
        try:
            run()
        except KeyboardInterrupt as error:
            return error
        raise AssertionError("it must raise")

    def raised() -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        real = caught(lambda: [os.kill(os.getpid(), signal.SIGINT), *range(10**6)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_interrupt(real)
    assert not is_interrupt(caught(raised))


@pytest.mark.parametrize("error", ["SystemExit(0)", "KeyboardInterrupt()", "ValueError('late')"])
def test_a_forward_pass_that_raises_late_ends_the_command_with_3(tmp_path: Path, error: str):
    world = smallrun.make_world(tmp_path)
    (world.folder / "late.py").write_text(
        "import nets\nfrom torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.net = nets.build('chain')\n"
        "    def forward(self, x):\n"
        f"        if x.shape[0] > 30: raise {error}\n"
        "        return self.net(x)\n",
        encoding="utf-8",
    )
    reference, values = f"{world.folder / 'late.py'}:Net", world.values(middle=[])
    save_file(import_callable(reference)().state_dict(), world.folder / "late.safetensors")
    values["stages"][0] |= {"model": {"factory": reference}, "weights": "late.safetensors"}
    values["stages"].insert(1, {"stage": "finetune", "epochs": 1, "batch_size": 32})
    done = world.call("run", values)
    told = " ".join(done.output.split())
    assert done.exit_code == 3, told
    assert f"got {error.partition('(')[0]}" in told
    assert "(late.py:7)" in told


MOVED = [
    ("from compress.registry import Registry", "compress.registry is now compress.catalog."),
    ("import compress.importing.importer", "compress.importing is now compress.onnx_import."),
    ("from compress import artifacts", "compress.artifacts is now compress.model.artifacts."),
    ("from compress.stages.context import StageContext", "compress.stages.context is now compress.search.context."),
    ("from compress.data.sources import ArraySource",
     "compress.data.sources is now compress.data.sources.classification."),
    ("from compress.pruning.criteria.snip import Snip",
     "compress.pruning.criteria.snip is now compress.pruning.criteria.gradient_flow."),
]  # fmt: skip


@pytest.fixture
def no_editable_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of another copy of this project, which an editable install would find."""
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if "editable" not in repr(one).lower()])


@pytest.mark.usefixtures("no_editable_install")
@pytest.mark.parametrize(("statement", "hint"), MOVED)
def test_a_module_of_ours_that_was_moved_is_named_in_the_hint(tmp_path: Path, statement: str, hint: str):
    (tmp_path / "mine.py").write_text(f"import os\n{statement}\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"mine\.py' must import, got \w*Error: .*\(mine\.py:2\)") as caught:
        import_callable(f"{tmp_path / 'mine.py'}:Net")
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "statement",
    [
        "import compress.nothing",
        "from compress import nothing",
        "import no_such_one",
        "import compress.data.sources.mine",
    ],
)
def test_a_module_that_never_was_has_no_such_hint(tmp_path: Path, statement: str):
    (tmp_path / "mine.py").write_text(statement, encoding="utf-8")
    with pytest.raises(ModelError, match=r"mine\.py' must import") as caught:
        import_callable(f"{tmp_path / 'mine.py'}:Net")
    assert caught.value.hint is None


@pytest.mark.usefixtures("no_editable_install")
def test_a_plug_in_and_code_that_imports_late_get_the_hint(tmp_path: Path):
    world = smallrun.make_world(tmp_path)
    (world.folder / "old_plugin.py").write_text("from compress.registry import Registry\n", encoding="utf-8")
    done = smallrun.call("validate", str(world.write(world.values() | {"plugins": ["old_plugin"]})))
    assert done.exit_code == 2
    assert "plugins[0] must be a module that can be imported, got 'old_plugin'" in done.stderr
    assert "Hint: compress.registry is now compress.catalog." in done.stderr

    def late() -> None:
        import compress.recipe  # noqa: F401

    assert getattr(ours(late), "hint", None) == "compress.recipe is now compress.model.recipe."


@pytest.mark.usefixtures("no_editable_install")
def test_every_new_name_exists_and_no_old_one_does():
    assert len(user_code._MOVED) > 60
    for old, new in user_code._MOVED.items():
        assert exists(f"compress.{new}"), new
        assert not exists(f"compress.{old}") or is_package(f"compress.{old}"), old


def exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is not there
        return False


def is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None
