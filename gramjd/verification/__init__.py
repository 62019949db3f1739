"""The transforms' own proof: blocks against ``torch.func``'s gradients, with random weights.

The first result of each *structure* (arguments and the uses found in the function, by kind, not by value) is
verified, and again at growing distances. Nothing is kept of the user's: keys hold names, numbers and dtypes.
"""

from gramjd.verification.comparison import Call
from gramjd.verification.gradients import Generators
from gramjd.verification.schedule import Verifier

__all__ = ["Call", "Generators", "Verifier"]
