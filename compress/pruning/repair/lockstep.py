"""Forward passes over many images that wait for one another at chosen layers.

A repair that goes from layer to layer needs the activations of all images at one layer before any pass continues,
because the layer changes in between. Waiting passes cost one forward pass for all layers together; a restart for each
layer would cost one per layer.

    with Lockstep(network, ["conv1", "conv2"], batches) as passes:
        inputs = list(passes.reach("conv1"))     # every pass now waits before conv1
        ...change conv1...
        inputs = list(passes.reach("conv2"))     # ran through the changed conv1
"""

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InternalError
from compress.model.modes import hooked


class _AbandonedError(BaseException):  # a network's own `except Exception` must not swallow it
    """Exception that ends an abandoned pass."""


class _Pass:
    """One batch's forward pass, in a thread that runs only while the caller waits for it."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.at: str | None = None
        self.seen: tuple[Tensor, ...] = ()
        self.is_abandoned = False
        self._error: BaseException | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(network, images), daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run the pass until it waits at its next layer, then in `at`, or ends, with `at` None."""
        self.at, self.seen = None, ()
        self._go.release()
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def is_here(self) -> bool:
        """Return whether the caller is inside this pass; calls of layers from elsewhere do not wait."""
        return threading.current_thread() is self._thread

    def wait(self, layer: str, seen: tuple[Tensor, ...]) -> None:
        """Hand over the tensors seen at a layer and wait to be advanced; called inside the pass."""
        if self.is_abandoned:
            raise _AbandonedError
        self.at, self.seen = layer, seen
        self._waits.release()
        self._go.acquire()
        if self.is_abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """End the pass where it waits."""
        self.is_abandoned = True
        self._go.release()
        self._thread.join()

    def _run(self, network: nn.Module, images: Tensor) -> None:
        self._go.acquire()
        try:
            if not self.is_abandoned:
                with torch.no_grad():
                    network(images)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waits.release()


class Lockstep:
    """Forward passes of one network that wait at given layers.

    Args:
        network: A network in eval mode; its weights may be changed while the passes wait.
        layers: Module paths, in the order in which the network calls them first.
        batches: The images of each pass, (N, C, H, W).
        after: Layers behind which a pass waits, with their input and output. It waits before the other layers, with
            their input.

    Attributes:
        shift: (outputs,) or None; added to the output of the layer behind which the passes wait, when they continue.

    Layers called from outside the passes do not wait. All passes hold their live activations at once; the caller
    bounds the number of images.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], batches: Iterable[Tensor], after: Container[str] = ()
    ) -> None:
        self.shift: Tensor | None = None
        self._layers = iter(layers)
        self._names = {network.get_submodule(name): name for name in layers}
        self._running: _Pass | None = None
        self._passes = [_Pass(network, images) for images in batches]
        self._hooks = hooked(
            before=[(layer, self._before) for layer, name in self._names.items() if name not in after],
            after=[(layer, self._after) for layer, name in self._names.items() if name in after],
        )

    def reach(self, layer: str) -> Iterator[tuple[Tensor, ...]]:
        """Advance each pass to the layer and yield the tensors seen there, one pass after the other.

        Raises:
            InternalError: A pass reaches another layer, or its end.
        """
        if next(self._layers, None) != layer:
            raise InternalError(f"Layers must be reached in the order given, '{layer}' is out of it.")
        for one in self._passes:
            self._running = one
            one.advance()
            if one.at != layer:
                raise InternalError(f"The forward pass should come to layer '{layer}' next, it came to '{one.at}'.")
            yield one.seen

    def __enter__(self) -> "Lockstep":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._passes:
            one.abandon()
        self._hooks.close()

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._wait(layer, inputs[0])

    def _after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        self._wait(layer, inputs[0], output)
        if self.shift is None:
            return output
        trailing = 0 if isinstance(layer, nn.Linear) else output.ndim - 2
        return output + self.shift.reshape(-1, *[1] * trailing)

    def _wait(self, layer: nn.Module, *seen: Tensor) -> None:
        if self._running is not None and self._running.is_here():
            self._running.wait(self._names[layer], seen)


def run_watched(
    network: nn.Module, images: Tensor, hooks: Mapping[nn.Module, Callable[..., None]], before: bool = False
) -> None:
    """Run a network once without gradients, with hooks on some of its parts.

    Args:
        network: A network in eval mode.
        images: (N, C, H, W).
        hooks: Part -> function called with the part, its inputs and its output.
        before: Whether the functions are called before the parts run, without the output.
    """
    with hooked(before=hooks.items()) if before else hooked(after=hooks.items()), torch.no_grad():
        network(images)


def call_order(network: nn.Module, parts: Iterable[str], images: Tensor) -> list[str]:
    """Return the parts that a forward pass calls exactly once, in the order in which it enters them.

    Args:
        network: A network in eval mode.
        parts: Module paths.
        images: (N, C, H, W).
    """
    names = {network.get_submodule(name): name for name in parts}
    called: list[str] = []
    run_watched(network, images, {part: lambda part, _: called.append(names[part]) for part in names}, before=True)
    return [name for name in called if called.count(name) == 1]


def following_norms(network: nn.Module, norms: tuple[type[nn.Module], ...], images: Tensor) -> dict[str, str]:
    """Return layer -> module path of the norm, for each layer whose output tensor that norm alone reads.

    Args:
        network: A network in eval mode.
        norms: The classes that count as norms.
        images: (N, C, H, W).
    """
    given: dict[int, tuple[str, int]] = {}
    held: list[Tensor] = []  # keeps tensors alive, so that no id is used twice
    readers: dict[str, list[str]] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(part: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            for value in inputs:
                layer, version = given.get(id(value), (None, 0))
                if layer is not None:
                    # changed in place after the layer's call: another operation lies between
                    is_norm = isinstance(part, norms) and isinstance(value, Tensor) and value._version == version
                    readers.setdefault(layer, []).append(name if is_norm else "")
            if isinstance(output, Tensor):
                given[id(output)] = name, output._version
                held.append(output)

        return hook

    leaves = {part: watch(name) for name, part in network.named_modules() if not any(part.children())}
    run_watched(network, images, leaves)
    return {layer: found[0] for layer, found in readers.items() if len(found) == 1 and found[0]}
