"""Norms and inner products against plain formulas, in both modes, and their precision."""

import torch
from problems import BATCH, PER_SAMPLE, close, random

V, W, H = random(4, 3, 5), random(4, 5, seed=1), random(4, 3, seed=2)


def test_norm_and_rms():
    close(PER_SAMPLE.norm(W), (W * W).sum(1, keepdim=True) ** 0.5, 1e-14)
    close(BATCH.norm(W), (W * W).sum().view(1, 1) ** 0.5, 1e-14)
    close(PER_SAMPLE.rms(W), (W * W).mean(1, keepdim=True) ** 0.5, 1e-14)
    close(BATCH.rms(W), (W * W).mean().view(1, 1) ** 0.5, 1e-14)


def test_gram_and_dots():
    close(PER_SAMPLE.products(V, V), torch.stack([V[b] @ V[b].T for b in range(4)]), 1e-13)
    close(BATCH.products(V, V), sum(V[b] @ V[b].T for b in range(4)).unsqueeze(0), 1e-13)
    close(PER_SAMPLE.dots(V, W), torch.stack([V[b] @ W[b] for b in range(4)]), 1e-13)
    close(BATCH.dots(V, W), sum(V[b] @ W[b] for b in range(4)).unsqueeze(0), 1e-13)


def test_combine():
    close(PER_SAMPLE.combine(H, V), sum(H[:, i : i + 1] * V[:, i] for i in range(3)), 1e-13)
    close(BATCH.combine(H[:1], V), sum(H[0, i] * V[:, i] for i in range(3)), 1e-13)


def test_what_holds_for_a_row():
    rows = torch.tensor([True, False, True])
    assert PER_SAMPLE.whole(rows).tolist() == [True, False, True]
    assert BATCH.whole(rows).tolist() == [False]
    assert BATCH.whole(torch.ones(3, dtype=torch.bool)).tolist() == [True]


def test_sums_of_low_precision_are_float32():
    """bfloat16 cannot count beyond 256: a sum of 4096 ones in it is 256."""
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    stack = torch.stack([ones, ones], 1)
    for reduce, rows in ((PER_SAMPLE, 1), (BATCH, 2)):
        for got, wanted in (
            (reduce.norm(ones), (4096 * rows) ** 0.5),
            (reduce.rms(ones), 1.0),
            (reduce.products(stack, stack), 4096.0 * rows),
            (reduce.dots(stack, ones), 4096.0 * rows),
        ):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, torch.full_like(got, wanted), rtol=1e-6, atol=0)
    assert PER_SAMPLE.combine(torch.ones(2, 2), stack).dtype == torch.bfloat16  # states keep their dtype


def test_double_stays_double():
    assert PER_SAMPLE.norm(W).dtype == PER_SAMPLE.products(V, V).dtype == BATCH.dots(V, W).dtype == torch.float64
