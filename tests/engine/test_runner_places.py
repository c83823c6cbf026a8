"""Places that a pipeline asks for are tried before any stage."""

from typing import Any

import pytest
import smallrun
import torch

from compress.errors import ConfigValueError, NoSuchPlace, RuntimeUnavailable


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> smallrun.World:
    return smallrun.make_world(tmp_path_factory.mktemp("places"))


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"provider": "CUDAExecutionProvidr"}, NoSuchPlace, "provider must be one of"),
    ({"runtime": "torch_eager", "provider": "CPU"}, NoSuchPlace, "'torch_eager' must read ONNX files"),
    ({"runtime": "onnx_reference"}, NoSuchPlace, "it offers CPU only"),
    ({"threads": 1024, "required": True}, ConfigValueError, "threads must be at most the cores"),
    (
        {"provider": "CUDAExecutionProvider", "required": True},
        RuntimeUnavailable,
        "CUDAExecutionProvider was asked for",
    ),
]


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("place", "error", "said"), CASES)
def test_a_place_that_cannot_be_had_is_refused_before_any_stage(
    world: smallrun.World, place: dict[str, Any], error: type[Exception], said: str
) -> None:
    if place.get("provider") == "CUDAExecutionProvider" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    values = {**world.values(), "name": "refused"}
    values["stages"][-1]["also"] = [{"threads": 2}, place]
    notes = smallrun.Notes()
    with pytest.raises(error, match=rf"Section 'verify\.also\[1\]': .*{said}") as caught:
        world.run(values, progress=notes)
    assert caught.type is error
    assert not [note for note in notes.notes if "done" in note]
