"""Schema of `task`."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self  # in typing from Python 3.11 on

from compress.catalog import (
    TASKS,
)
from compress.config.schema.base import REFERENCE, Section, registered


class TaskConfig(Section):
    """What the network is for: what is learned, and what is measured. The name of a task alone will do."""

    name: Annotated[str, registered(TASKS)] | None = Field(None, description=f"one of {', '.join(TASKS)}")
    own: str | None = Field(None, pattern=REFERENCE, description='a task of your own: "path/to/file.py:Class"')
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the task of your own")
    ignore_index: int | None = Field(None, description="segmentation: value of mask pixels that do not count; 255")
    postprocess: str | None = Field(
        None, pattern=REFERENCE, description='detection: "path/to/file.py:function" that makes boxes of outputs'
    )
    loss: str | None = Field(
        None,
        pattern=REFERENCE,
        description="detection: function of outputs and targets; without, the untouched network is learned from",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.name is None) == (self.own is None):
            raise ValueError("must hold exactly one of name, own")
        for key, owner in TASK_OPTIONS.items():
            if key in self.model_fields_set and getattr(self, key) is not None and (self.name or "own") != owner:
                if key == "kwargs" and not self.kwargs:
                    continue
                raise ValueError(f"{key} must be left out unless the task is {owner}")
        if self.name == "detection" and self.postprocess is None:
            raise ValueError("postprocess must be given for the task detection")
        return self


TASK_OPTIONS = {"kwargs": "own", "ignore_index": "segmentation", "postprocess": "detection", "loss": "detection"}


def _to_task(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


TaskOrName = Annotated[TaskConfig, BeforeValidator(_to_task)]


DEFAULT_TASK = TaskConfig(name="classification")
