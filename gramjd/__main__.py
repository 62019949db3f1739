"""``python -m gramjd``: what is installed, what a model gets, and whether it is right."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gramjd import __version__
from gramjd.cli.check import CANNOT_RUN, check, explain
from gramjd.cli.info import info
from gramjd.cli.load import CONTRACT, MOST, CannotRunError, load
from gramjd.cli.terminal import Progress, in_color

PURPOSE = "What is installed, what a model gets, and whether its Gramian is right."
CODES = """\
exit codes: 0 done (check: the Gramian is exact); 1 the Gramian is wrong, or gramjd failed: a bug to report;
2 the command line or the model is not usable; 3 refused: gramjd said why there is no Gramian"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    args = _parser().parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    progress = Progress(sys.stderr)
    try:
        problem = load(args.factory, getattr(args, "batches", 1), args.batch_dim).moved_to(args.device)
        if args.command == "explain":
            report = explain(problem, args.batch_dim, progress)
        else:
            report = check(
                problem,
                args.batch_dim,
                own_precision=args.own_precision,
                rows=args.rows,
                tolerance=args.tolerance,
                repeats=args.repeats,
                mode=args.mode,
                progress=progress,
            )
    except CannotRunError as error:
        progress.close()
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"gramjd: error: {error}", file=sys.stderr)
        return CANNOT_RUN
    progress.close()
    try:
        print(*(in_color(line, sys.stdout) for line in report.lines), sep="\n", flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.code


def _parser() -> argparse.ArgumentParser:
    program = "gramjd" if Path(sys.argv[0]).stem == "gramjd" else "python -m gramjd"
    parser = argparse.ArgumentParser(
        program, description=PURPOSE, epilog=CODES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"gramjd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,explain,check}")
    commands.add_parser("info", help="versions, devices and defaults")
    _of_a_model(commands, "explain", "the blocks, plans and costs of a model of yours")
    check = _of_a_model(commands, "check", "its Gramian against autograd's gradients, and what a step costs")
    check.add_argument("--own-precision", action="store_true", help="do not judge on a copy in float64")
    modes = "the model's own mode and the other one, or one alone (default: both)"
    check.add_argument("--mode", choices=("both", "train", "eval"), default="both", help=modes)
    _option(check, "--batches", MOST, _positive, "N", "judge at most so many batches, if there are several")
    _option(check, "--rows", 64, _positive, "N", "compare at most so many losses")
    tolerance = "relative error that counts as exact (default: 1e-8; with --own-precision, of that precision)"
    check.add_argument("--tolerance", type=float, metavar="X", help=tolerance)
    _option(check, "--repeats", 5, _positive, "N", "times that each step is measured")
    return parser


def _of_a_model(commands: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    """A command that loads a user's model."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=f"{CONTRACT}\n\n{CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("factory", metavar="FILE:FACTORY")
    _option(command, "--batch-dim", 0, _batch_dim, "N|none", "dimension of independent samples")
    device = "move the model and its batches to a device, for instance cuda (default: where they are)"
    command.add_argument("--device", type=_device, metavar="D", help=device)
    return command


def _option(command: argparse.ArgumentParser, name: str, default: float, type: Callable[[str], object],
            metavar: str, purpose: str) -> None:  # fmt: skip
    purpose = f"{purpose} (default: {default})"
    command.add_argument(name, default=default, type=type, metavar=metavar, help=purpose)


def _batch_dim(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, got {text!r}") from None


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda, got {text!r}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
