"""What every test file starts from: `import nets` works, torch keeps to one thread (tiny networks gain nothing)."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is the same to the bit on a CPU is not on a GPU

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
