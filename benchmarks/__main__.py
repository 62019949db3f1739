"""What a step of Jacobian descent costs in plain SGD steps, beside every peer.

    python -m benchmarks                                # everything: results, tables, pictures, README
    python -m benchmarks --case A --impl functional     # one; results of others are kept
    python -m benchmarks --scaling                      # how cost and memory grow
    python -m benchmarks --real                         # models of real sizes, on demand alone
    python -m benchmarks --case BERT --impl recipe-kept # one of them
    python -m benchmarks --compiled                     # steps by torch.compile, on demand alone
    python -m benchmarks --report                       # tables and pictures again, from the results

Each measurement runs in a fresh process with fixed numbers of threads; see ``setting.py``.
"""

from __future__ import annotations

import argparse
import signal
import sys

import torch

from benchmarks import report, runner
from benchmarks.cases import CASES, REAL
from benchmarks.implementations import COMPILED, IMPLEMENTATIONS, USUAL
from benchmarks.scaling import AXES


def main() -> None:
    """Measure what is asked for, then write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[*CASES, *REAL], help="A to J by default")
    parser.add_argument(
        "--impl", nargs="+", choices=IMPLEMENTATIONS, help="all but those by torch.compile by default"
    )
    parser.add_argument("--real", action="store_true", help="models of real sizes")
    parser.add_argument("--compiled", action="store_true", help="implementations by torch.compile")
    parser.add_argument("--scaling", nargs="*", choices=AXES, metavar="CASE:AXIS", help=", ".join(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which a pair of steps alternates")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that children are stopped, too
    chosen = options.case or options.impl or options.real or options.compiled
    everything = not (chosen or options.report) and options.scaling is None
    if everything or chosen:
        for case in options.case or (REAL if options.real else CASES):
            for name in options.impl or (COMPILED if options.compiled else USUAL):
                runner.run(case, name, options.device, options.seconds)
    if everything or options.scaling is not None:
        for axis in options.scaling or AXES:
            runner.run_scaling(axis, options.device)
    report.write()


if __name__ == "__main__":
    main()
