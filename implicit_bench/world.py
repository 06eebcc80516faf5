"""Several processes, one run (torchrun): who this one is, and the sums that they make together.

Each has its rows of every batch. All go through the same steps in the same order, so that each sum meets its partners:
what decides how a solve goes on must be the same number in all of them, to the bit. A sum of `summed` is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as nnf

from .core import OwnLoop, Reduce
from .schema import first_line


class World(NamedTuple):
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Who writes: the others compute as much and say nothing."""
        return self.rank == 0


_world = World()


def world() -> World:
    return _world


def started() -> World:
    """What torchrun says of this process in its environment."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def here() -> int:
    """How many of the processes are on this machine, and share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Gone(RuntimeError):
    """Another process of the run has ended before the run has."""


def left_alone(error: BaseException) -> str | None:
    """The sentence for an error that a sum raises when one of its partners is no more; None for any other error."""
    signs = ("gloo", "nccl", "peer", "timed out", "heartbeat", "broken pipe")
    if isinstance(error, Gone) or (_world.size > 1 and isinstance(error, RuntimeError)
                                   and any(sign in str(error).lower() for sign in signs)):  # fmt: skip
        more = "" if isinstance(error, Gone) else f" ({first_line(error)})"
        return (f"another of the {_world.size} processes has ended, or cannot be reached{more}; what it said stands "
                "above, and the same command goes on from the last checkpoint")  # fmt: skip
    return None


@contextlib.contextmanager
def together(begin: Callable[[], Any], device: torch.device) -> Iterator[World]:
    """Within, the processes that torchrun has started are one run: by nccl on GPUs, by gloo on CPUs. Only the first
    says anything. `begin` gives this process its GPU, before that. Raises Gone."""
    global _world
    if started().size == 1:
        yield _world
        return
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as mute:
        if started().rank:
            mute.enter_context(contextlib.redirect_stdout(nowhere))
            mute.enter_context(contextlib.redirect_stderr(nowhere))
        begin()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        _world = started()
        try:
            yield _world
        except RuntimeError as problem:
            if sentence := left_alone(problem):
                raise Gone(sentence) from problem
            raise
        finally:
            _world = World()
            dist.destroy_process_group()


def shareable(layer: Any, batch: int) -> None:
    """Raises ValueError where the processes of this run could not share a training of this layer."""
    size = _world.size
    if size == 1:
        return
    if batch % size:
        raise ValueError(f"recipe.batch={batch} cannot be shared out evenly by {size} processes; make it a multiple")
    if isinstance(layer.solver, OwnLoop):
        raise ValueError(f"solver={type(layer.solver).__name__} steers by the images of its own process alone; with "
                         f"{size} processes use one of ours, such as solver=tsit5")  # fmt: skip
    if layer.adjoint.needs_end_time:
        raise ValueError("adjoint=backsolve is steered by all images and parameters as one system, which is not summed "
                         f"over processes; with {size} of them use adjoint=unroll or adjoint=ift")  # fmt: skip
    if getattr(layer.solver, "couples", False) and layer.reduce.per_sample:
        raise ValueError("solver.variant=paper couples the images of its own process alone; use stop.per_sample=false")
    norms = [module for module in layer.modules() if type(module) is torch.nn.BatchNorm2d]
    if norms and layer.solver.needs_map:
        raise ValueError(f"solver={type(layer.solver).__name__} differentiates the cell forward, and the sums of its "
                         "batch statistics over processes cannot be; use another solver, or a network without")
    if any(not norm.affine or norm.momentum is None for norm in norms):
        raise ValueError("a BatchNorm2d without weight and bias, or without momentum, is not shared by processes; "
                         "give it both")  # fmt: skip


def mine(*tensors: Tensor) -> tuple[Tensor, ...]:
    """This process's rows of each, as many as any other's."""
    rank, size = _world
    return tuple(a[rank * len(a) // size : (rank + 1) * len(a) // size] for a in tensors) if size > 1 else tensors


def shares(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """This process's rows of each batch (x, y); one that cannot be shared out is for all, and counts in the first."""
    for x, y in batches:
        if len(y) % _world.size:
            first = _world.first
            with apart():
                yield x, y, first
        else:
            x, y = mine(x, y)
            yield x, y, True


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, this process computes for itself: what it holds is the whole batch."""
    global _world
    before, _world = _world, World()
    try:
        yield
    finally:
        _world = before


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        a = a.contiguous().clone()
        dist.all_reduce(a)
        return a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return summed(g)  # every process's loss has its part in every process's sum


def summed(a: Tensor) -> Tensor:
    """The sum over all processes, in each of them; differentiable any number of times."""
    return _Sum.apply(a) if _world.size > 1 else a


def stacked(a: Tensor) -> Tensor:
    """(1, ...) of each process -> (processes, ...), in each of them."""
    rank, size = _world
    return summed(nnf.pad(a, (0, 0) * (a.dim() - 1) + (rank, size - 1 - rank)))


def first_ones(a: Tensor) -> Tensor:
    """What the first process drew, so that a draw that decides for the whole batch is one."""
    if _world.size > 1:
        dist.broadcast(a, 0)
    return a


def gathered(each: Any) -> list[Any]:
    """A plain object of each process, in each of them."""
    if _world.size == 1:
        return [each]
    found: list[Any] = [None] * _world.size
    dist.all_gather_object(found, each)
    return found


def of_first(make: Callable[[], Any]) -> Any:
    """What the first process makes of it, in each of them."""
    return gathered(make() if _world.first else None)[0]


def any_of(*flags: bool) -> list[bool]:
    """Of each flag, whether some process has set it."""
    if _world.size == 1:
        return list(flags)
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return [count > 0 for count in summed(torch.tensor(flags, dtype=torch.float32, device=kind)).tolist()]


class Across(Reduce):
    """The batch as one system, of which each process has as many rows. One sum over the processes for each."""

    def __init__(self) -> None:
        super().__init__(per_sample=False)

    def norm(self, a: Tensor) -> Tensor:
        # a norm of norms: no square that overflows where the norm does not, and its derivative at zero is a zero
        return torch.linalg.vector_norm(stacked(super().norm(a)), dim=0, keepdim=True)

    def numbers(self, a: Tensor) -> int:
        return a.numel() * _world.size

    def whole(self, rows: Tensor) -> Tensor:
        return summed((~rows).sum().float()).eq(0).unsqueeze(0)

    def products(self, V: Tensor, W: Tensor) -> Tensor:
        return summed(super().products(V, W))


def reducer(per_sample: bool) -> Reduce:
    """One for a solve of this run; where every row is solved by itself there is nothing to agree on."""
    return Reduce(True) if per_sample else Across() if _world.size > 1 else Reduce(False)


def _statistics(a: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) of each process -> mean and variance (C,) of all, in float32 at least; differentiable."""
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    if a.device.type == "cpu" and not torch.is_grad_enabled():  # some five times as fast
        mean, variance = torch.batch_norm_update_stats(a, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(a, (0, 2, 3), correction=0)
    means, variances = stacked(torch.stack([mean, variance]).unsqueeze(0)).unbind(1)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


class _Normalised(torch.autograd.Function):
    """torch's own kernels, given the statistics of all processes; where the backward is to be differentiated itself,
    operations that can be."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _statistics(a)
        ctx.save_for_backward(a, weight, bias, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return nnf.batch_norm(a, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        a, weight, bias, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():
            some = [p for p in (a, weight, bias) if p.requires_grad]
            mean, variance = _statistics(a)
            scale = (variance + ctx.eps).rsqrt() * weight
            y = a * scale.view(1, -1, 1, 1) + (bias - mean * scale).view(1, -1, 1, 1)
            found = iter(torch.autograd.grad(y.to(g.dtype), some, g, create_graph=True))
            return (*(next(found) if p.requires_grad else None for p in (a, weight, bias)), None)
        back, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            g, a, weight, mean, variance, None, None, False, ctx.eps, [True] * 3)  # fmt: skip
        numbers = a.numel() // a.shape[1] * _world.size
        by_weight, by_bias = summed(torch.stack([of_weight, of_bias])) / numbers
        inverse = (variance + ctx.eps).rsqrt()
        slope = inverse.square() * weight * by_weight  # through the variance; the rest, through the mean
        shift = inverse * weight * by_bias - mean * slope
        back.sub_(shift.to(back.dtype).view(1, -1, 1, 1))
        return back.addcmul_(a, slope.to(a.dtype).view(1, -1, 1, 1), value=-1), of_weight, of_bias, None


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch's, whose batch is that of all processes: one sum over them, and one more in the backward.

    torch's own SyncBatchNorm is for GPUs only, and cannot be differentiated twice.
    """

    def forward(self, a: Tensor) -> Tensor:
        own = self.training or self.running_mean is None or self.running_var is None
        if _world.size == 1 or not own:
            return super().forward(a)
        y, mean, variance = _Normalised.apply(a, self.weight, self.bias, self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            n = a.numel() // a.shape[1] * _world.size
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var.dtype), self.momentum)
        return y


def synchronised(model: torch.nn.Module) -> None:
    """Batch statistics of a model are from now on those of all processes' images."""
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = BatchNorm2d


def average_gradients(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """The gradients of each process's own loss become, in place, that of the mean loss, which is returned.

    Each process has scaled its loss by 1 / processes before it went backward. One sum, of all parameters at once.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    loss = loss.detach() / _world.size
    whole = torch.cat([*(g.flatten() for g in grads), loss.reshape(1).to(grads[0].dtype)])
    dist.all_reduce(whole)
    *parts, loss = whole.split([*(g.numel() for g in grads), 1])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
    return loss.squeeze()
