"""GMRES against dense linear algebra, one system a row and one system for the batch."""

import pytest
import torch
from problems import BATCH, PER_SAMPLE, close, contraction, f64, random, with_spectrum

from implicit_bench.solvers import gmres

EXACT = dict(rtol=1e-12, atol=0.0, max_iter=50)


def systems(B=4, n=6, seed=0):
    """B different well-conditioned matrices (B, n, n) and the product with them of a batch of rows."""
    A = torch.stack([torch.eye(n).double() - contraction(n, 0.9, seed + i) for i in range(B)])
    return A, lambda v: torch.einsum("bij,bj->bi", A, v)


def coupled(B=4, n=3, seed=0):
    """One matrix on all B n numbers, which no block diagonal can stand for."""
    A = torch.eye(B * n).double() - contraction(B * n, 0.9, seed)
    return A, lambda v: (A @ v.flatten()).view(B, n)


@pytest.mark.parametrize("n", [6, 24])
def test_every_row_is_its_own_system(n):
    A, product = systems(n=n)
    b = random(4, n, seed=9) * f64([[1.0], [1e-6], [1e6], [1.0]])
    s = gmres(product, b, PER_SAMPLE, **EXACT)
    exact = torch.linalg.solve(A, b)
    assert bool(((s.x - exact).norm(dim=1) < 1e-10 * exact.norm(dim=1)).all())
    assert s.converged.squeeze(1).tolist() == [True] * 4
    assert bool((s.iterations > n / 2).all())
    close(s.rhs_norm, b.norm(dim=1, keepdim=True), 1e-6)


def test_a_coupled_batch_is_one_system():
    A, product = coupled()
    b = random(4, 3, seed=9)
    s = gmres(product, b, BATCH, **EXACT)
    close(s.x, torch.linalg.solve(A, b.flatten()).view(4, 3), 1e-10)
    assert s.iterations.shape == s.residual.shape == (1, 1)
    close(s.rhs_norm, b.norm().view(1, 1), 1e-12)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_n_distinct_eigenvalues_take_n_iterations(reduce):
    spectra = ([1.0] * 6, [1.0, 0.2] * 3, [1.0, 0.2, 1.7] * 2, [1.0, 0.2, 1.7, 0.5, 0.5, 1.0])
    A = torch.stack([with_spectrum(s, seed=i) for i, s in enumerate(spectra)])
    s = gmres(
        lambda v: torch.einsum("bij,bj->bi", A, v), random(4, 6, seed=9), reduce, rtol=1e-10, atol=0.0, max_iter=50
    )
    assert s.iterations.flatten().tolist() == ([1, 2, 3, 4] if reduce is PER_SAMPLE else [4])
    assert s.products == 4


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_each_iterate_minimises_the_residual_over_its_krylov_space(reduce):
    """Against least squares over b, Ab, A^2 b, ...; so the reported residual is the true one at every stage."""
    A, product = systems() if reduce is PER_SAMPLE else coupled()
    shape = (4, 6) if reduce is PER_SAMPLE else (4, 3)
    b = random(*shape, seed=9)
    blocks, rows = (A, b) if reduce is PER_SAMPLE else (A.unsqueeze(0), b.view(1, -1))
    last = torch.ones(len(rows)).double()
    for m in range(1, 6):
        s = gmres(product, b, reduce, rtol=1e-12, atol=0.0, max_iter=m)
        assert s.iterations.flatten().tolist() == [m] * len(rows)
        assert s.products == m
        assert not bool(s.converged.any())
        for i, (M, c) in enumerate(zip(blocks, rows)):
            K = torch.stack([torch.linalg.matrix_power(M, k) @ c for k in range(m)], 1)
            y = torch.linalg.lstsq(M @ K, c).solution
            close(s.x.view(rows.shape)[i], K @ y, 1e-9)
            true = (c - M @ s.x.view(rows.shape)[i]).norm() / c.norm()
            close(s.residual[i, 0], true, 1e-12)
            assert float(true) < float(last[i])
            last[i] = true


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-2, 1e-6])
def test_stops_at_the_first_iterate_within_the_tolerance(rtol):
    _, product = systems(n=12)
    b = random(4, 12, seed=9)
    s = gmres(product, b, PER_SAMPLE, rtol=rtol, atol=0.0, max_iter=50)
    true = (b - product(s.x)).norm(dim=1) / b.norm(dim=1)
    close(s.residual.squeeze(1), true, 1e-12)
    assert bool((true <= rtol).all())
    assert s.products == int(s.iterations.max())
    for i, n in enumerate(s.iterations.squeeze(1).tolist()):
        before = gmres(product, b, PER_SAMPLE, rtol=1e-15, atol=0.0, max_iter=n - 1)
        assert float(before.residual[i]) > rtol


def test_the_bound_is_atol_plus_rtol_times_the_right_hand_side():
    _, product = systems()
    b = random(4, 6, seed=9)
    sizes = b.norm(dim=1, keepdim=True)
    mixed = gmres(product, b, PER_SAMPLE, rtol=0.05, atol=0.05, max_iter=50)
    assert bool((mixed.residual * sizes <= 0.05 + 0.05 * sizes).all())
    absolute, relative = (
        gmres(product, b, PER_SAMPLE, rtol=r, atol=a, max_iter=50) for r, a in ((0.0, 0.05), (0.05, 0.0))
    )
    assert bool((absolute.residual * sizes <= 0.05).all())
    assert bool((mixed.iterations <= torch.minimum(absolute.iterations, relative.iterations)).all())
    assert bool((mixed.iterations < torch.maximum(absolute.iterations, relative.iterations)).any())


@pytest.mark.parametrize("settings", [dict(rtol=0.0, atol=100.0, max_iter=9), dict(rtol=1.0, atol=0.0, max_iter=9)])
def test_the_stop_rule_is_tested_before_the_first_iteration(settings):
    def never(v):
        raise AssertionError("no product was needed")

    b = random(4, 6)
    s = gmres(never, b, PER_SAMPLE, **settings)
    assert (s.products, s.iterations.flatten().tolist()) == (0, [0] * 4)
    assert torch.equal(s.x, torch.zeros_like(b))
    assert s.converged.flatten().tolist() == [True] * 4
    close(s.residual, torch.ones(4, 1).double(), 1e-15)


def test_no_iteration_allowed():
    s = gmres(lambda v: v, random(4, 6), PER_SAMPLE, rtol=1e-2, atol=0.0, max_iter=0)
    assert (s.products, s.converged.flatten().tolist(), s.x.abs().max()) == (0, [False] * 4, 0.0)


def test_rows_already_done_are_left_alone():
    """The easy row stops at its first, inexact iterate and keeps it while the others go on."""
    A, product = systems(n=12)
    A[1] = with_spectrum([1.0, 1.05, 0.95] * 4)
    b = random(4, 12, seed=9)
    b[2] = 0.0
    s = gmres(product, b, PER_SAMPLE, rtol=0.06, atol=0.0, max_iter=50)
    iterations = s.iterations.squeeze(1).tolist()
    assert iterations[1] == 1 < min(iterations[0], iterations[3])
    assert iterations[2] == 0
    assert torch.equal(s.x[2], torch.zeros(12).double())
    alone = gmres(lambda v: v @ A[1].T, b[1:2], PER_SAMPLE, rtol=0.06, atol=0.0, max_iter=50)
    close(s.x[1], alone.x[0], 1e-14)
    close(s.residual[1], alone.residual[0], 1e-14)
    assert float((s.x[1] - torch.linalg.solve(A[1], b[1])).norm()) > 1e-3
    assert bool(s.converged.all())


def test_a_nan_row_does_not_disturb_the_others():
    _, product = systems()
    b = random(4, 6, seed=9)
    well = gmres(product, b, PER_SAMPLE, rtol=1e-8, atol=0.0, max_iter=50)
    sick_b = b.clone()
    sick_b[1, 2] = torch.nan
    sick = gmres(product, sick_b, PER_SAMPLE, rtol=1e-8, atol=0.0, max_iter=50)
    others = [0, 2, 3]
    close(sick.x[others], well.x[others], 1e-14)
    assert torch.equal(sick.iterations[others], well.iterations[others])
    assert torch.equal(sick.x[1], torch.zeros(6).double())
    assert sick.converged.squeeze(1).tolist() == [True, False, True, True]


def test_an_infinite_right_hand_side_is_no_convergence():
    b = torch.full((1, 4), 1e30)  # finite, but its norm is not in float32
    assert gmres(lambda v: v, b, PER_SAMPLE, rtol=1e-2, atol=0.0, max_iter=5).converged.tolist() == [[False]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_system_is_not_called_solved(dtype, seed):
    """b has a part that A cannot reach, 1 of (1, 1, 1): the residual can only fall to 1, and x must stay bounded."""
    A = with_spectrum([0.0, 1.0, 2.0], seed).to(dtype)
    b = (A @ torch.ones(3, dtype=dtype) + torch.linalg.eigh(A)[1][:, 0]).unsqueeze(0)
    s = gmres(lambda v: v @ A, b, PER_SAMPLE, rtol=1e-3, atol=0.0, max_iter=40)
    true = (b - s.x @ A).norm() / b.norm()
    torch.testing.assert_close(s.residual.squeeze(), true, rtol=1e-4, atol=0)
    torch.testing.assert_close(true, 1 / b.norm(), rtol=1e-4, atol=0)
    assert s.converged.tolist() == [[False]]
    assert float(s.x.abs().max()) < 100
    nothing = gmres(lambda v: 0 * v, b, PER_SAMPLE, rtol=1e-3, atol=0.0, max_iter=40)
    assert (nothing.converged.tolist(), nothing.residual.tolist()) == ([[False]], [[1.0]])
    assert nothing.products < 40


def test_an_exhausted_krylov_space_ends_the_row():
    """A tolerance below rounding: after the exact solution there is nothing left but noise to build on."""
    A, product = systems(n=4)
    b = random(4, 4, seed=9)
    s = gmres(product, b, PER_SAMPLE, rtol=1e-30, atol=0.0, max_iter=40)
    assert s.products <= 6
    close(s.x, torch.linalg.solve(A, b), 1e-12)


def test_float32_reports_its_true_residual():
    A = systems(n=30)[0].float()
    b = random(4, 30, seed=9).float()
    s = gmres(lambda v: torch.einsum("bij,bj->bi", A, v), b, PER_SAMPLE, rtol=1e-5, atol=0.0, max_iter=60)
    true = (b - torch.einsum("bij,bj->bi", A, s.x)).norm(dim=1) / b.norm(dim=1)
    assert s.x.dtype == torch.float32
    assert bool(s.converged.all())
    torch.testing.assert_close(s.residual.squeeze(1), true, rtol=0, atol=3e-6)


def test_bfloat16_vectors_keep_float32_scalars():
    A, b = systems(n=16)[0].bfloat16(), random(4, 16, seed=9).bfloat16()
    s = gmres(lambda v: torch.einsum("bij,bj->bi", A, v), b, PER_SAMPLE, rtol=5e-2, atol=0.0, max_iter=30)
    assert (s.x.dtype, s.residual.dtype) == (torch.bfloat16, torch.float32)
    assert bool(s.converged.all())
    true = (b.float() - torch.einsum("bij,bj->bi", A.float(), s.x.float())).norm(dim=1) / b.float().norm(dim=1)
    assert float((true - s.residual.squeeze(1)).abs().max()) < 0.02


@pytest.mark.parametrize(("rtol", "converged"), [(1e-2, True), (1e-6, False)])
def test_the_residual_it_tells_is_never_better_than_the_true_one(rtol, converged):
    """At a condition of 2,000 the recurrence goes on falling in float32 where b - A x no longer does."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(128, 128).double())[0]
    A = (Q * (1 - torch.linspace(-1, 0.999, 128).double())) @ Q.T
    b = torch.randn(1, 128)
    s = gmres(lambda v: v @ A.float(), b, PER_SAMPLE, rtol=rtol, atol=0.0, max_iter=128)
    true = float((b.double() - s.x.double() @ A).norm() / b.double().norm())
    assert true <= float(s.residual) * 1.01
    assert s.converged.tolist() == [[converged]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_basis_stays_orthogonal_in_float32(seed):
    """Six distinct eigenvalues, 1e-2 to 1e3: one classical Gram-Schmidt takes 12 iterations to 62."""
    torch.manual_seed(seed)
    a = torch.cat((torch.ones(95), 1e3 * torch.logspace(0, -5, 5)))
    b = torch.randn(2, 100) * a
    s = gmres(lambda v: v * a, b, PER_SAMPLE, rtol=1e-6, atol=0.0, max_iter=100)
    assert int(s.iterations.max()) <= 7
    assert bool(((b - s.x * a).norm(dim=1) < 3e-6 * b.norm(dim=1)).all())
