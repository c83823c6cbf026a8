"""One operation of a forward pass, with its arguments by name."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Call:
    """One operation with its arguments by name.

    Attributes:
        name: PyTorch's name of the operation, such as "convolution" or "add_".
        arguments: Name -> value of each argument given.
        result: Return value of the operation.
    """

    def __init__(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.name = operation._schema.name.split("::")[-1]
        names = [argument.name for argument in operation._schema.arguments]
        self.arguments: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        self.result = result
        self._operation, self._args, self._kwargs = operation, args, kwargs

    def repeat(self, first: Tensor) -> Any:
        """Carry the operation out with another first argument."""
        return self._operation(first, *self._args[1:], **self._kwargs)

    def get(self, *names: str) -> Any:
        """Return the first of these arguments that is given and not None."""
        return next((self.arguments[name] for name in names if self.arguments.get(name) is not None), None)

    @property
    def first(self) -> Tensor:
        """The first argument."""
        value = self._args[0]
        assert isinstance(value, Tensor)
        return value

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [value for value in tree_leaves((self._args, self._kwargs)) if isinstance(value, Tensor)]

    @property
    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return [value for value in tree_leaves(self.result) if isinstance(value, Tensor)]
