import pytest

from implicit_bench.core import EndTime, FixedSteps, Residual


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Residual(tol=0), "stop.tol=0 must be positive and finite, such as 1e-2"),
        (lambda: Residual(tol=float("nan")), "stop.tol=nan must be positive"),
        (lambda: Residual(max_steps=0), "stop.max_steps=0 must be at least 1"),
        (lambda: Residual(norm="relative"), "stop.norm='relative' must be rel or abs"),
        (lambda: Residual(patience=-1), "stop.patience=-1 and stop.protect=0.0 must not be negative; 0 is never"),
        (lambda: Residual(protect=float("nan")), "stop.patience=0 and stop.protect=nan must not be negative"),
        (lambda: EndTime(t1=0), "stop.t1=0 must be positive and finite"),
        (lambda: EndTime(t1=float("inf")), "stop.t1=inf must be positive and finite"),
        (lambda: FixedSteps(steps=0), "stop.steps=0 must be at least 1"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
