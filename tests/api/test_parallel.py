"""A slim network under DistributedDataParallel, in two processes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compress

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(16, 2))
images, labels = torch.rand(32, 3, 10, 10), torch.arange(32) % 2
slim = compress.prune(model, images[:1], macs=0.6, data=(images, labels), multiple_of=1, progress=False)
trained = DistributedDataParallel(slim.train())
optimizer = torch.optim.SGD(trained.parameters(), 0.1)
own = slice(16 * rank, 16 * rank + 16)  # each process has images of its own
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(trained(images[own]), labels[own]).backward()
    optimizer.step()
total = torch.stack([value.double().sum() for value in slim.parameters()]).sum()
sums = [torch.zeros_like(total) for _ in range(2)]
dist.all_gather(sums, total)
assert torch.equal(sums[0], sums[1]), sums
if rank == 0:
    slim.eval()
    compress.export(trained, "ddp.onnx")
    compress.save(trained, "slim")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gloo on two processes is tried on Linux")
def test_two_processes_train_and_export_a_slim_network(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "ddp.onnx").is_file()
    assert (tmp_path / "slim" / "recipe.json").is_file()
