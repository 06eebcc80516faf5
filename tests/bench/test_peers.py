"""Other libraries beside ours: the same weights, the same answer, at a residual that is not above ours."""

import jobs
import pytest
import torch
from torch.nn import functional as nnf

from implicit_bench import config
from implicit_bench.bench import peers, rows
from implicit_bench.cli import main
from implicit_bench.device import Device

pytest.importorskip("torchdeq")


@pytest.fixture
def made(tmp_path):
    def make(model, *words):
        job = config.compose("bench", jobs.words(tmp_path, f"model={model}", "gpu.dtype=float64", *words))
        data = config.make(job.config["dataset"], "dataset").load(tmp_path)
        return rows.Row(model, job, data, Device("cpu", "float64", threads=1))

    return make


def gradient(row):
    x, y = row.batch(0)
    row.model.train()
    row.model.zero_grad()
    nnf.cross_entropy(row.model(x).logits, y).backward()
    return torch.cat([p.grad.flatten() for p in row.model.parameters() if p.grad is not None])


TIGHT = ("stop.tol=1e-9", "stop.max_steps=200", "adjoint.rtol=1e-9", "adjoint.max_iter=200")


@pytest.mark.parametrize(
    ("library", "model", "words"),
    [("torchdeq", "deq", TIGHT), ("torchdeq", "skip_reg_deq", (*TIGHT, "solver=anderson", "adjoint.linear=anderson")),
     ("torchdeq", "deq", ("stop.tol=1e-9", "solver=picard", "adjoint=jfb")),
     ("torchdiffeq", "neural_ode", ("solver=dopri5", "solver.rtol=1e-9", "solver.atol=1e-9")),
     ("torchdiffeq", "neural_ode", ("solver=rk4", "solver.dt=0.1", "adjoint=unroll")),
     ("torchdiffeq", "neural_ode", ("solver.rtol=1e-7", "solver.atol=1e-7"))],  # vcab3 against its dopri5
)  # fmt: skip
def test_a_peer_has_our_answer_and_our_gradient(made, library, model, words):
    ours = made(model, *words)
    (peer,) = peers.beside([ours], [library])
    assert peer.peer_of == model
    x, _ = ours.batch(0)
    a, b = (row.model.eval()(x).logits for row in (ours, peer))
    assert float((a - b).detach().abs().max()) < 1e-5
    g, h = gradient(ours), gradient(peer)
    most = 1e-6 if library == "torchdeq" else 2e-3  # the kinks of relu; its rk4 is Kutta's other one
    assert float((g - h).norm() / g.norm()) < most


def test_their_tolerance_is_the_loosest_that_is_as_good_as_ours(made):
    ours = made("deq")
    (peer,) = peers.beside([ours], ["torchdeq"])
    peers.level(peer, ours)
    x, _ = ours.batch(0)
    wanted, tol = peers._residual(ours, x), peer.model.layer.tol
    assert peers._residual(peer, x) <= wanted
    peer.model.layer.tolerance(2 * tol)
    assert peers._residual(peer, x) > wanted


def test_their_evaluations_and_products_are_counted(made):
    ours = made("deq")
    (peer,) = peers.beside([ours], ["torchdeq"])
    calls, cell = [0], peer.model.layer.cell
    cell.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    peer.measure(1)
    means = peer.tally.means()
    assert means["nfe_forward"] > 3
    assert means["nfe_backward"] > 1
    assert calls[0] >= means["nfe_forward"]  # the predictions call it, too
    assert 0 < means["residual"] < 0.02


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["peers=torchdq"], "peers=torchdq is not possible; there are: torchdeq, torchdiffeq"),
     (["peers=torchdeq", "solver=vcab3"], "peers=torchdeq has no counterpart of deq, skip_deq; add a row with "
      "solver=broyden and adjoint=ift, or the like"),
     (["peers=torchdiffeq"], "peers=torchdiffeq has no counterpart of deq, skip_deq; add a row with stop=end_time")],
)  # fmt: skip
def test_a_peer_that_cannot_be_is_a_sentence(tmp_path, capsys, words, sentence):
    assert main(["bench", *jobs.words(tmp_path, "model=deq,skip_deq", *words)][:]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_peer_that_is_not_installed_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", *jobs.words(tmp_path, "model=deq,skip_deq", "peers=torchdeq")]) == 2
    said = capsys.readouterr().err
    assert said == "implicit-bench: peers=torchdeq is not installed; pip install 'implicit-bench[peers]'\n"


def test_peers_stand_beside_our_rows_and_are_no_papers_claim(tmp_path, capsys, brisk):
    words = jobs.words(tmp_path, "model=deq,neural_ode", "rounds=2", "memory=false", "peers=torchdeq,torchdiffeq")
    assert main(["bench", *words]) == 0
    out = capsys.readouterr().out
    assert "peer  deq (torchdeq) / deq" in out
    assert "peer  neural_ode (torchdiffeq dopri5) / neural_ode" in out
    assert out.count("R1") == 0  # of deq and neural_ode there is none
