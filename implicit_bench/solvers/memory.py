from __future__ import annotations

import torch
from torch import Tensor


def remember(stack: Tensor, slot: int, state: Tensor) -> Tensor:
    """`stack` (B, k, D) with `state` (B, D) in its slot: in place, unless autograd must keep what was there."""
    if stack.requires_grad or state.requires_grad:
        return stack.select_scatter(state, 1, slot)
    stack[:, slot] = state
    return stack


def remember_change(stack: Tensor, slot: int, new: Tensor, old: Tensor) -> Tensor:
    """`remember` new - old, without a copy of it."""
    if stack.requires_grad or new.requires_grad or old.requires_grad:
        return remember(stack, slot, new - old)
    torch.sub(new, old, out=stack[:, slot])
    return stack
