"""How does the `task:` section of a pipeline become a task?"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from compress.catalog import TASKS
from compress.config.schema import TaskConfig
from compress.errors import CompressError, ModelError
from compress.references import beside, import_callable
from compress.tasks.base import Task

_USERS = (
    "loss",
    "training_loss",
    "image_losses",
    "distance",
    "distances",
    "check",
    "vary",
    "metrics",
    "facts",
    "figures",
)


def open_task(config: TaskConfig) -> Task:
    """Return the task; only what the section names is imported.

    Args:
        config: Checked, with absolute paths.

    Raises:
        ModelError: Something of the user's own cannot be imported, raises, or is no task.
    """
    if config.own is not None:
        return own_task(config.own, config.kwargs)
    made: dict[str, Any] = {}
    if config.ignore_index is not None:
        made["ignore_index"] = config.ignore_index
    if config.postprocess is not None:
        made["postprocess"] = import_callable(config.postprocess, "Postprocess")
    if config.loss is not None:
        made["loss"] = guarded(import_callable(config.loss, "Loss"), f"Loss '{config.loss}'")
    task: Task = TASKS.get(str(config.name))(**made)
    return task


def own_task(reference: str, kwargs: dict[str, Any]) -> Task:
    """Return the user's own task.

    Raises:
        ModelError: It cannot be imported, raises, or is none.
    """
    make = import_callable(reference, "Task")
    with beside(reference):
        try:
            task = make(**kwargs)
        except (Exception, SystemExit) as error:  # the user's code: its error is shown, ours is around it
            raise ModelError(f"Task '{reference}' must open, got {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise ModelError(
            f"Task '{reference}' must be a compress.Task, got {type(task).__name__}.",
            hint="class MyTask(compress.Task): with metric, loss and metrics",
        )
    if not task.metric:
        raise ModelError(
            f"Task '{reference}' must name the figure that decides, its metric is empty.", hint='metric = "accuracy"'
        )
    _guard(task, reference)
    return task


def _guard(task: Task, reference: str) -> None:
    """Let the methods of a user's task show their errors, and so those of its copies, such as for a size of images."""
    base, what = type(task), f"of task '{reference}'"

    def method_of(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **kwargs: Any) -> Any:
            return guarded(getattr(super(own, self), name), f"Method '{name}' {what}")(*arguments, **kwargs)

        return method

    for name in vars(task).keys() & set(_USERS):  # functions that the task was given when it was made
        setattr(task, name, guarded(getattr(task, name), f"Method '{name}' {what}"))
    own = type(base.__name__, (base,), {"__module__": base.__module__} | {name: method_of(name) for name in _USERS})
    task.__class__ = own


def guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a function of the user's whose errors are shown with ours around them.

    Args:
        function: What the user wrote.
        what: It is, at the beginning of a sentence.
    """

    @wraps(function)
    def call(*arguments: Any, **kwargs: Any) -> Any:
        try:
            return function(*arguments, **kwargs)
        except CompressError:
            raise
        except Exception as error:  # the user's code
            if "memory" in str(error):  # which the training loop explains
                raise
            raise ModelError(f"{what} must work on these outputs, got {type(error).__name__}: {error}") from error

    return call
