"""Gramians of samples that several processes hold, on ``torch.distributed``.

Every rank has the blocks of its own samples. What is between the samples of two ranks is computed once, from
factors that travel around a ring or from slices of rows, whichever sends fewer bytes, and each rank gets all
of it (or its own rows).
"""

from gramjd.distributed.gramian import everywhere, gramian, refuse_rows, taking_part
from gramjd.distributed.step import are_sharded, averaged, is_sharded, local_weights
from gramjd.distributed.team import Team, rounds

__all__ = [
    "Team",
    "are_sharded",
    "averaged",
    "everywhere",
    "gramian",
    "is_sharded",
    "local_weights",
    "refuse_rows",
    "rounds",
    "taking_part",
]
