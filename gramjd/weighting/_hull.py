"""The point of smallest norm in the convex hull of many points with few coordinates (MGDA, CAGrad).

With ``c > 0``, the weights are ``x / Σ x`` of the ``x >= 0`` that minimizes ``|Sᵀx|² + c (Σ x - 1)²``: a
nonnegative least-squares problem in ``n + 1`` equations, solved by the active-set method of Lawson and Hanson
(1974), Chapter 23. It keeps an orthogonal basis of the columns in use, of which there are at most ``n + 1``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# which c lies how far between the smallest and the largest squared norm, one after the other
SHIFTS = [0.0, 0.5, 1.0]
GOAL, ENOUGH = 1e-13, 1e-11  # relative gap at which pivoting ends; above which another shift is tried
DEPENDENT = 1e-11  # sine of the angle below which a column counts as a combination of those in use


@dataclass
class _Basis:
    """Columns in use, ``A = QR``."""

    q: Tensor  # [n + 1, k]
    r: Tensor  # [k, k]
    used: list[int] = field(default_factory=list)

    @staticmethod
    def empty(like: Tensor) -> _Basis:
        return _Basis(like.new_zeros(like.shape[1], 0), like.new_zeros(0, 0))

    def add(self, columns: Tensor, number: int) -> bool:
        """Whether it is no combination of the others."""
        rest, share = columns[number], columns.new_zeros(len(self.used))
        for _ in range(2):  # once more, for what rounding leaves
            part = rest @ self.q
            rest, share = rest - self.q @ part, share + part
        length = rest.norm()
        if float(length) <= DEPENDENT:
            return False
        self.q = torch.cat([self.q, (rest / length).unsqueeze(1)], 1)
        bottom = torch.cat([torch.zeros_like(share), length.reshape(1)])
        self.r = torch.cat([torch.cat([self.r, share.unsqueeze(1)], 1), bottom.unsqueeze(0)])
        self.used.append(number)
        return True

    def start(self, columns: Tensor, used: list[int]) -> None:
        """Start with these columns, without those that are combinations of others."""
        self.used = used
        self.q, self.r = torch.linalg.qr(columns[used].mT)
        if len(self.r) < len(used) or bool((self.r.diagonal().abs() <= DEPENDENT).any()):
            self.used, self.q, self.r = [], self.q[:, :0], self.r[:0, :0]
            for number in used:
                self.add(columns, number)

    def keep(self, columns: Tensor, kept: list[bool]) -> None:
        """Drop the columns that are not kept."""
        self.used = [n for n, stays in zip(self.used, kept, strict=True) if stays]
        self.q, self.r = torch.linalg.qr(columns[self.used].mT)

    def solve(self, target: Tensor) -> Tensor:
        """``[k]``: the least-squares solution."""
        right = (target @ self.q).unsqueeze(1)
        return torch.linalg.solve_triangular(self.r, right, upper=True).squeeze(1)


def nearest(points: Tensor, guess: Tensor | None = None) -> Tensor:
    """The weights ``w [m]`` of the point of smallest norm in the hull of ``points [m, n]``, in float64.

    ``guess [m]`` marks their support, as far as it is known.
    """
    squares = points.square().sum(-1)
    zero = squares <= 0
    if bool(zero.any()):  # a zero vector is the point itself
        return zero.to(points.dtype) / zero.sum()
    smallest, largest = squares.min(), squares.max()
    best, gap = torch.full_like(squares, 1 / len(squares)), torch.inf
    for weight in SHIFTS:
        w = _pivoted(points, squares, smallest * (largest / smallest) ** weight, guess)
        if (found := float(hull_gap(points, w))) < gap:
            best, gap = w, found
        if gap <= ENOUGH:
            break
    return best


def hull_gap(points: Tensor, w: Tensor) -> Tensor:
    """``wᵀGw - min_i (Gw)_i`` for ``G = SSᵀ``, relative to ``(Σ w_i |s_i|)²``; zero at the minimum alone."""
    nearest = w @ points
    length = w @ points.norm(dim=-1)
    gap = nearest.square().sum() - (points @ nearest).min()
    return gap / length.square().clamp(min=torch.finfo(w.dtype).tiny)


def _pivoted(points: Tensor, squares: Tensor, shift: Tensor, guess: Tensor | None) -> Tensor:
    scale = (squares + shift).rsqrt()
    columns = torch.cat([points, shift.sqrt().expand(len(points), 1)], 1) * scale.unsqueeze(1)
    target = torch.zeros_like(columns[0])
    target[-1] = shift.sqrt()
    basis, x = _Basis.empty(columns), torch.zeros_like(squares)
    blocked = torch.zeros_like(squares, dtype=torch.bool)  # of no use until there is progress
    if guess is not None:
        basis.start(columns, guess.nonzero().squeeze(-1).tolist())
        x = _towards(basis, columns, target, x)
    error = float((target - x @ columns).norm())
    for _ in range(20 * columns.shape[1]):
        residual = target - x @ columns
        w = x * scale
        if bool((w > 0).any()):
            w = w / w.sum()
            if float(hull_gap(points, w)) <= GOAL:
                break
        slope = torch.where(blocked, -torch.inf, (columns @ residual) / scale)
        slope[basis.used] = -torch.inf
        new = int(slope.argmax())
        if not float(slope[new]) > 0:
            break
        before = x
        if not basis.add(columns, new):
            blocked[new] = True
            continue
        x = _towards(basis, columns, target, x)
        now = float((target - x @ columns).norm())
        if now < error:
            blocked[:], error = False, now
        else:
            x, blocked[new] = before, True
            basis.keep(columns, [bool(before[n] > 0) for n in basis.used])
    w = x * scale
    return w / w.sum()


def _towards(basis: _Basis, columns: Tensor, target: Tensor, x: Tensor) -> Tensor:
    """Move to the solution on the columns in use, and drop those whose weights would become negative."""
    while basis.used:
        solution = basis.solve(target)
        if bool((solution > 0).all()):
            return torch.zeros_like(x).index_put((torch.tensor(basis.used, device=x.device),), solution)
        old = x[basis.used]
        ratios = torch.where(solution <= 0, old / (old - solution), torch.inf).nan_to_num(0.0)
        step = float(ratios.min())
        moved = old + step * (solution - old)
        stays = (moved > 0) & (ratios > step)
        x = torch.zeros_like(x).index_put((torch.tensor(basis.used, device=x.device),), moved * stays)
        basis.keep(columns, stays.tolist())
    return torch.zeros_like(x)
