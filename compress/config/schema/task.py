"""Schema of `task`."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from compress.catalog import (
    TASKS,
)
from compress.config.schema.base import OptionalReference, Section, registered


class TaskConfig(Section):
    """What the network is for: what is learned, and what is measured. The name of a task alone will do."""

    name: Annotated[str, registered(TASKS)] | None = Field(None, description=f"one of {', '.join(TASKS)}")
    own: OptionalReference = Field(None, description='a task of your own: "path/to/file.py:Class"')
    kwargs: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the task of your own")
    ignore_index: int | None = Field(None, description="segmentation: value of mask pixels that do not count; 255")
    postprocess: OptionalReference = Field(
        None, description='detection: "path/to/file.py:function" that makes boxes of outputs'
    )
    loss: OptionalReference = Field(
        None,
        description="detection: function of outputs and targets; without, the baseline is learned from",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        """Take text for the name of a task."""
        return {"name": value} if isinstance(value, str) else value

    def _check_rules(self) -> None:
        if (self.name is None) == (self.own is None):
            raise ValueError("must hold exactly one of name, own")
        for key, owner in TASK_OPTIONS.items():
            if key in self.model_fields_set and getattr(self, key) is not None and (self.name or "own") != owner:
                if key == "kwargs" and not self.kwargs:
                    continue
                raise ValueError(f"{key} must be left out unless the task is {owner}")
        if self.name == "detection" and self.postprocess is None:
            raise ValueError("postprocess must be given for the task detection")


TASK_OPTIONS = {"kwargs": "own", "ignore_index": "segmentation", "postprocess": "detection", "loss": "detection"}


DEFAULT_TASK = TaskConfig(name="classification")
