"""implicit_bench.clock: statistics against simulation and brute force, timers against clocks that we move by hand."""

import gc
import math
import statistics
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_bench import clock
from implicit_bench.clock import StepTimer, interleave, ratio, summary, unit_cost, warm_up

times = st.lists(st.floats(0.1, 10), min_size=1, max_size=60)


class Hands:
    """A clock that moves only when told: stands in for the module's `time`."""

    def __init__(self, read_ns=0):
        self.ns, self.read_ns = 10**9, read_ns

    def perf_counter_ns(self):
        self.ns += self.read_ns
        return self.ns

    def perf_counter(self):
        return self.perf_counter_ns() / 1e9

    def pass_ms(self, ms):
        self.ns += round(ms * 1e6)


@pytest.fixture
def hands(monkeypatch):
    hands = Hands()
    monkeypatch.setattr(clock, "time", hands)
    return hands


# --- ratios ---------------------------------------------------------------------------------------------------------


def simulated(sims, n, rho, seed, shared=0.5, sd=0.05):
    """Pairs of AR(1) log-normal times, medians 1 and 1, half of the variance shared: two (sims, n) tensors."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, sims, n, generator=g, dtype=torch.float64)
    for i in range(1, n):
        noise[..., i] = rho * noise[..., i - 1] + math.sqrt(1 - rho**2) * noise[..., i]
    common, *own = noise
    return [(sd * (math.sqrt(shared) * common + math.sqrt(1 - shared) * x)).exp() for x in own]


@pytest.mark.parametrize(
    ("n", "rho", "least"),
    [(40, 0, 0.9), (40, 0.3, 0.9), (40, 0.6, 0.85), (100, 0, 0.9), (100, 0.3, 0.9), (100, 0.6, 0.85)],
)
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(n, rho, least):
    a, b = simulated(500, n, rho, seed=round(n + 10 * rho))
    truth = 2 / 1.3
    found = [ratio(x, y) for x, y in zip((2 * a).tolist(), (1.3 * b).tolist())]
    coverage = statistics.mean(r.low <= truth <= r.high for r in found)
    print(f"n {n} rho {rho}: coverage {coverage:.3f}")
    assert least <= coverage <= 0.99
    # And it says something: an interval a third wider than the estimate's own spread needs would be useless here.
    needed = 2 * 1.96 * statistics.stdev(math.log(r.value) for r in found)
    assert statistics.mean(math.log(r.high / r.low) for r in found) < 1.33 * needed


def test_a_row_against_itself_is_no_difference_and_the_rest_errs_both_ways():
    a, b = simulated(400, 60, 0.3, seed=7)
    verdicts = Counter(ratio(x, y).verdict for x, y in zip(a.tolist(), b.tolist()))
    assert 0.92 <= verdicts["no difference"] / 400 <= 0.99
    assert verdicts["faster"] > 0
    assert verdicts["slower"] > 0


def test_a_real_difference_of_5_percent_is_found():
    a, b = simulated(100, 60, 0.3, seed=8)
    assert sum(ratio(x, y).verdict == "faster" for x, y in zip((1.05 * a).tolist(), b.tolist())) > 90


def test_intervals_shrink_with_the_root_of_n_and_widen_with_autocorrelation_and_level():
    def width(n, rho, **kwargs):
        a, b = simulated(40, n, rho, seed=9)
        found = [ratio(x, y, **kwargs) for x, y in zip(a.tolist(), b.tolist())]
        return statistics.mean(math.log(r.high / r.low) for r in found)

    assert 1.8 < width(60, 0) / width(240, 0) < 2.6
    assert width(240, 0.6) > 1.35 * width(240, 0)
    assert 1.25 < width(240, 0, level=0.99) / width(240, 0, level=0.95) < 1.45  # 2.576 / 1.960 = 1.31


@settings(deadline=None, max_examples=30)
@given(times, st.integers(0, 5))
def test_interval_equals_bootstrap_by_brute_force(a, seed):
    """Medians of the resamples themselves, ties and both parities of n included."""
    n = len(a)
    b = [math.sqrt(x) + (i % 3) for i, x in enumerate(a)]
    block = max(1, min(round(2 * n ** (1 / 3)), n // 4))
    starts = torch.randint(n, (300, -(-n // block), 1), generator=torch.Generator().manual_seed(seed)).tolist()
    rounds = [[(s + j) % n for (s,) in row for j in range(block)][:n] for row in starts]
    each = [math.log(x / y) for x, y in zip(a, b)]
    logs = [statistics.median(each[i] for i in r) for r in rounds]
    centre = statistics.median(each)
    stretch = clock._t_over_z(0.975, max(3, n / block - 1))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.tensor(logs, dtype=torch.float64).quantile(tails).tolist()
    found = ratio(a, b, seed=seed, resamples=300)
    assert math.log(found.value) == pytest.approx(centre, abs=1e-9)
    assert math.log(found.low) == pytest.approx(centre + stretch * min(low - centre, 0), abs=1e-9)
    assert math.log(found.high) == pytest.approx(centre + stretch * max(high - centre, 0), abs=1e-9)


def test_rounds_stay_paired():
    """Noise that hits both rows alike cancels to the last digit: only the same resample of both does that."""
    a = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.1).tolist()
    r = ratio([3 * x for x in a], a)
    assert (r.value, r.low, r.high) == pytest.approx((3, 3, 3), rel=1e-12)
    shuffled = [a[i] for i in torch.randperm(50, generator=torch.Generator().manual_seed(1)).tolist()]
    assert ratio(shuffled, a).high > 1.1


@settings(deadline=None, max_examples=20)
@given(times, st.floats(0.1, 10))
def test_ratio_scales_with_the_unit_and_inverts_when_swapped(a, unit):
    b = a[::-1]
    b[0] *= 1.5
    r, scaled, swapped = ratio(a, b), ratio([unit * x for x in a], b), ratio(b, a)
    assert (scaled.value, scaled.low, scaled.high) == pytest.approx([unit * x for x in (r.value, r.low, r.high)])
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx([1 / x for x in (r.value, r.high, r.low)])
    assert r.low <= r.value <= r.high


def test_verdicts():
    slow, fast = [2.0, 2.1, 2.2, 2.3] * 10, [1.0, 1.1, 1.2, 1.3] * 10
    assert ratio(slow, fast).verdict == "faster"
    assert ratio(fast, slow).verdict == "slower"
    assert ratio(slow, slow).verdict == "no difference"
    assert ratio(slow[:39], fast[:39]).verdict == "too few rounds"
    assert ratio(slow, fast) == ratio(slow, fast)
    assert ratio(slow, fast).n == 40


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([1.0], [1.0, 2.0], "same rounds"),
        ([], [], "at least one"),
        ([0.0], [1.0], "above 0"),
        ([math.nan], [1.0], "finite"),
    ],
)
def test_ratio_refuses_what_has_no_ratio(a, b, says):
    with pytest.raises(ValueError, match=says):
        ratio(a, b)


@pytest.mark.parametrize(
    ("p", "df", "t"), [(0.975, 3, 3.1824), (0.975, 5, 2.5706), (0.975, 10, 2.2281), (0.95, 6, 1.9432)]
)
def test_students_t(p, df, t):
    z = statistics.NormalDist().inv_cdf(p)
    assert clock._t_over_z(p, df) * z == pytest.approx(t, rel=0.01)


def test_summary():
    assert summary(range(100, -1, -1)) == pytest.approx({"median": 50, "p10": 10, "p90": 90, "n": 101})
    assert summary([1, 2, 4, 8])["median"] == 3
    with pytest.raises(ValueError, match="no values"):
        summary([])


# --- timers ---------------------------------------------------------------------------------------------------------


def test_laps_run_from_mark_to_mark_add_up_by_name_and_leave_skips_out(hands):
    timer = StepTimer("cpu")
    for scale in (1, 2):
        timer.start()
        for name, ms in (("forward", 3), ("backward", 5), (None, 100), ("forward", 7)):
            hands.pass_ms(scale * ms)
            timer.skip() if name is None else timer.lap(name)
        hands.pass_ms(1000)  # between steps
    assert timer.drain() == {"forward": [10, 20], "backward": [5, 10]}
    assert timer.drain() == {}


def test_read_gives_the_latest_step_and_forgets_the_rest(hands):
    timer = StepTimer("cpu")
    for ms in (1, 2):
        timer.start()
        hands.pass_ms(ms)
        timer.lap("x")
    assert timer.read() == {"x": 2}
    assert timer.drain() == {}


@pytest.fixture
def gpu(monkeypatch, hands):
    """A GPU in which every mark takes 1 ms and that has reached mark `gpu.reached`."""
    gpu = SimpleNamespace(events=[], reached=0, waits=[], asked=0, streams=[])

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing
            self.at = None

        def record(self, stream):
            gpu.streams.append(stream)
            gpu.events.append(self)
            self.at = len(gpu.events)

        def query(self):
            gpu.asked += 1
            return self.at <= gpu.reached

        def synchronize(self):
            gpu.waits.append(self.at)
            gpu.reached = max(gpu.reached, self.at)

        def elapsed_time(self, later):
            assert later.at <= gpu.reached, "read before it was complete"
            return float(later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a device-wide synchronisation"))
    return gpu


def step(timer):
    timer.start()
    timer.lap("forward")
    timer.lap("backward")


def test_cuda_steps_wait_for_nothing_and_record_on_the_devices_own_stream(gpu):
    timer = StepTimer("cuda:1")
    for _ in range(3):
        step(timer)
    assert (gpu.waits, gpu.asked, len(gpu.events)) == ([], 0, 9)
    assert set(gpu.streams) == {"stream of cuda:1"}


def test_cuda_drain_takes_only_what_is_complete_and_each_step_once(gpu):
    timer = StepTimer("cuda")
    for _ in range(3):
        step(timer)
    gpu.reached = 5  # the GPU is inside the second step
    assert timer.drain() == {"forward": [1], "backward": [1]}
    assert timer.drain() == {}
    gpu.reached = 6
    assert timer.drain() == {"forward": [1], "backward": [1]}
    assert gpu.waits == []
    assert timer.drain(wait=True) == {"forward": [1], "backward": [1]}
    assert gpu.waits == [9]
    assert timer.drain(wait=True) == {}


def test_cuda_read_waits_for_the_last_mark_only(gpu):
    timer = StepTimer("cuda")
    step(timer)
    step(timer)
    assert timer.read() == {"forward": 1, "backward": 1}
    assert gpu.waits == [6]


def test_cuda_unit_cost_reads_events_after_waiting_for_them(gpu):
    calls = []
    # One call advances nothing on this GPU, where a mark takes 1 ms: a group always lasts 1 ms, and 5 ms are asked for.
    assert unit_cost(lambda: calls.append(1), device="cuda", min_time_s=0.005) == 1
    assert len(calls) == 1 + 1 + 5
    assert gpu.waits[-1] == len(gpu.events)


@pytest.mark.parametrize("us", [0.5, 20, 3000])
def test_unit_cost_is_the_calls_own_however_dear_the_clock(monkeypatch, us):
    hands = Hands(read_ns=5000)
    monkeypatch.setattr(clock, "time", hands)
    assert unit_cost(lambda: hands.pass_ms(us / 1e3), device="cpu") == pytest.approx(us / 1e3, rel=0.002)


def test_unit_cost_shrugs_off_hiccups_and_the_first_call(hands):
    calls = iter(range(10**9))

    def fn():
        i = next(calls)
        hands.pass_ms(5000 if i == 0 else 300 if i % 1000 == 999 else 0.1)

    assert unit_cost(fn, device="cpu") == pytest.approx(0.1)


def test_unit_cost_of_a_long_call_takes_few(hands):
    calls = []
    cost = unit_cost(lambda: (calls.append(1), hands.pass_ms(700)), device="cpu")
    assert cost == pytest.approx(700)
    assert len(calls) == 5  # one cold, one to size the group, three to take a median of


# --- warm-up and interleaving -----------------------------------------------------------------------------------------


def test_warm_up_ends_at_two_passes_that_agree():
    passes = iter([9.0, 3.0, 2.0, 2.03, 2.0])
    found = warm_up(lambda: next(passes))
    assert (found.settled, found.times) == (True, [9.0, 3.0, 2.0, 2.03])


def test_warm_up_says_so_when_passes_never_agree():
    passes = iter(1.03**i for i in range(100))
    found = warm_up(lambda: next(passes))
    assert (len(found.times), found.settled) == (10, False)
    assert warm_up(iter(1.03**i for i in range(9)).__next__, max_passes=5).times == [1.03**i for i in range(5)]


@pytest.mark.parametrize("k", range(1, 9))
def test_every_row_follows_every_other_equally_often(k):
    cycle = [clock._order(k, r) for r in range(2 * k if k % 2 else k)]
    assert all(sorted(order) == list(range(k)) for order in cycle)
    follows = Counter(pair for order in cycle for pair in pairwise(order))
    assert len(follows) == k * (k - 1)
    assert len(set(follows.values())) <= 1
    for place in range(k):  # and stands equally often in every place
        assert len(set(Counter(order[place] for order in cycle).values())) == 1
    assert clock._order(k, 0) == clock._order(k, len(cycle))


def counting(name, log, **fixed):
    def row():
        log.append(name)
        return {"train_ms": float(log.count(name)), **fixed}

    return row


def test_interleave_pairs_rounds_and_turns_the_order():
    log, seen = [], []
    found = interleave(
        {x: counting(x, log) for x in "ab"}, rounds=4, on_round=lambda i, r: seen.append((i, r["a"]["train_ms"]))
    )
    assert "".join(log) == "abbaabba"
    assert found.rows == {"a": {"train_ms": [1, 2, 3, 4]}, "b": {"train_ms": [1, 2, 3, 4]}}
    assert (found.rounds, found.failed, found.interrupted) == (4, {}, False)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_row_that_fails_is_dropped_and_the_others_go_on():
    log = []

    def bad():
        if len(log) > 5:
            raise RuntimeError("out of memory")
        return {"train_ms": 1.0}

    found = interleave({"a": counting("a", log), "bad": bad, "b": counting("b", log)}, rounds=6)
    assert found.failed == {"bad": "RuntimeError: out of memory"}
    assert found.rows == {x: {"train_ms": [1, 2, 3, 4, 5, 6]} for x in "ab"}


def test_a_row_whose_measures_change_is_refused_since_its_rounds_could_not_be_paired():
    log = []
    found = interleave(
        {"a": counting("a", log), "b": lambda: {"train_ms": 1.0} if len(log) < 4 else {"predict_ms": 1.0}}, rounds=8
    )
    assert found.failed == {"b": "ValueError: measures changed from ['train_ms'] to ['predict_ms']"}
    assert list(found.rows) == ["a"]


def test_when_every_row_fails_it_ends():
    found = interleave({"a": lambda: {}["gone"]}, rounds=10**9)
    assert found.failed == {"a": "KeyError: 'gone'"}
    assert (found.rows, found.rounds) == ({}, 0)


@pytest.mark.parametrize("stop_at", [1, 2, 5, 6])
def test_ctrl_c_leaves_whole_rounds_only(stop_at):
    log = []

    def row(name):
        def run():
            log.append(name)
            if len(log) == stop_at:
                torch.set_grad_enabled(False)  # as where it comes when no_grad has been entered and its body has not
                raise KeyboardInterrupt
            return {"x": 1.0}

        return run

    found = interleave({x: row(x) for x in "ab"}, rounds=100)
    assert torch.is_grad_enabled()
    whole = (stop_at - 1) // 2
    assert found.interrupted
    assert found.rounds == whole
    assert {x: len(m.get("x", [])) for x, m in found.rows.items()} == {"a": whole, "b": whole}
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("seconds", "rounds", "expected"), [(0, None, 1), (1, None, 1), (7.5, None, 2), (8.5, None, 3), (100, 3, 3)]
)
def test_interleave_stops_when_time_is_spent_but_never_inside_a_round(hands, seconds, rounds, expected):
    def row():
        hands.pass_ms(2000)
        return {"x": 2.0}

    found = interleave({"a": row, "b": row}, rounds=rounds, seconds=seconds)
    assert found.rounds == expected
    assert found.seconds == pytest.approx(4 * expected)


def test_interleave_refuses_to_run_for_ever():
    with pytest.raises(ValueError, match="rounds, seconds or both"):
        interleave({})


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_inside_runs_between_rounds_and_is_put_back(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    collections, inside = [], []
    gc.callbacks.append(lambda phase, info: collections.append(len(inside)) if phase == "start" else None)
    try:
        interleave(
            {"a": lambda: {"x": float(inside.append((gc.isenabled(), gc.get_freeze_count() > 0)) is None)}}, rounds=3
        )
        assert inside == [(False, True)] * 3
        assert collections == [0, 1, 2, 3]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.pop()
        (gc.enable if before else gc.disable)()
