"""Task of a pipeline, from the `task` section of its file."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from compress.catalog import TASKS
from compress.config.schema.task import TaskConfig
from compress.errors import ModelError
from compress.tasks.base import Task
from compress.tasks.outputs import each
from compress.user_code import import_callable, import_path_of, raise_as

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
    "aggregate",
)
_OPTIONAL = ("distance", "distances")  # a task that defines one of them is measured by it without labels
_SCALARS = ("loss", "training_loss", "distance")  # scalar for each batch


def open_task(config: TaskConfig) -> Task:
    """Return the task of a section; only the code that it names is imported.

    Args:
        config: Checked `task:` section with absolute paths.

    Raises:
        ModelError: The user's code cannot be imported, raises, or is no task.
    """
    if config.own is not None:
        return own_task(config.own, config.kwargs)
    made: dict[str, Any] = {}
    if config.ignore_index is not None:
        made["ignore_index"] = config.ignore_index
    if config.postprocess is not None:
        made["postprocess"] = partial(import_callable(config.postprocess, "Postprocess"), **config.kwargs)
    if config.loss is not None:
        what = f"Loss '{config.loss}'"
        made["loss"] = scalar(guarded(import_callable(config.loss, "Loss"), what), what)
    task: Task = TASKS.get(str(config.name))(**made)
    return task


def own_task(reference: str, kwargs: dict[str, Any]) -> Task:
    """Return the user's own task.

    Raises:
        ModelError: The reference cannot be imported, raises, or is no task.
    """
    make = import_callable(reference, "Task")
    with import_path_of(reference), raise_as(ModelError, f"Task '{reference}' must open"):
        task = make(**kwargs)
    if not isinstance(task, Task):
        raise ModelError(
            f"Task '{reference}' must be a compress.Task, got {type(task).__name__}.",
            hint="class MyTask(compress.Task): with metric, loss and metrics",
        )
    if not task.metric:
        raise ModelError(
            f"Task '{reference}' must name the primary metric, its metric is empty.", hint='metric = "accuracy"'
        )
    return _guarded_task(task, reference)


def _guarded_task(task: Task, reference: str) -> Task:
    """Return a user's task with a subclass whose methods report their errors, also in copies for an image size.

    A subclass, in contrast to a wrapper, keeps `isinstance` and the attributes of the user's class. The given object is
    unchanged, since a factory may return one object several times.
    """
    base, what = type(task), f"of task '{reference}'"

    def method_of(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **kwargs: Any) -> Any:
            return _checked(getattr(super(own, self), name), name, what)(*arguments, **kwargs)

        return method

    names = [name for name in _USERS if name not in _OPTIONAL or getattr(base, name) is not getattr(Task, name)]
    own = type(base.__name__, (base,), {"__module__": base.__module__} | {name: method_of(name) for name in names})
    shown: Task = object.__new__(own)
    vars(shown).update(vars(task))
    for name in vars(shown).keys() & set(_USERS):  # functions set on the instance
        setattr(shown, name, _checked(getattr(shown, name), name, what))
    return shown


def _checked(method: Callable[..., Any], name: str, what: str) -> Callable[..., Any]:
    """Return a method of a user's task with reported errors, and checked losses."""
    said = f"Method '{name}' {what}"
    return scalar(guarded(method, said), said) if name in _SCALARS else guarded(method, said)


def scalar(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a user's loss with a check that its value is a scalar with gradients.

    Args:
        function: Loss function of the user.
        what: Name of the function, as the beginning of a message.
    """

    @wraps(function)
    def call(outputs: Any, *arguments: Any, **kwargs: Any) -> Any:
        loss = function(outputs, *arguments, **kwargs)
        if not hasattr(loss, "backward") or loss.ndim != 0:
            got = f"shape {tuple(loss.shape)}" if hasattr(loss, "shape") else type(loss).__name__
            raise ModelError(
                f"{what} must return a scalar torch tensor, got {got}.",
                hint='the mean over the batch, such as reduction="mean"',
            )
        import torch  # not before a loss is computed: metrics are measured without it

        if torch.is_grad_enabled() and not loss.requires_grad and any(one.requires_grad for one in each(outputs)):
            raise ModelError(
                f"{what} must depend on the outputs in a way that has gradients, it has none.",
                hint="no .detach(), .item(), .numpy(), torch.no_grad() or argmax on the way",
            )
        return loss

    return call


def guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a user's function whose errors are raised as ModelError.

    Args:
        function: Function of the user.
        what: Name of the function, as the beginning of a message.
    """

    @wraps(function)
    def call(*arguments: Any, **kwargs: Any) -> Any:
        with raise_as(ModelError, f"{what} must work on these outputs"):
            return function(*arguments, **kwargs)

    return call
