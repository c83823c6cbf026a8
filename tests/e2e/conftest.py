"""One small run that the end-to-end tests share; tests that change something get a copy of it."""

import shutil
from pathlib import Path

import pytest
import smallrun
from smallrun import Finished, World


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run the small pipeline once."""
    world = smallrun.make_world(tmp_path_factory.mktemp("small") / "world")
    progress = smallrun.Notes()
    outcome = world.run(world.values(), progress=progress)
    return Finished(world, outcome, progress)


@pytest.fixture
def world(finished: Finished, tmp_path: Path) -> World:
    """A copy of the finished run, with its store, to do anything to."""
    shutil.copytree(finished.world.folder, tmp_path / "world")
    return World(tmp_path / "world")
