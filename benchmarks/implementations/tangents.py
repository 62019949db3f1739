"""neural-tangents, in a Python of its own, whose pinned JAX needs older libraries.

The other process gets the same weights and inputs, computes the kernel by the fastest of its
implementations, and after that computes it once for each line that it reads.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.problem import NotApplicable, Outcome, Problem, Step

FOLDER = Path(__file__).parents[2] / "out" / "bench" / "jax"
PROGRAM = Path(__file__).with_name("jax_kernel.py")


def neural_tangents(problem: Problem) -> Step:
    """``empirical_ntk_fn`` of an MLP, compiled."""
    if not (problem.kernel and isinstance(problem.model, nn.Sequential)):
        raise NotApplicable("written in JAX: for the kernel of case D only")
    python = FOLDER / "bin" / "python"
    if not python.exists():
        raise NotApplicable("not installed: make bench-peers")
    folder = Path(tempfile.mkdtemp())
    layers = [m for m in problem.model if isinstance(m, nn.Linear)]
    arrays = itertools.chain(*((m.weight.T, m.bias) for m in layers), problem.inputs)
    np.savez(folder / "given.npz", *(x.detach().cpu().numpy() for x in arrays))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        [str(python), "-I", str(PROGRAM), str(folder), str(torch.get_num_threads())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    talk, answers = process.stdin, process.stdout
    if not answers.readline().startswith("ready"):
        raise RuntimeError("neural-tangents failed: run benchmarks/implementations/jax_kernel.py by hand")
    gramian = torch.from_numpy(np.load(folder / "kernel.npy"))  # [B, K, B, K]

    def step() -> Outcome:
        talk.write("\n")
        talk.flush()
        answers.readline()
        return Outcome(gramian.flatten(0, 1).flatten(1), None)

    return step
