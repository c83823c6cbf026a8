"""How much does the loss rise when a residual block is skipped?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.progress import Progress


def block_damage(
    module: nn.Module, blocks: Sequence[str], loss_of: Callable[[nn.Module], float], progress: Progress
) -> dict[str, float]:
    """Return for each block the loss with it skipped, less the loss with it in place.

    Args:
        module: Classifier; left as it is.
        blocks: Module paths of removable blocks.
        loss_of: Network -> mean loss on labelled images that are not the evaluation split's.
        progress: Told about each block.
    """
    with progress.task("loss without each block", len(blocks) + 1) as task:
        intact = loss_of(module)
        task.advance()
        damage = {}
        for name in blocks:
            with _skipped(module.get_submodule(name)):
                damage[name] = loss_of(module) - intact
            task.advance()
    return damage


@contextmanager
def _skipped(block: nn.Module) -> Iterator[None]:
    """Let a block return its input."""

    def pass_on(_block: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Tensor:
        unchanged: Tensor = inputs[0]
        return unchanged

    handle = block.register_forward_hook(pass_on)
    try:
        yield
    finally:
        handle.remove()
