"""What every test file starts from: `import nets` works, and torch keeps to one thread (tiny networks gain nothing)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
