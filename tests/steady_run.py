"""`compress` on a machine without noise. A process that times leaves a file with its rank in the folder TIMED."""

import os
from pathlib import Path

import pytest
import steady

import compress.search.rank_latency as rank_latency
import compress.search.width_latency as latency
from compress.cli.commands import app


def note_rank(time_networks):
    """Return a function that notes the rank of the process and then times."""

    def timed(*arguments):
        (Path(os.environ["TIMED"]) / os.environ["RANK"]).touch()
        return time_networks(*arguments)

    return timed


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    steady.profile_by_macs(patch)
    for place, name in (
        (latency._Timing, "pair"), (latency, "profile_models"),
        (rank_latency, "profile_models"), (rank_latency, "measure_pair"),
    ):  # fmt: skip
        patch.setattr(place, name, note_rank(getattr(place, name)))
    patch.setattr(rank_latency, "ERRORS", 2)
    app()
