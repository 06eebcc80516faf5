from dataclasses import replace

import pytest

from implicit_bench.bench.command import _cells, _sentence, _table, seconds
from implicit_bench.bench.ratios import Figures, comparisons
from implicit_bench.config import UsageError


def row(model, train, *, nfe=(20, 10), backward_calls=0, converged=1.0, residual=True, solver=None, noise=0.001):
    times = [train * (1 + noise * ((i * 7) % 11 - 5)) for i in range(60)]
    means = {"nfe_forward": nfe[0], "nfe_backward": nfe[1], "calls_backward": backward_calls, "residual": 0.005,
             "converged_fraction": converged}  # fmt: skip
    series = {"train": times, "backward": [t / 2 for t in times], "predict": [t / 4 for t in times]}
    return Figures(model, model, series, means, 0.1, 0.2, 1000, solver or {"rtol": 1e-3}, residual)


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
    assert found[0].ratio.low <= 3.0 <= found[0].ratio.high
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


def test_what_speaks_against_a_comparison_stands_beside_it():
    stuck = row("cdeq", 5.0, converged=0.9, solver={"rtol": 1e-2})
    (r1, *_) = comparisons([NODE, stuck])
    assert r1.caveats == ["cdeq not converged", "different solvers or stepping tolerances"]
    assert comparisons([NODE, CDEQ])[0].caveats == []


def test_sentences_say_slower_as_plainly_as_faster():
    slow = row("cdeq", 30.0)
    sentence = _sentence(comparisons([NODE, slow])[0])
    assert sentence.startswith("cdeq trains 2.00× [")
    assert sentence.endswith("] slower than neural_ode here (paper 2.14–4.10×)")
    same = _sentence(comparisons([row("deq", 1.0), row("resnet", 1.0)])[0])
    assert same.startswith("deq / resnet: no difference in train here, 1.00× [")


def test_the_table_has_a_row_each_and_failed_ones_say_so():
    columns, rows = _table([NODE, CDEQ], {"deq": "RuntimeError: boom"})
    assert rows[0][columns.index("calls f/vjp")] == "80.0/30.0"
    assert rows[0][columns.index("residual")] == "–"
    assert rows[1][columns.index("×floor")] == f"{5.0 / (20 * 0.1 + 10 * 0.2):.2f}"
    assert rows[2] == ["deq", *["failed"] * 8]


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
    absurd = replace(CDEQ, f_ms=16.0)  # a floor of 320 ms under a step of 4
    (r1, *_) = comparisons([NODE, absurd])
    assert r1.explained() is None
    assert r1.why() == ""
    columns, rows = _table([NODE, absurd], {})
    assert rows[1][columns.index("×floor")] == "–"


def test_an_interval_that_settles_nothing_says_so():
    wide, other = row("deq", 1.0, noise=0.15), row("resnet", 1.0, noise=0.15)
    shuffled = replace(other, times={k: v[::-1] for k, v in other.times.items()})
    (found,) = comparisons([wide, shuffled])
    assert found.ratio.verdict == "no difference"
    assert (found.caveats == ["interval too wide to tell"]) == (found.ratio.high > 1.2 * found.ratio.low)


def test_too_few_rounds_give_no_interval():
    few = [replace(r, times={k: v[:5] for k, v in r.times.items()}) for r in (NODE, CDEQ)]
    cells = _cells(comparisons(few)[0])
    assert cells[4:6] == ["–", "too few rounds"]
    assert _cells(comparisons([NODE, CDEQ])[0])[5] == "cdeq faster"
