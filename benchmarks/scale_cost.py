"""Cost of many networks at many budgets on a cluster, from measured stage times (docs/scale/paper-plan.md).

    python benchmarks/scale_cost.py [--networks 1000] [--budgets 10] [--nodes 100] [--measuring 10]

Times are those of docs/experiments (ResNet-56 and others, two cores of an AMD EPYC) and the constants of `compress plan
--estimate`. A node has two cores and takes one run at a time.
"""

import argparse
from dataclasses import dataclass

TRAIN_IMAGES = 50_000  # CIFAR-10
LOAD_S, EXPORT_S, VERIFY_S = 12.0, 6.0, 45.0  # constants of `compress plan --estimate`
HOUR_S = 3600.0


@dataclass(frozen=True)
class Network:
    """Measured seconds of a network.

    Attributes:
        name: Name of the row.
        table_s: Latency table (2026-11-22-cost-of-prune.md).
        prune_s: `prune` with a cached table (the same page).
        train_s: Fine-tuning (images over images per second, 2026-11-22-training-speed.md); 0 for none.
        params: Scalars in parameters.
    """

    name: str
    table_s: float
    prune_s: float
    train_s: float
    params: float


NETWORKS = (
    Network("ResNet-56, 1 epoch", 20.4, 21.0, TRAIN_IMAGES / 101, 0.86e6),
    Network("ResNet-56, 3 epochs", 20.4, 21.0, 3 * TRAIN_IMAGES / 101, 0.86e6),
    Network("ResNet-18 at 224, no training", 37.7, 117.0, 0.0, 11.7e6),
    Network("ResNet-50 at 224, no training", 85.5, 249.0, 0.0, 25.6e6),
)


@dataclass(frozen=True)
class Plan:
    """Size of the project and of the cluster; `measuring` of the nodes have the resource "timing"."""

    networks: int
    budgets: int
    nodes: int
    measuring: int

    def hours(self, network: Network) -> tuple[float, float]:
        """Return node hours of training nodes and of measuring nodes; a latency target makes `prune` a measurement."""
        each = self.networks * self.budgets
        training = self.networks * LOAD_S + each * (network.train_s + EXPORT_S)
        measuring = self.networks * network.table_s + each * (network.prune_s + VERIFY_S)
        return training / HOUR_S, measuring / HOUR_S

    def row(self, network: Network) -> tuple[str, ...]:
        """Return the cells of a row."""
        training, measuring = self.hours(network)
        on_all = (training + measuring) / self.nodes
        by_training, by_measuring = training / (self.nodes - self.measuring), measuring / self.measuring
        shared = self.networks * (self.budgets - 1) * (LOAD_S + network.table_s) / HOUR_S
        bytes_stored = self.networks * self.budgets * 4 * 3 * 4 * network.params  # four stages, three copies, float32
        return (
            network.name,
            f"{training:,.0f}",
            f"{measuring:,.0f}",
            f"{on_all:,.1f}",
            f"{max(by_training, by_measuring):,.1f}",
            "measuring" if by_measuring > by_training else "training",
            f"{shared:,.0f}",
            f"{bytes_stored / 1e12:,.1f}",
        )


COLUMNS = (
    "network",
    "training (node hours)",
    "measuring (node hours)",
    "hours, every node measures",
    "hours, {} nodes measure",
    "bottleneck then",
    "node hours saved by sharing",
    "stored (TB)",
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("networks", 1000), ("budgets", 10), ("nodes", 100), ("measuring", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    plan = Plan(**vars(parser.parse_args()))
    columns = [column.format(plan.measuring) for column in COLUMNS]
    for row in (columns, ["---"] * len(columns), *map(plan.row, NETWORKS)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
