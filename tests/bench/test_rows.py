import time

import jobs
import pytest
import torch

from implicit_bench import config, core, papers
from implicit_bench.bench import rows
from implicit_bench.bench.arithmetic import arithmetic_ms
from implicit_bench.bench.ratios import Prices, comparisons
from implicit_bench.device import Device


def composed(tmp_path, *words):
    return config.compose("bench", jobs.words(tmp_path, *words))


@pytest.fixture
def made(tmp_path):
    def make(*models, words=()):
        given = [composed(tmp_path, f"model={m}", *words) for m in models]
        data = config.make(given[0].config["dataset"], "dataset").load(tmp_path)
        return [rows.Row(m, job, data, Device("cpu", threads=1)) for m, job in zip(models, given)]

    return make


def test_rows_see_the_same_batches_and_start_from_the_same_weights(made):
    a, b = made("deq", "cdeq")
    for k in (0, 1, 38, 39, 100):
        assert all(torch.equal(x, y) for x, y in zip(a.batch(k), b.batch(k)))
    assert not torch.equal(a.batch(0)[0], a.batch(1)[0])
    assert torch.equal(a.batch(0)[0], a.batch(39)[0])  # the 1,257 images hold 39 batches
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_a_measurement_times_each_part_and_counts_exactly(made):
    (row,) = made("explicit")
    found = row.measure(3)
    assert set(found) == {"train", "forward", "backward", "optimizer", "predict", "nfe"}
    assert min(found.values()) > 0
    assert found["train"] == pytest.approx(found["forward"] + found["backward"] + found["optimizer"])
    means = row.tally.means()
    assert (means["nfe_forward"], means["nfe_backward"], means["calls_backward"]) == (10, 10, 0)
    assert row.batches == 3


def test_backsolve_counts_its_own_calls_of_f(made):
    (row,) = made("neural_ode")
    row.measure(2)
    means = row.tally.means()
    assert means["calls_backward"] == means["nfe_backward"] > 0
    figures = row.figures({"train": [1.0]}, Prices(0.5, 1.0, 2.0, 3.0), {})
    assert figures.f_calls == means["nfe_forward"] + means["calls_backward"]
    assert (means["recorded"], means["narrow"]) == (means["calls_backward"], 0)
    back = means["calls_backward"]
    assert figures.floor_ms == pytest.approx(means["nfe_forward"] * 0.5 + back * (1.0 + 3.0))


def test_a_row_is_timed_as_it_trains_after_pretraining(made):
    (plain,), (row,) = made("deq"), made("deq", words=["recipe.pretrain_steps=9", "recipe.pretrain_depth=2"])
    plain.measure(2), row.measure(2)
    assert row.tally.means() == plain.tally.means()


def test_warming_up_leaves_no_trace(made):
    fresh, warm = made("skip_deq", "skip_deq")
    warm.warm_up()
    assert len(warm.warm.times) >= 2
    fresh.measure(2), warm.measure(2)
    for (name, p), (_, q) in zip(fresh.model.named_parameters(), warm.model.named_parameters()):
        assert torch.equal(p, q), name
    assert fresh.tally.means() == warm.tally.means()


def test_unit_costs_are_of_one_call(made):
    for row in made("deq", "resnet"):  # of the untied cells each is applied once a solve
        state = torch.random.get_rng_state()
        prices = [row.prices() for _ in range(3)]
        assert torch.equal(torch.random.get_rng_state(), state)
        step = row.measure(5)
        f, f_graph, vjp, vjp_all = (min(getattr(price, name) for price in prices)  # other tests run beside this one
                                    for name in ("f", "f_graph", "vjp", "vjp_all"))  # fmt: skip
        assert 0 < f < step["forward"]
        assert f < f_graph * 1.5
        assert 0 < vjp < step["backward"]
        assert vjp < vjp_all * 1.5


@pytest.mark.parametrize(
    ("model", "words", "recorded", "narrow"),
    [
        ("deq", [], 1, "all but one"),
        ("deq", ["adjoint=jfb"], 1, 0),
        ("deq", ["adjoint=phantom", "adjoint.steps=3"], 3, 0),
        ("deq", ["adjoint=phantom", "adjoint.steps=3", "adjoint.mode=neumann"], 1, 2),
        ("explicit", ["stop.steps=4"], 4, 0),
        ("explicit", ["stop.steps=4", "adjoint.checkpoint=true"], 4, 0),
    ],
)
def test_calls_with_a_graph_and_vjps_to_the_state_alone_are_counted_apart(made, model, words, recorded, narrow):
    (row,) = made(model, words=words)
    row.measure(2)
    means = row.tally.means()
    assert means["recorded"] == recorded
    assert means["narrow"] == (means["nfe_backward"] - 1 if narrow == "all but one" else narrow)
    assert means["nfe_backward"] > means["narrow"]


@pytest.mark.parametrize(("inject", "verdict"), [("frozen", "equal"), ("state", "not equal")])
def test_an_anode_whose_h_stands_still_is_timed_beside_the_same_function(tmp_path, inject, verdict, brisk):
    own = ["experiment=homo_mnist", "dataset=digits", "network=homo_conv", "network.width=32", "solver=rk4",
           "solver.dt=0.5", "adjoint=unroll", "recipe.batch=8"]  # fmt: skip
    words = {"homo_ode zero rk4": ["model=homo_ode", "init=zero", "penalty=[none]"],
             "anode frozen": ["model=anode", f"network.inject={inject}"]}  # fmt: skip
    figures = []
    for label, more in words.items():
        job = composed(tmp_path, *own, *more)
        job.label = label
        data = config.make(job.config["dataset"], "dataset").load(tmp_path)
        row = rows.Row(label, job, data, Device("cpu", threads=1))
        row.warm_up()
        figures.append(row.figures({key: [ms] for key, ms in row.measure(1).items()}, Prices(1.0, 1.0, 1.0, 1.0), {}))
    [h5] = [c for c in comparisons(figures, papers.table("homo_ode")) if c.id == "H5"]
    assert h5.ratio.verdict == verdict
    assert (h5.ratio.value < 1e-6) == (verdict == "equal")


def test_a_round_is_long_enough_for_its_fastest_row():
    assert rows.steps_a_round([100.0, 2.0, 5.0]) == 5
    assert rows.steps_a_round([100.0, 8.0]) == 2
    assert rows.steps_a_round([1.0]) == 10  # at most
    assert rows.steps_a_round([500.0]) == 1  # at least


def test_rows_are_called_by_what_tells_them_apart(tmp_path):
    def names(*words):
        given = config.expand(jobs.words(tmp_path, *words))
        return rows.labels(config.compose_all("bench", given), jobs.words(tmp_path, *words))

    assert names("model=deq,explicit") == ["deq", "explicit ×10"]
    assert names("model=deq", "solver=picard,anderson") == ["picard", "anderson"]
    assert names("model=deq,skip_deq", "solver=picard,anderson") == [
        "deq picard", "deq anderson", "skip_deq picard", "skip_deq anderson"]  # fmt: skip
    assert names("model=deq", "gpu.compile=false,true") == ["compile=false", "compile=true"]
    assert names("model=deq,deq") == ["deq #1", "deq #2"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("recipe.batch=16,32", "recipe.batch, not 16 and 32"),
        ("seed=0,1", "seed, not 0 and 1"),
        ("dataset=digits,mnist", "dataset.name, not digits and mnist"),
        ("dataset.flip=0,0.5", "dataset.flip, not 0 and 0.5"),
        ("gpu.dtype=float32,float64", "gpu.dtype, not float32 and float64"),
    ],
)
def test_unlike_rows_are_refused_by_the_key_that_differs(tmp_path, words, key):
    jobs_ = config.compose_all("bench", config.expand(jobs.words(tmp_path, words)))
    with pytest.raises(config.UsageError, match=f"must share {key}"):
        rows.refuse_unlike([job.config for job in jobs_])


def test_a_solvers_own_arithmetic_is_what_is_neither_f_nor_a_vjp(made, monkeypatch):
    """A cell that takes 20 ms and VJPs that do leave it as it is; a GMRES that does takes 20 ms more an iteration."""
    (row,) = made("deq", words=["solver=picard", "stop.max_steps=5"])
    row.measure(2)
    before = row.state()
    weights = [p.detach().clone() for p in row.model.parameters()]
    plain = arithmetic_ms(row)
    assert all(torch.equal(p, q) for p, q in zip(row.model.parameters(), weights))
    assert row.state()["step"] == before["step"]
    cell = row.model.layer.cell
    forward, combine = cell.forward, core.Reduce.combine

    def slowly(call):
        def slow(*args, **given):
            time.sleep(0.02)
            return call(*args, **given)

        return slow

    with monkeypatch.context() as patch:
        patch.setattr(cell, "forward", slowly(forward))
        patch.setattr(torch.autograd, "grad", slowly(torch.autograd.grad))
        slow_f = min(arithmetic_ms(row) for _ in range(3))  # others run beside
    assert slow_f < plain + 15  # of some fifteen calls, 300 ms
    monkeypatch.setattr(core.Reduce, "combine", slowly(combine))
    assert arithmetic_ms(row) > plain + 35  # one an iteration, one at the end


def test_where_calls_cannot_be_told_apart_there_is_no_arithmetic(made):
    (row,) = made("deq")
    row.device.compile = True
    assert arithmetic_ms(row) is None
