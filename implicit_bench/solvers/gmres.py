from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..core import Reduce
from ..core.solve import OpenRows


@dataclass(frozen=True)
class LinearSolution:
    x: Tensor  # (B, D)
    iterations: Tensor  # (R, 1) int64, products with A that the row needed
    products: int  # products with A in all
    residual: Tensor  # (R, 1) |b - A x| / |b|
    rhs_norm: Tensor  # (R, 1) |b|
    converged: Tensor  # (R, 1) bool


def gmres(A: Callable[[Tensor], Tensor], b: Tensor, reduce: Reduce, *, rtol: float, atol: float,
          max_iter: int) -> LinearSolution:  # fmt: skip
    """Solve A x = b, b (B, D), from x = 0 (Saad & Schultz, SIAM J. Sci. Stat. Comput. 1986), without restart.

    With per-sample reductions every row is its own linear system, all advanced by the same products; else the batch
    is one system. A row is done when |r| <= atol + rtol |b|, tested before the first iteration, and then left alone;
    so is a row whose Krylov space is exhausted to rounding, not converged where A is singular on it. A row is converged
    only if what rounding leaves of its residual, eps |H| |y|, is within the bound as well.
    Cost: one product an iteration (none when b is small enough); max_iter + 1 states of memory, as many again while the
    basis grows.
    """
    beta = reduce.norm(b)
    bound = atol + rtol * beta
    R, dtype = len(beta), beta.dtype
    tiny, noise = torch.finfo(dtype).tiny, 10 * torch.finfo(dtype).eps
    solvable = beta.isfinite() & (beta > tiny**0.5)  # below that the squares in a norm underflow: x = 0 is as good
    cap = min(max_iter, 8)  # the basis grows as needed: most solves end long before max_iter
    V = b.new_empty((len(b), cap + 1, b.shape[1]))
    V[:, 0] = torch.where(solvable, b / beta, 0.0)
    H = torch.zeros(R, cap, cap, dtype=dtype, device=b.device)  # becomes upper triangular
    L = torch.zeros_like(H)  # <V_i, V_k>, k < i: what the basis lacks of being orthogonal
    Q = torch.eye(cap + 1, dtype=dtype, device=b.device).repeat(R, 1, 1)  # the product of the Givens rotations
    residual, iterations = beta.clone(), torch.zeros_like(beta, dtype=torch.int64)
    active = (residual > bound) & solvable
    rows, j, products = OpenRows(b.is_cuda), 0, 0
    while j < max_iter and rows.read(active):
        if j == cap:
            more = min(cap, max_iter - cap)
            V = torch.cat((V, V.new_empty((len(b), more, b.shape[1]))), 1)
            H, L = (nnf.pad(M, (0, more, 0, more)) for M in (H, L))
            Q = nnf.pad(Q, (0, more, 0, more))
            Q.diagonal(dim1=1, dim2=2)[:, cap + 1 :] = 1.0
            cap += more
        V[:, j + 1] = A(V[:, j])
        products += 1
        basis = V[:, : j + 1]
        # modified Gram-Schmidt in one pass over the basis: h_i = <V_i, w> - sum_k<i h_k <V_i, V_k>
        sums = reduce.products(basis, V[:, j : j + 2])
        L[:, j, :j] = sums[:, 0, :j]
        h = torch.linalg.solve_triangular(L[:, : j + 1, : j + 1], sums[:, 1:].mT, upper=False, unitriangular=True)
        h = h.squeeze(2)
        w = V[:, j + 1] - reduce.combine(h, basis)
        norm = reduce.norm(w)
        floor = noise * torch.hypot(torch.linalg.vector_norm(h, dim=1, keepdim=True), norm) + tiny**0.5
        rotated = (Q[:, : j + 1, : j + 1] @ h.unsqueeze(2)).squeeze(2)
        last = rotated[:, j:]
        rho = torch.hypot(last, norm)
        active = active & (rho > 10 * floor)  # a breakdown without convergence: A is singular on this space
        V[:, j + 1] = torch.where(active & (norm > floor), w / norm, 0.0)  # rows not active must stay finite
        c, s = (last / rho).unsqueeze(2), (norm / rho).unsqueeze(2)
        H[:, :j, j], H[:, j, j] = rotated[:, :j], rho.squeeze(1)
        upper, lower = Q[:, j : j + 1], Q[:, j + 1 : j + 2]
        turned = torch.cat((c * upper + s * lower, c * lower - s * upper), 1)
        Q[:, j : j + 2] = torch.where(active.unsqueeze(2), turned, Q[:, j : j + 2])
        residual = torch.where(active, (beta * Q[:, j + 1, :1]).abs(), residual)
        j += 1
        iterations = torch.where(active, j, iterations)
        active = active & (residual > bound)
    x = torch.zeros_like(b)
    if j:
        own = torch.arange(j, device=b.device) < iterations  # (R, j): the columns that a row made before it was done
        g = torch.where(own, beta * Q[:, :j, 0], 0.0).unsqueeze(2)
        H = torch.where(own.unsqueeze(1), H[:, :j, :j], torch.eye(j, dtype=dtype, device=b.device))
        y = torch.linalg.solve_triangular(H, g, upper=True).squeeze(2)
        x = reduce.combine(y, V[:, :j])
        # what rounding leaves of b - A x, whatever the recurrence says: its estimate falls for ever
        size = torch.linalg.matrix_norm(torch.where(own.unsqueeze(1), H, 0.0)) * torch.linalg.vector_norm(y, dim=1)
        residual = torch.maximum(residual, torch.finfo(b.dtype).eps * size.unsqueeze(1))
    relative = residual / beta.clamp_min(tiny)
    converged = (residual <= bound) & beta.isfinite() | (beta <= tiny**0.5)
    return LinearSolution(x, iterations, products, relative, beta, converged)
