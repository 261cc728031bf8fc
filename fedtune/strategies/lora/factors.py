"""Matrices kept as their factors: M = B @ A, with B (out, r) and A (r, in).

    stack      sum_k c_k B_k A_k = [c_1 B_1 | c_2 B_2 | ...] @ [A_1; A_2; ...]
    svd        B = Q_B R_B,  A' = Q_A R_A,  then the SVD of the small core R_B R_A'
    inner      <M, N> = tr((B_M' B_N) (A_N A_M')), r x r Gram matrices only

No function forms an (out, in) matrix: time is O((out + in) r^2), memory O((out + in) r). All
compute in fp64; `r` is the number of columns, an upper bound of the matrix's rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Factors",
    "Spectrum",
    "distances",
    "inner",
    "norm",
    "rank_within",
    "stack",
    "svd",
    "tail",
    "truncate",
]


class Factors(NamedTuple):
    """A matrix (out, in) as B @ A; B: (out, r), A: (r, in)."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[1]

    def to(self, dtype: torch.dtype) -> Factors:
        """Both factors in another dtype."""
        return Factors(self.B.to(dtype), self.A.to(dtype))


class Spectrum(NamedTuple):
    """A singular value decomposition U diag(S) Vh; U: (out, n), S: (n,) falling, Vh: (n, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def balanced(self, rank: int) -> Factors:
        """The best approximation of a rank, as (U S^1/2, S^1/2 Vh)."""
        root = self.S[:rank].sqrt()
        return Factors(self.U[:, :rank] * root, root[:, None] * self.Vh[:rank])


def stack(terms: Iterable[tuple[float, Factors]]) -> Factors:
    """The sum of c * B @ A over the terms; its rank is the sum of theirs."""
    kept = list(terms)
    return Factors(
        torch.cat([c * factors.B.double() for c, factors in kept], dim=1),
        torch.cat([factors.A.double() for _, factors in kept], dim=0),
    )


def svd(factors: Factors) -> Spectrum:
    """The SVD with n = min(r, out, in) singular values; zeros among them keep directions."""
    basis_b, upper_b = torch.linalg.qr(factors.B.double())
    basis_a, upper_a = torch.linalg.qr(factors.A.double().T)
    u, s, vh = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    return Spectrum(basis_b @ u, s, vh @ basis_a.T)


def tail(singular: Tensor, rank: int) -> float:
    """Frobenius norm of what the best approximation of this rank leaves out."""
    return float(torch.linalg.vector_norm(singular[rank:]))


def rank_within(singular: Tensor, error: float) -> int:
    """The smallest rank whose tail is at most `error`."""
    return next(rank for rank in range(len(singular) + 1) if tail(singular, rank) <= error)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of at most this rank (Eckart-Young), balanced, and its error."""
    spectrum = svd(factors)
    return spectrum.balanced(rank), tail(spectrum.S, rank)


def inner(left: Factors, right: Factors) -> float:
    """Frobenius inner product, from r x r Gram matrices."""
    gram_b = left.B.double().T @ right.B.double()
    gram_a = left.A.double() @ right.A.double().T
    return float((gram_b * gram_a).sum())


def norm(factors: Factors) -> float:
    """Frobenius norm. By QR: the root of a Gram sum would lose half of the digits."""
    return distances(factors, [])[0]


def distances(target: Factors, others: Sequence[Factors]) -> list[float]:
    """Frobenius norms: of `target`, then of each `other - target`, from one QR on each side."""
    parts = [target, *others]
    upper_b = torch.linalg.qr(torch.cat([part.B.double() for part in parts], 1), mode="r").R
    upper_a = torch.linalg.qr(torch.cat([part.A.double() for part in parts]).T, mode="r").R
    ranks = [part.rank for part in parts]
    first, *rest = (
        b @ a.T for b, a in zip(upper_b.split(ranks, 1), upper_a.split(ranks, 1), strict=True)
    )
    return [float(torch.linalg.matrix_norm(core)) for core in (first, *(o - first for o in rest))]
