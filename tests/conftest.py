"""Settings that every test shares."""

import pytest
import torch
from oracle import OLD

from gramjd import prepared
from gramjd.verification.schedule import forget

torch.set_num_threads(1)  # tiny tensors: threads only get into each other's way


def pytest_configure(config: pytest.Config) -> None:
    """Let be what torch 2.1 warns of itself: of attention under ``vmap``, and in some backward passes."""
    if OLD:
        for message in (
            "There is a performance drop because",
            "Casting complex values to real",
            "An output with one or more elements was resized",
        ):
            config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_verified() -> None:
    """What one test verifies of a function counts in no other."""
    forget()


@pytest.fixture(autouse=True)
def _nothing_is_prepared() -> None:
    """What one test asks often, no other has asked."""
    prepared.forget()
