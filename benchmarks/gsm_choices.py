"""Agreement of the choices that gsm's scores make, on the quickstart network as it is: nothing is trained or decays.

    python benchmarks/gsm_choices.py --batch-sizes 32 128

The network stands still, so all that differs between two choices is the images of the steps before them. Agreement of
two choices is the number of channels that both remove, divided by the number that either does.
"""

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import ClassVar

from method_runs import quickstart

from compress.catalog import METHODS
from compress.cli.console import Console
from compress.config.schema.prune import PruneConfig
from compress.model.recipe import RemoveChannels
from compress.pruning.methods.gsm import Gsm
from compress.search.context import StageContext
from compress.stages.prune import PruneStage

Channels = set[tuple[str, int]]
CHOICES: list[Channels] = []


class Observed(Gsm):
    """Gsm whose choices are taken down and do nothing."""

    name: ClassVar[str] = "observed"

    def on_gradients(self, step: int) -> None:
        """Let the gradients into the scores, and take down a choice when there is one."""
        self.observe(step)
        if step >= self.first and (step - self.first) % self.interval == 0 and step < self.frozen:
            CHOICES.append({(name, channel) for name, gone in self.chosen.items() for channel in gone})


METHODS.register("observed", Observed, "gsm without consequences")


def agreement(first: Channels, second: Channels) -> float:
    """Return the channels in both, as a share of those in either."""
    return len(first & second) / len(first | second)


def removed(steps: int, batch_size: int, macs: float, console: Console, **settings: object) -> Channels:
    """Run `prune` and return what it removes; with a method, of a network that hardly moves."""
    with tempfile.TemporaryDirectory() as name:
        model, data, _ = quickstart(Path(name))
        ctx = StageContext(Path(name), 0, data, console)
        values = {"stage": "prune", "target": {"macs": macs}, "repair": [], **settings}
        if "method" in settings:
            values["training"] = {"steps": steps, "batch_size": batch_size, "learning_rate": 1e-9, "momentum": 0.0}
        slim, _ = PruneStage(PruneConfig.model_validate(values)).run(replace(model), ctx)
        (edit,) = [edit for edit in slim.recipe.edits if isinstance(edit, RemoveChannels)]
        return {(group, channel) for group, gone in edit.removed.items() for channel in gone}


def main() -> None:
    """Print the agreement at each batch size, and with what scores at once remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--choices", type=int, default=6, help="20 steps apart")
    parser.add_argument("--macs", type=float, default=0.4)
    arguments = parser.parse_args()
    console = Console()
    at_once = {
        criterion: removed(0, 0, arguments.macs, console, criterion=criterion, residual="cut")
        for criterion in ("taylor", "reconstruction")
    }
    lines = [f"taylor with reconstruction, at once: {agreement(*at_once.values()):.2f}"]
    for batch_size in arguments.batch_sizes:
        CHOICES.clear()
        removed(40 * arguments.choices + 42, batch_size, arguments.macs, console, method="observed")
        choices = CHOICES[: arguments.choices]
        of_pairs = [agreement(*pair) for pair in itertools.combinations(choices, 2)]
        with_scores = {name: mean(agreement(one, choice) for one in choices) for name, choice in at_once.items()}
        said = ", ".join(f"with {name} at once {value:.2f}" for name, value in with_scores.items())
        lines.append(f"batches of {batch_size}: two of {len(choices)} choices {mean(of_pairs):.2f}; {said}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
