"""What a step of Jacobian descent costs in plain SGD steps, beside every peer.

    python -m benchmarks                                # everything: results, tables, pictures, README
    python -m benchmarks --case A --impl functional     # one; results of others are kept
    python -m benchmarks --scaling                      # how cost and memory grow
    python -m benchmarks --report                       # tables and pictures again, from the results

Each measurement runs in a fresh process with fixed numbers of threads; see ``setting.py``.
"""

from __future__ import annotations

import argparse
import signal
import sys

import torch

from benchmarks import report, runner
from benchmarks.cases import CASES
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.scaling import AXES


def main() -> None:
    """Measure what is asked for, then write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, help="all by default")
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, help="all by default")
    parser.add_argument("--scaling", nargs="*", choices=AXES, metavar="CASE:AXIS", help=", ".join(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which a pair of steps alternates")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that children are stopped, too
    everything = not (options.case or options.impl or options.report) and options.scaling is None
    if everything or options.case or options.impl:
        for case in options.case or CASES:
            for name in options.impl or IMPLEMENTATIONS:
                runner.run(case, name, options.device, options.seconds)
    if everything or options.scaling is not None:
        for axis in options.scaling or AXES:
            runner.run_scaling(axis, options.device)
    report.write()


if __name__ == "__main__":
    main()
