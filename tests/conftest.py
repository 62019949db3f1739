"""Settings that every test shares."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only get into each other's way


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
