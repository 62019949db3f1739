"""Gramians of samples that several processes hold, on ``torch.distributed``.

Every rank has the blocks of its own samples. What is between the samples of two ranks is computed once,
from factors that travel around a ring, and each rank gets all of it (or its own rows).
"""

from gramjd.distributed.gramian import gramian, taking_part

__all__ = ["gramian", "taking_part"]
