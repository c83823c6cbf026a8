"""What every test file starts from: `import nets` works, torch keeps to one thread (tiny networks gain nothing)."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is the same to the bit on a CPU is not on a GPU
for _library in ("OMP", "OPENBLAS", "MKL"):  # before NumPy is imported
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker.startswith("gw") and hasattr(os, "sched_setaffinity"):  # threads of two workers would wait for each other
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker[2:]) % len(_cores)]})

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


SLOW = (  # runs of pipelines, trainings, measurements, code of the documentation
    "tests/api", "tests/bundle", "tests/docs", "tests/e2e", "tests/exporting", "tests/onnx_import", "tests/report",
    "tests/scaffold", "tests/search", "tests/stages", "tests/cli/test_first_hour.py", "tests/networks/test_shapes.py",
    "tests/training/test_loop.py", "tests/training/test_distributed.py", "tests/engine", "tests/fuzz",
    "tests/inspection", "tests/quantization", "tests/networks/test_networks.py", "tests/pruning/test_torch_pruning.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that `make test-fast` leaves out."""
    for item in items:
        if item.path.relative_to(config.rootpath).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test ask for two threads where its worker has one core."""
    monkeypatch.setattr("compress.verification.measurement.available_cores", lambda: 2)
