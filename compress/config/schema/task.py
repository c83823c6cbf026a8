"""Schema of `task`."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from compress.catalog import (
    TASKS,
)
from compress.config.schema.base import OptionalReference, Section, registered


class TaskConfig(Section):
    """Task of the network, which decides loss and metrics; a name alone stands for its default settings."""

    name: Annotated[str, registered(TASKS)] | None = Field(None, description=f"one of {', '.join(TASKS)}")
    own: OptionalReference = Field(None, description='task of your own: "path/to/file.py:Class"')
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of that task, or of postprocess"
    )
    ignore_index: int | None = Field(None, description="segmentation: value of ignored mask pixels; by default 255")
    postprocess: OptionalReference = Field(
        None, description='detection: "path/to/file.py:function" from outputs to boxes'
    )
    loss: OptionalReference = Field(
        None,
        description="detection: function of outputs and targets; by default imitation of the baseline",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_name(cls, value: Any) -> Any:
        """Read text as the name of a task."""
        return {"name": value} if isinstance(value, str) else value

    def _check_rules(self) -> None:
        if (self.name is None) == (self.own is None):
            raise ValueError("must hold exactly one of name, own")
        for key, owners in TASK_OPTIONS.items():
            if key in self.model_fields_set and getattr(self, key) is not None and (self.name or "own") not in owners:
                if key == "kwargs" and not self.kwargs:
                    continue
                raise ValueError(f"{key} must be left out unless the task is {' or '.join(owners)}")
        if self.name == "detection" and self.postprocess is None:
            raise ValueError("postprocess must be given for the task detection")


TASK_OPTIONS = {
    "kwargs": ("own", "detection"),
    "ignore_index": ("segmentation",),
    "postprocess": ("detection",),
    "loss": ("detection",),
}


DEFAULT_TASK = TaskConfig(name="classification")
