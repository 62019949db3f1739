"""Blocks: one use's share of the Jacobian of a parameter, kept in factored form.

Legend of letters, the same in every file:

    K  objectives per sample          B  samples; a row of J is (k, b)
    T  positions at which one sample uses the weight: tokens, pixels, time steps, reuses
    G  groups of a grouped convolution (1 otherwise)
    o  output features per group      i  input features per group
    c  cotangents of a use's output   a  activations, the use's input
    V  entries of a table             d  width of an entry
    P  entries of the parameter       n  rows of a matrix of rows, K·B

The sum of a parameter's blocks is its Jacobian. Blocks never detach: they are plain tensor code and
compose with ``vmap``, ``grad`` and ``jvp``. Each names the op that it comes from, its ``origin``.

Every block has ``rows`` (K and B), ``dense``, ``vjp``, ``bound``, ``samples`` and ``objectives`` (the
block of some of them), and ``part``: all rows at some entries of the flat parameter, a multiple of
``grain`` from a multiple of ``grain`` on, in a dtype.
"""

from gramjd.blocks.conv import Conv
from gramjd.blocks.dense import Dense
from gramjd.blocks.flat import Structure, flatten, unflatten
from gramjd.blocks.lookup import Lookup
from gramjd.blocks.outer import Outer
from gramjd.blocks.sums import Block, common_grain, fits, is_zero, merge, spread, transpose, with_origin

__all__ = [
    "Block",
    "Conv",
    "Dense",
    "Lookup",
    "Outer",
    "Structure",
    "common_grain",
    "fits",
    "flatten",
    "is_zero",
    "merge",
    "spread",
    "transpose",
    "unflatten",
    "with_origin",
]
