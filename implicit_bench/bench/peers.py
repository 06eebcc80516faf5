"""Other libraries on the same weights, as their users would write it: `peers=torchdeq,torchdiffeq` (extra `peers`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import config
from ..adjoints import IFT, JFB, BackwardLog
from ..core import EndTime, FixedPoint, Residual, Solution, Stats, Status
from ..models import ImplicitLayer, LayerOutput
from ..solvers import RK4, Anderson, Bosh3, Broyden, Dopri5, Euler, Picard, RungeKutta, Vcab3
from .rows import Row

PEERS = ("torchdeq", "torchdiffeq")
ROOTS = {Picard: "fixed_point_iter", Anderson: "anderson", Broyden: "broyden"}
LINEAR = {"picard": "fixed_point_iter", "anderson": "anderson", "gmres": "broyden"}  # which is the nearest to it there
METHODS: dict[type, str] = {Dopri5: "dopri5", Bosh3: "bosh3", RK4: "rk4", Euler: "euler"}
LADDER = [2.0**k for k in (3, 2, 1, 0, -1, -2, -3, -4, -6)]


def asked(names: Sequence[str]) -> None:
    """Raises UsageError where one is unknown or not installed."""
    for name in names:
        if name not in PEERS:
            raise config.UsageError(f"peers={name} is not possible; there are: {', '.join(PEERS)}")
        if importlib.util.find_spec(name) is None:
            raise config.UsageError(f"peers={name} is not installed; pip install 'implicit-bench[peers]'")


def beside(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """A row of each library for each row that it could make. Raises UsageError where it could make none."""
    found = []
    for name in names:
        make = _torchdeq if name == "torchdeq" else _torchdiffeq
        theirs = [peer for row in rows if (peer := make(row))]
        if not theirs:
            what = "solver=broyden and adjoint=ift, or the like" if name == "torchdeq" else "stop=end_time"
            raise config.UsageError(f"peers={name} has no counterpart of {', '.join(r.label for r in rows)}; add a row "
                                    f"with {what}")  # fmt: skip
        found += theirs
    return found


def _like(row: Row, library: str, **changed: Any) -> Row:
    job = replace(row.job, config={**row.job.config, **changed}, label="")
    peer = Row(f"{row.label} ({library})", job, row.data, row.device)
    peer.peer_of = row.label
    return peer


def _torchdiffeq(row: Row) -> Row | None:
    """Its own solver and adjoint, by solvers.TorchDiffeq; dopri5 where it has no such method, equal tolerances."""
    solver, layer = row.model.layer.solver, row.model.layer
    if layer.field != "ode" or not isinstance(layer.stop, EndTime) or not isinstance(solver, (RungeKutta, Vcab3, RK4)):
        return None
    method = METHODS.get(type(solver), "dopri5")
    given = {k: v for k, v in row.job.config["solver"].items() if k in ("rtol", "atol")}
    steps = {"step_size": row.job.config["solver"]["dt"]} if method in ("rk4", "euler") else {}
    adjoint = {k: v for k, v in row.job.config["adjoint"].items() if k not in layer.adjoint.of_ours}
    return _like(row, f"torchdiffeq {method}", adjoint=adjoint, solver={
        "_target_": "implicit_bench.solvers.TorchDiffeq", "method": method, **given, **steps})  # fmt: skip


def _torchdeq(row: Row) -> Row | None:
    layer = row.model.layer
    rule = isinstance(layer.adjoint, (IFT, JFB))
    if layer.field == "ode" or not isinstance(layer.stop, Residual) or type(layer.solver) not in ROOTS or not rule:
        return None
    peer = _like(row, "torchdeq")
    peer.model.layer = TorchDEQ(peer.model.layer, row.job.config["adjoint"])
    return peer


def level(peer: Row, ours: Row) -> None:
    """Give torchdeq the loosest tolerance, of a ladder, at which its mean residual is not above ours: it stops when the
    worst sample has converged, where ours stops each by itself."""
    if not isinstance(peer.model.layer, TorchDEQ):
        return
    x, _ = ours.batch(0)
    wanted = _residual(ours, x)
    for factor in LADDER:
        peer.model.layer.tolerance(factor * ours.model.layer.stop.tol)
        if _residual(peer, x) <= wanted:
            return


@torch.no_grad()
def _residual(row: Row, x: Tensor) -> float:
    return float(row.model.eval()(x).layer.solution.stats.residual.mean())


class LastIsWhole(BackwardLog):
    """Of a linear solve's VJPs, all to the state alone, and the one after it."""

    def _one_more(self, g: Tensor) -> None:
        super()._one_more(g)
        self.narrow = self.vjps - 1


class TorchDEQ(nn.Module):
    """torchdeq's layer (arXiv 2310.18605) round the cell and the start of ours, with its counts where ours has them."""

    def __init__(self, layer: ImplicitLayer, adjoint: dict[str, Any]):
        super().__init__()
        self.rule: dict[str, Any] = {"grad": 1}
        if isinstance(layer.adjoint, IFT):
            self.rule = {"ift": True, "b_solver": LINEAR[adjoint["linear"]], "b_max_iter": adjoint["max_iter"],
                         "b_tol": adjoint["rtol"], "b_stop_mode": "rel"}  # fmt: skip
        self.cell, self.init, self.field, self.solver = layer.cell, layer.init, layer.field, layer.solver
        self.stop, self.adjoint, self.reduce = layer.stop, layer.adjoint, layer.reduce
        self.tolerance(layer.stop.tol)  # type: ignore[attr-defined]

    def tolerance(self, tol: float) -> None:
        from torchdeq import get_deq

        self.tol = tol
        self.deq = get_deq(f_solver=ROOTS[type(self.solver)], f_max_iter=self.stop.max_steps, f_tol=tol,
                           f_stop_mode="rel", **self.rule)  # fmt: skip
        self.deq.train(self.training)

    def forward(self, x: Tensor) -> LayerOutput:
        log: BackwardLog = LastIsWhole() if "ift" in self.rule else BackwardLog()
        ctx, t, calls = self.cell.begin(x), x.new_zeros(len(x)), 0

        def f(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return log.watch(self.cell(z, ctx, t))

        start = self.init(x, lambda z, t: self.cell(z, ctx, t))
        states, info = self.deq(f, start.detach())
        z, residual = states[-1], info["rel_lowest"].view(-1).expand(len(x))
        nfe = torch.full((len(x),), calls)
        status = torch.where(residual <= self.tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
        solution = Solution(z.detach(), z.new_zeros(()), status, Stats(nfe, nfe, calls, t, residual))
        return LayerOutput(z, start, solution, log, FixedPoint(lambda z, t: f(z)), self.solver, [])
