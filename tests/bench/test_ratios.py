from dataclasses import replace

import pytest

from implicit_bench import papers
from implicit_bench.bench import show
from implicit_bench.bench.command import seconds
from implicit_bench.bench.ratios import Figures, Prices, comparisons
from implicit_bench.config import UsageError
from implicit_bench.report import ratios

PRICES = Prices(f=0.1, f_graph=0.1, vjp=0.2, vjp_all=0.2)


def row(model, train, *, nfe=(20, 10), backward_calls=0, recorded=0, narrow=0, price=PRICES, converged=1.0,
        residual=True, solver=None, noise=0.001):  # fmt: skip
    times = [train * (1 + noise * ((i * 7) % 11 - 5)) for i in range(60)]
    means = {"nfe_forward": nfe[0], "nfe_backward": nfe[1], "calls_backward": backward_calls, "recorded": recorded,
             "narrow": narrow, "residual": 0.005, "converged_fraction": converged}  # fmt: skip
    series = {"train": times, "backward": [t / 2 for t in times], "predict": [t / 4 for t in times]}
    return Figures(model, model, model, series, means, price, 1000, solver or {"rtol": 1e-3}, "ift", residual)


def said(c):
    return ratios.sentence(show.line(c))


NODE = row("neural_ode", 15.0, nfe=(50, 30), backward_calls=30, residual=False)
CDEQ = row("cdeq", 5.0)


def test_a_claim_is_the_papers_numerator_over_its_denominator():
    found = comparisons([CDEQ, NODE])  # whatever the order of the rows
    assert [(c.id, c.slower.label, c.faster.label, c.measure) for c in found] == [
        ("R1", "neural_ode", "cdeq", "train"),
        ("R2", "neural_ode", "cdeq", "backward"),
        ("R6", "neural_ode", "cdeq", "predict"),
    ]
    assert found[0].ratio.value == pytest.approx(3.0)
    assert (found[0].ratio.low, found[0].ratio.high) == pytest.approx((3.0, 3.0))  # their noise is one and the same
    assert found[0].ratio.verdict == "faster"
    assert found[0].paper == "2.14–4.10×"  # 1.608/.753 and 5.267/1.284, CIFAR-10 small and large


def test_rows_without_a_claim_are_compared_with_the_first():
    a, b, c = row("deq", 1.0), row("skip_deq", 2.0), row("resnet", 1.0)
    found = comparisons([a, b, c])
    assert [(x.id, x.slower.label, x.faster.label) for x in found] == [("–", "deq", "skip_deq"), ("–", "deq", "resnet")]
    assert [x.ratio.verdict for x in found] == ["slower", "no difference"]


def test_rows_of_one_model_make_no_claim():
    found = comparisons([CDEQ, CDEQ, NODE])
    assert {x.id for x in found} == {"–"}


def test_the_saving_is_explained_by_counted_work_at_unit_cost():
    (r1, *_) = comparisons([NODE, CDEQ])
    e = r1.explained()
    assert e["saved_ms"] == pytest.approx(10.0)
    assert (e["f"], e["vjps"]) == (60, 20)  # (50 + 30) - 20 and 30 - 10
    assert e["f_ms"] == pytest.approx(6.0)
    assert e["vjp_ms"] == pytest.approx(4.0)
    assert e["other_ms"] == pytest.approx(0.0, abs=1e-9)
    assert r1.why() == ("cdeq saves 10.0 ms a step against neural_ode: 60.0 fewer f (60%), 20.0 fewer VJPs (40%), "
                        "other (0%)")  # fmt: skip


def test_a_recorded_call_and_a_vjp_to_the_parameters_have_prices_of_their_own():
    price = Prices(f=0.1, f_graph=0.15, vjp=0.2, vjp_all=0.3)
    node = row("neural_ode", 30.0, nfe=(50, 30), backward_calls=30, recorded=30, narrow=0, price=price, residual=False)
    cdeq = row("cdeq", 5.0, nfe=(20, 10), recorded=1, narrow=9, price=price)
    assert node.floor_ms == pytest.approx(50 * 0.1 + 30 * 0.15 + 30 * 0.3)
    assert cdeq.floor_ms == pytest.approx(19 * 0.1 + 1 * 0.15 + 9 * 0.2 + 1 * 0.3)
    e = comparisons([node, cdeq])[0].explained()
    assert e["f_ms"] == pytest.approx(9.5 - 2.05)
    assert e["vjp_ms"] == pytest.approx(9.0 - 2.1)
    assert e["other_ms"] == pytest.approx(25.0 - 7.45 - 6.9)


def test_what_the_solvers_do_themselves_is_a_part_where_both_rows_were_measured():
    own = replace(NODE, own_ms=1.5), replace(CDEQ, own_ms=0.5)
    (r1, *_) = comparisons(own)
    assert r1.explained()["own_ms"] == pytest.approx(1.0)
    assert r1.explained()["other_ms"] == pytest.approx(-1.0)
    assert r1.why().endswith("20.0 fewer VJPs (40%), the solvers' own arithmetic (10%), other (-10%)")
    assert "own_ms" not in comparisons([NODE, own[1]])[0].explained()


def test_what_speaks_against_a_comparison_stands_beside_it():
    stuck = row("cdeq", 5.0, converged=0.9, solver={"rtol": 1e-2})
    (r1, *_) = comparisons([NODE, stuck])
    assert r1.caveats == ["cdeq not converged", "different solvers or stepping tolerances"]
    assert comparisons([NODE, CDEQ])[0].caveats == []


def test_sentences_say_slower_as_plainly_as_faster():
    slow = row("cdeq", 30.0)
    sentence = said(comparisons([NODE, slow])[0])
    assert sentence.startswith("cdeq trains 2.00× [")
    assert sentence.endswith("] slower than neural_ode here (paper neural_ode / cdeq 2.14–4.10×)")
    same = said(comparisons([row("deq", 1.0), row("resnet", 1.0)])[0])
    assert same.startswith("deq / resnet: no difference in train here, 1.00× [")


def test_a_row_of_the_table_has_what_stands_beside_a_time():
    known = replace(CDEQ, memory={"train": [11.0, 12.5, 13.0]}, flops=2e9, val_acc=0.75)
    node, cdeq = (dict(zip(show.COLUMNS, show.cells(f))) for f in (NODE, known))
    assert node["calls f/vjp"] == "80.0/30.0"
    assert node["residual"] == node["val acc"] == node["MiB"] == node["GFLOP/s"] == "–"
    assert cdeq["×floor"] == f"{5.0 / (20 * 0.1 + 10 * 0.2):.2f}"
    assert (cdeq["val acc"], cdeq["MiB"], cdeq["GFLOP/s"]) == ("0.750", "12.5", "400")  # 2e9 in 5 ms


SMALL = papers.table("cdeq_cifar10_small")
HOMO = papers.table("homo_ode")


def named(name, model, train, **how):
    return replace(row(model, train, **how), name=name, label=name)


def test_a_table_has_its_own_claims_and_the_papers_ratio_of_its_cells():
    rows = [row("cdeq", 5.0), row("skip_cdeq", 4.0), NODE, named("cdeq f_zero", "cdeq", 3.0)]
    found = {(c.id, c.slower.label, c.faster.label, c.measure): c.paper for c in comparisons(rows, SMALL)}
    assert found["R1", "neural_ode", "cdeq", "train"] == "2.14×"
    assert found["R1b", "neural_ode", "skip_cdeq", "train"] == "2.00×"
    assert found["R4", "cdeq", "skip_cdeq", "train"] == "0.93×"
    assert found["R3", "cdeq", "skip_cdeq", "backward"] == "0.89×"
    assert not any("cdeq f_zero" in key for key in found)  # a row of the same model is not mistaken for the paper's


def test_the_second_papers_acceleration_is_of_evaluations_and_its_memory_of_all_readings():
    def started(name, nfe, *mib):
        found = named(name, "homo_ode", 1.0)
        return replace(found, times={**found.times, "nfe": [nfe + (i % 3) for i in range(60)]}, memory={"train": mib})

    rows = [started("homo_ode", 20, 50, 64, 48), started("homo_ode zero", 30, 60), started("neural_ode", 25, 96, 100)]
    h2, h3 = comparisons(rows, HOMO)
    assert (h2.id, h2.slower.label, h2.measure, h2.ratio.value) == ("H2", "neural_ode", "memory", 98 / 50)
    assert (h2.ratio.low, h2.ratio.high) == (96 / 64, 100 / 48)  # least over most, most over least
    assert (h2.ratio.verdict, h2.caveats[-1]) == ("faster", "readings 1.50 to 2.08")
    assert show.line(h2).low is None  # no confidence interval
    [apart] = comparisons([rows[0], replace(rows[2], memory={"train": [49, 100]})], HOMO)[:1]
    assert (apart.ratio.verdict, apart.ratio.low) == ("no difference", 49 / 64)
    assert (h3.id, h3.slower.label, h3.measure) == ("H3", "homo_ode zero", "nfe")
    assert h3.ratio.value == pytest.approx(31 / 21)
    assert h3.ratio.verdict == "faster"
    assert said(h3).startswith("homo_ode needs 1.48× [")
    assert "] fewer evaluations than homo_ode zero here" in said(h3)
    for nothing in ({}, {"train": []}, {"train": [0.0, 50]}):
        unknown = comparisons([replace(rows[0], memory=nothing), rows[2]], HOMO)[0]
        assert ratios.cells(show.line(unknown))[3:6] == ["–", "–", "not measured"]


def test_what_only_whole_trainings_tell_is_no_ratio_of_a_bench():
    rows = [replace(named(n, n, 1.0), val_acc=0.8, memory={"train": [9.0]}) for n in ("homo_ode", "neural_ode")]
    asked = replace(HOMO, claims=("H1", "H2", "H4"))  # errors, memory, spread
    assert [c.id for c in comparisons(rows, asked)] == ["H2"]


def test_the_second_papers_memory_says_by_which_gradient_and_in_how_many_evaluations():
    homo, node = (replace(named(n, n, 1.0), adjoint=a, memory={"train": [9.0]}) for n, a in
                  (("homo_ode", "unroll"), ("neural_ode", "backsolve")))  # fmt: skip
    [h2] = [c for c in comparisons([homo, node], HOMO) if c.id == "H2"]
    assert h2.caveats == ["neural_ode by backsolve, 20 f", "homo_ode by unroll, 20 f"]


def test_what_wandb_is_told_has_a_name_for_every_ratio():
    rows = [row("cdeq", 5.0), row("skip_cdeq", 4.0), row("skip_reg_cdeq", 2.5), NODE]
    found = ratios.scalars([show.line(c) for c in comparisons(rows)])
    assert found["speedup.R1.train"] == pytest.approx(3.0)
    assert found["speedup.R4.train.skip_reg_cdeq"] == pytest.approx(2.0)
    pair = ratios.scalars([show.line(c) for c in comparisons([row("deq", 1.0), row("explicit", 2.0)])])
    assert pair == {"speedup.deq_over_explicit.train": pytest.approx(0.5)}


TIMES = [("20s", 20), ("5m", 300), ("1h", 3600), ("90s", 90), ("1.5m", 90), (None, None)]


@pytest.mark.parametrize(("text", "value"), TIMES)
def test_times(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["soon", "5 weeks", "0s", "-3m"])
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(UsageError, match="write 20s, 5m or 1h"):
        seconds(text)


def test_only_training_times_are_explained_and_only_by_prices_that_can_be_right():
    r1, r2, _ = comparisons([NODE, CDEQ])
    assert r1.explained() is not None
    assert r2.explained() is None
    absurd = replace(CDEQ, price=PRICES._replace(f=16.0))  # a floor of 320 ms under a step of 4
    (r1, *_) = comparisons([NODE, absurd])
    assert r1.explained() is None
    assert r1.why() == ""
    assert show.cells(absurd)[show.COLUMNS.index("×floor")] == "–"


def test_an_interval_that_settles_nothing_says_so():
    wide, other = row("deq", 1.0, noise=0.15), row("resnet", 1.0, noise=0.15)
    shuffled = replace(other, times={k: v[::-1] for k, v in other.times.items()})
    (found,) = comparisons([wide, shuffled])
    assert found.ratio.verdict == "no difference"
    assert (found.caveats == ["interval too wide to tell"]) == (found.ratio.high > 1.2 * found.ratio.low)


def test_too_few_rounds_give_no_interval():
    few = [replace(r, times={k: v[:5] for k, v in r.times.items()}) for r in (NODE, CDEQ)]
    cells = ratios.cells(show.line(comparisons(few)[0]))
    assert cells[4:6] == ["–", "too few rounds"]
    assert ratios.cells(show.line(comparisons([NODE, CDEQ])[0]))[5] == "cdeq faster"
