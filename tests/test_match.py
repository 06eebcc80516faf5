"""`match=`: a control as large, or as slow, as an implicit model; its config and run id are those of plain settings."""

import json
import sys
from fractions import Fraction

import jobs
import pytest
import torch

from implicit_bench import config, machine, match
from implicit_bench.cli import main
from implicit_bench.models import Dense, Mdeq
from implicit_bench.record import read_record, run_id


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compose(*words):
    return config.compose("train", ["logger=none", "gpu.threads=1", *words])


@pytest.mark.parametrize(
    ("network", "dataset", "cls", "target"),
    [("dense", "mnist", Dense, 134_538), ("mdeq_small", "cifar10", Mdeq, 163_546)],
)
def test_a_resnet_is_made_as_narrow_as_its_parameters_say(network, dataset, cls, target, capsys):
    words = ["model=resnet", f"network={network}", f"dataset={dataset}"]
    [job] = match.matched([compose(*words, "match=params")])
    plain = compose(*words).config["network"]
    found, total = job.config["network"], match.total(job.config)
    assert {key for key in found if found[key] != plain[key]} <= set(cls.widths)
    assert found["untied"] == 10
    assert abs(total - target) < 0.06 * target  # of ten cells of 24 channels one channel is 8,000 parameters
    assert f"{total:,} parameters, deq {target:,} (" in capsys.readouterr().err
    widths = {key: plain[key] for key in cls.widths}
    fine = [match.scaled(widths, Fraction(i, 3999)) for i in range(4000)]
    steps = [w for i, w in enumerate(fine) if i == 0 or w != fine[i - 1]]
    at = steps.index({key: found[key] for key in cls.widths})
    for beside in steps[at - 1], steps[at + 1]:
        assert abs(match.total({**job.config, "network": {**found, **beside}}) - target) >= abs(total - target)
    [again] = match.matched([compose(*words, "match=params")])
    spelled = [f"network.{key}={found[key]}".replace(" ", "") for key in cls.widths]
    assert run_id(again.config) == run_id(job.config) == run_id(compose(*words, *spelled).config)


def test_explicit_has_as_many_parameters_unless_the_start_learns(capsys):
    job = compose("model=explicit", "match=params")
    assert match.matched([job]) == [job]
    assert capsys.readouterr().err == "match   explicit ×10: 42,378 parameters as it is, deq 42,378\n"
    [wider] = match.matched([compose("model=explicit", "match=params", "match_to=skip_deq")])
    assert wider.config["network"]["hidden"] > 128
    assert match.total(wider.config) == pytest.approx(58_890, rel=0.01)


def test_the_record_says_the_real_settings(here):
    words = jobs.words(here, "model=resnet", "match=params", "recipe.max_steps=2", "stop.steps=3")
    assert main(["train", *words]) == 0
    [path] = here.glob("runs/resnet-*/record.json")
    rec = read_record(path)
    hidden = rec["config"]["network"]["hidden"]
    assert hidden < 128
    assert rec["params"]["total"] == pytest.approx(42_378, rel=0.01)
    spelled = compose("model=resnet", "recipe.max_steps=2", "stop.steps=3", f"network.hidden={hidden}").config
    assert run_id({**spelled, "gpu": rec["config"]["gpu"]}) == rec["run_id"]


REFUSED = {
    "match=params": "match=params is for a control, k plain applications of cells, and model=deq is none; use "
                    "model=explicit or model=resnet",
    "model=explicit match=size": "match='size' is not possible; nearest: time",
    "model=explicit match=time match_to=dq": "no model 'dq' for match_to; nearest: deq (implicit-bench list models)",
    "model=explicit match=params match_to=resnet": "match_to=resnet is a control itself; name an implicit model, such "
                                                   "as match_to=deq",
    "model=resnet match=time stop.steps=7": "match=time finds stop.steps itself, so that stop.steps=7 cannot be; leave "
                                            "one of them out",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_matched_is_one_sentence(words, here, capsys):
    for sweep in ([], ["-m", "seed=0,1"]):
        assert main(["train", *sweep, *words.split(), *jobs.words(here)]) == 2
        assert capsys.readouterr() == ("", f"implicit-bench: {REFUSED[words]}\n")
        assert not list(here.iterdir())


OWN = "from implicit_bench.models import Dense\nclass Mine(Dense):\n    widths = ()\n"


def test_a_network_that_names_no_widths_is_refused(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "my_nets.py").write_text(OWN)
    (here / "conf/network").mkdir(parents=True)
    (here / "conf/network/mine.yaml").write_text("_target_: my_nets.Mine\nuntied: 0\n")
    words = ["model=resnet", "network=mine", "match=params", "allow_targets=[my_nets]"]
    sentence = r"network=mine does not say which they are; give Mine a line such as widths = \('hidden',\)$"
    with pytest.raises(config.UsageError, match=sentence):
        match.matched([config.compose("train", words, ["conf"])], ["conf"])
    sys.modules.pop("my_nets")


# ---------------------------------------------------------------------------------------------------------- time


@pytest.fixture
def clock(monkeypatch):
    """3 + 0.5 k ms for a control, `clock.other` for the rest; `clock.asked` has the depths that were timed."""

    class Clock:
        other, each, asked = 12.1, 0.5, []

        def __call__(self, configs, seconds):
            depths = [cfg["stop"].get("steps") for cfg in configs]
            assert depths[0] is None
            self.asked = [*self.asked, depths[1:]]
            return [self.other if k is None else 3 + self.each * k for k in depths]

    fake = Clock()
    monkeypatch.setattr(match, "initial_ms", fake)
    return fake


def test_the_depth_is_the_nearest_on_a_line_and_is_kept(here, clock, capsys):
    words = ["match=time", *jobs.words(here)]
    [job] = match.matched([compose("model=explicit", *words)])
    assert job.config["stop"]["steps"] == 18
    assert job.config["network"]["untied"] == 0
    assert capsys.readouterr().err == "match   explicit ×18: 12 ms a step, deq 12.1 ms\n"
    assert clock.asked == [[2, 12], [2, 18]]  # the second line ends where the first one leads
    clock.other = 99.0
    [again] = match.matched([compose("model=explicit", "seed=3", *words)])  # no depth of its own for each seed
    assert again.config["stop"]["steps"] == 18
    assert run_id(job.config) == run_id(compose("model=explicit", "stop.steps=18").config)
    [resnet] = match.matched([compose("model=resnet", *words)])
    assert (resnet.config["stop"]["steps"], resnet.config["network"]["untied"]) == (192, 192)
    assert clock.asked[-1] == [2, 100]  # no deeper is timed
    [kept] = here.glob("runs/.matched.json")
    assert len(json.loads(kept.read_text())) == 2
    kept.unlink()
    clock.other = 1.0
    [fast] = match.matched([compose("model=explicit", *words)])
    assert fast.config["stop"]["steps"] == 1
    kept.write_text("{")
    with pytest.raises(config.UsageError, match="is no valid JSON; delete it"):
        match.matched([compose("model=explicit", *words)])
    kept.unlink()
    clock.each = -0.1
    with pytest.raises(config.UsageError, match="no k can be told; try again when the machine is quiet"):
        match.matched([compose("model=explicit", *words)])


def test_what_it_is_matched_to_has_its_own_parts_and_the_jobs_network(here):
    job = compose("model=resnet", "match_to=cdeq", "network=mdeq_small", "recipe.batch=8", "adjoint.checkpoint=false")
    other = match._other(job, ())
    assert other["network"] == {**job.config["network"], "untied": 0}
    assert other["recipe"] == job.config["recipe"]
    parts = [other[part]["_target_"].rpartition(".")[2] for part in ("solver", "stop", "adjoint")]
    assert parts == ["Vcab3", "Residual", "IFT"]


def test_plan_and_bench(here, clock, capsys, monkeypatch):
    from implicit_bench import plan

    monkeypatch.setattr(plan, "_measure", lambda cfg, device: {"deq": 12.0, "explicit": 13.0}[cfg["model"]["name"]])
    words = ["match=time", *jobs.words(here)]
    assert main(["train", "plan=true", "format=json", "model=explicit", *words]) == 0
    out, err = capsys.readouterr()
    [row] = json.loads(out)
    assert (row["job"], row["state"], row["ms/step"]) == ("explicit-digits-s0-?", "to do", 12.0)
    assert "match=time is measured when the job runs" in err
    assert not clock.asked
    assert not list(here.iterdir())
    jobs_ = config.compose_all("bench", config.expand(["model=deq,explicit", *words]))
    deq, explicit = match.matched(jobs_)
    assert deq == jobs_[0]
    assert explicit.config["stop"]["steps"] == 18
    assert match.matched([compose("model=explicit", *words)])[0].config["stop"]["steps"] == 18
    assert len(clock.asked) == 2  # train and bench have one depth
    assert main(["train", "plan=true", "format=json", "model=explicit", *words]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert "?" not in row["job"]
    assert row["ms/step"] == 13.0


def test_a_sweep_matches_its_controls_and_no_other(here, clock, monkeypatch):
    monkeypatch.setattr(machine.Alone, "read", lambda self: False)  # so that no comparison is among the records
    words = jobs.words(here, "recipe.max_steps=1", "recipe.eval_images=8")
    assert main(["train", "-m", "model=deq,explicit", "seed=0,1", "match=time", *words]) == 0
    steps = [read_record(path)["config"]["stop"].get("steps") for path in sorted(here.glob("runs/*/record.json"))]
    assert steps == [None, None, 18, 18]
    assert len(clock.asked) == 2


def test_a_measured_run_is_not_run_again(here, capsys, monkeypatch):
    monkeypatch.setattr(match, "SECONDS", 3.0)
    words = ["train", "model=explicit", "match=time", *jobs.words(here, "recipe.max_steps=1", "recipe.batch=8")]
    for _ in range(3):  # on a busy machine a deeper network can seem no slower
        if (code := main(words)) == 0:
            break
        assert "so that no k can be told" in capsys.readouterr().err
    assert code == 0
    err = capsys.readouterr().err
    [path] = here.glob("runs/explicit-*/record.json")
    k = read_record(path)["config"]["stop"]["steps"]
    assert k >= 1
    assert f"match   explicit ×{k}: " in err
    assert main(words) == 0
    assert f"{path.parent.name} is done" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("per_sample", ["auto", "true", "false"])
def test_a_resnet_of_multiscale_cells_learns(norm, per_sample):
    words = ["model=resnet", "network=mdeq_small", f"network.norm={norm}", f"stop.per_sample={per_sample}"]
    job = compose(*words, "stop.steps=2", "match=params")
    if (norm, per_sample) == ("batch", "true"):
        with pytest.raises(config.UsageError, match="per-sample stopping needs independent samples"):
            config.build(job.config)
        return
    model = config.build(match.matched([job])[0].config).model
    torch.nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)).logits, torch.arange(8)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
