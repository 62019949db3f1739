"""What ``make gpu`` compares, on the second device: ``python gpu.py LIBRARY``."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from device import NAME, end, start

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import gpu

if __name__ == "__main__":
    torch.set_num_threads(1)
    start(Path(sys.argv[1]))
    found = gpu.equality(gpu.Run(torch.device(NAME), math.inf, 0.1))
    assert found and all(each.get("equal") for each in found)
    end()
