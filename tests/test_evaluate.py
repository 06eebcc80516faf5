"""`eval`: the accuracy that the run had, budgets that mean what they say, a spectral radius that is one."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import jobs
import pytest
import torch
from torch import nn

from implicit_bench import load_run, record
from implicit_bench.adjoints import IFT
from implicit_bench.cli import main
from implicit_bench.core import Residual
from implicit_bench.data import Data
from implicit_bench.device import Device
from implicit_bench.evaluation.look import blurred, spectral_radius
from implicit_bench.models import Classifier, ImplicitLayer, Zero
from implicit_bench.runs import restore, trusted
from implicit_bench.schema import UsageError
from implicit_bench.solvers import Picard


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with three short runs."""
    here = tmp_path_factory.mktemp("eval")
    for model in ("skip_deq", "neural_ode", "resnet"):
        jobs.run(here, f"model={model}", "recipe.max_steps=40")
    return here


def test_batches_are_those_that_training_evaluates_in(trained, capsys, monkeypatch):
    sizes, real = set(), Data.batches
    monkeypatch.setattr(Data, "batches", lambda self, split, size: sizes.add(size) or real(self, split, size))
    evaluated(capsys, trained, "resnet")
    assert sizes == {load_run("resnet", trained / "runs").config["recipe"]["eval_batch"]}
    sizes.clear()
    evaluated(capsys, trained, "resnet", "eval.batch=7")
    assert sizes == {7}


def evaluated(capsys, trained, run, *words):
    words = [f"run={run}", f"paths.runs={trained / 'runs'}", "gpu.threads=1", *words]
    assert main(["eval", *words, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_again_what_the_run_found_at_its_end(trained, capsys):
    found = evaluated(capsys, trained, "skip_deq", "eval.steps=0,1,2,4", "eval.noise=0", "eval.blur=0")
    rec = load_run("skip_deq", trained / "runs").record
    conditions = {row["condition"]: row for row in found["conditions"]}
    clean = conditions["as trained"]
    assert clean["accuracy"] == pytest.approx(rec["metrics"]["test_acc"])
    assert clean["loss"] == pytest.approx(rec["metrics"]["test_loss"], rel=1e-5)
    assert clean["evaluations"] == pytest.approx(rec["solve"]["test"]["nfe_sample"])
    assert clean["converged"] == rec["solve"]["test"]["converged_fraction"]
    for k, accuracy in rec["metrics"]["test_acc_within"].items():
        row = conditions[f"{k} step{'s' * (k != '1')}"]
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["evaluations"] == int(k)
    assert conditions["noise 0"]["accuracy"] == conditions["blur 0"]["accuracy"] == clean["accuracy"]
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum() == found["n"] == 360
    assert confusion.trace() == round(clean["accuracy"] * 360)
    right, wrong = found["nfe_right"], found["nfe_wrong"]
    assert right["n"] == confusion.trace()
    assert (right["n"] * right["mean"] + wrong["n"] * wrong["mean"]) / 360 == pytest.approx(clean["evaluations"])
    assert found["residual"]["max"] <= 1e-2
    assert found["nfe"]["p10"] <= found["nfe"]["p50"] <= found["nfe"]["max"]
    assert json.loads((load_run("skip_deq", trained / "runs").folder / "eval/test.json").read_text()) == found


def test_noise_and_blur_are_in_the_units_they_claim(trained, monkeypatch, capsys):
    """sd .5 on pixels in [0, 1], whatever the normalisation; a blur leaves the mean and takes the spread."""
    seen = []
    forward = Classifier.forward

    def spy(self, images, depth=0):
        seen.append(images.clone())
        return forward(self, images, depth)

    monkeypatch.setattr(Classifier, "forward", spy)
    evaluated(capsys, trained, "neural_ode", "eval.noise=0.5", "eval.blur=1.0", "eval.steps=[]")
    clean, noisy, blurred = seen[:3]
    std = load_run("neural_ode", trained / "runs").config["dataset"]["std"][0]
    assert float(((noisy - clean) * std).std()) == pytest.approx(0.5, rel=0.02)
    assert float(blurred.std()) < 0.8 * float(clean.std())
    again = list(seen)
    evaluated(capsys, trained, "neural_ode", "eval.noise=0.5", "eval.blur=[]", "eval.steps=[]")
    assert torch.equal(seen[len(again) + 1], noisy)  # the same noise each time


def test_a_wide_blur_is_as_wide_as_it_says_on_small_images():
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    bell = torch.exp(-torch.arange(-6.0, 7.0, dtype=torch.float64).square() / 8)  # to three sd
    wide = nn.functional.pad(image, (6, 6, 6, 6), mode="reflect")
    kernel = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    assert torch.allclose(blurred(lambda x: x, 2.0)(image), nn.functional.conv2d(wide, kernel))


def test_an_ode_has_no_budget_no_residual_and_no_radius_and_untied_cells_none_either(trained, capsys):
    for run in ("neural_ode", "resnet"):
        found = evaluated(capsys, trained, run, "eval.noise=[]", "eval.blur=[]", "plot=true")
        assert [row["condition"] for row in found["conditions"]] == ["as trained"]
        assert found["radius"] is None
        assert found["conditions"][0]["converged"] is None


def test_another_tolerance_is_the_residuals_or_that_of_the_steps_to_an_end_time(trained, capsys):
    words = ["eval.tolerances=1e-1,1e-2,1e-6", "eval.steps=[]", "eval.noise=[]", "eval.blur=[]"]
    for run in ("skip_deq", "neural_ode"):
        trusted, *rows = evaluated(capsys, trained, run, *words)["conditions"]
        assert [row["condition"] for row in rows] == ["tolerance 0.1", "tolerance 0.01", "tolerance 1e-06"]
        assert rows[0]["evaluations"] < rows[1]["evaluations"] < rows[2]["evaluations"]
        if run == "skip_deq":  # trained at 1e-2: the pass at it is the run's own
            assert {**rows[1], "condition": ""} == {**trusted, "condition": ""}
            assert rows[2]["residual"] <= 1e-6
    assert "this run's has none" in refused(capsys, "run=resnet", "eval.tolerances=0.1",
                                            f"paths.runs={trained / 'runs'}")  # fmt: skip


def test_pictures_are_drawn_as_svg_and_png(trained, capsys):
    evaluated(capsys, trained, "skip_deq", "plot=true", "eval.solvers=picard,anderson", "eval.noise=[]", "eval.blur=[]")
    folder = load_run("skip_deq", trained / "runs").folder / "eval"
    for name in ("residual", "evaluations"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert len(list(ET.parse(folder / f"{name}.svg").iter())) > 20
    legend = (folder / "residual.svg").read_text()
    assert "<!-- picard -->" in legend
    assert "<!-- anderson -->" in legend


def test_text_has_every_part(trained, capsys):
    assert main(["eval", "run=skip_deq", f"paths.runs={trained / 'runs'}", "eval.noise=0.1", "eval.blur=[]"]) == 0
    out = capsys.readouterr().out
    for said in ("answer  accuracy 0.", "evaluations p10 ", "residual    p10 ", "right answers ", "radius  |largest",
                 " noise 0.1 ", " 0 steps ", "true \\ said   ", "wrote   "):  # fmt: skip
        assert said in out, said


class Linear(nn.Module):
    batch_independent = True

    def __init__(self, matrix):
        super().__init__()
        self.size, self.W = len(matrix), nn.Parameter(matrix)

    def begin(self, x):
        return x

    def forward(self, z, ctx, t):
        return z @ self.W.T + ctx


class Network:
    def __init__(self, cell):
        self.cell, self.stem, self.head = cell, nn.Identity(), nn.Identity()


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(
    ("matrix", "radius"),
    [([[0.5, 1.0], [0.0, 0.3]], 0.5), ([[0.0, -0.8], [0.8, 0.0]], 0.8), ([[-0.9, 0.0], [0.0, 0.1]], 0.9)],
)  # not normal; a complex pair; a negative one
def test_the_spectral_radius_is_the_largest_eigenvalue(matrix, radius, coupled):
    cell = Linear(torch.tensor(matrix))
    cell.batch_independent = not coupled
    network = Network(cell)
    model = Classifier(network, ImplicitLayer(cell, Zero(network), Picard(), Residual(1e-5, max_steps=500), IFT()))
    found = spectral_radius(model, torch.randn(5, 2))
    assert found.shape == ((1,) if coupled else (5,))
    assert torch.allclose(found, torch.tensor(radius), rtol=0.02)


# ------------------------------------------------------------------------------------------------------------ refused


def refused(capsys, *words, code=2):
    assert main(["eval", *words]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    return err.removeprefix("implicit-bench: ").rstrip()


def test_mistakes_are_sentences(trained, capsys):
    at = f"paths.runs={trained / 'runs'}"
    assert refused(capsys, "eval.steps=-1", at) == "eval.steps=-1 must not be negative"
    assert "must lie in (0, 1)" in refused(capsys, "eval.tolerances=0", at)
    assert refused(capsys, "eval.solver=picard", at) == "no key 'eval.solver'; nearest: eval.solvers"
    assert refused(capsys, "eval.split=tets", at) == "eval.split='tets' is not possible; nearest: test"
    assert refused(capsys, "run=zzz", at, code=2).startswith("no run 'zzz' in ")
    assert "no solver 'brodyen'" in refused(capsys, "plot=true", "eval.solvers=brodyen", at)
    assert "use tsit5" in refused(capsys, "plot=true", "eval.solvers=torchdiffeq/dopri5", at)
    assert "is not possible; it wants" in refused(capsys, "eval.noise=a,b", at)


def test_an_id_that_looks_like_a_number_is_an_id(trained, capsys):
    assert refused(capsys, "run=12345e1", f"paths.runs={trained / 'runs'}", code=2).startswith("no run '12345e1'")


def test_a_checkpoint_of_another_network_is_named(trained, tmp_path, capsys):
    outcome = jobs.run(tmp_path, "network.hidden=32", "recipe.max_steps=2")
    (outcome.folder / "last.pt").write_bytes((load_run("skip_deq", trained / "runs").folder / "last.pt").read_bytes())
    capsys.readouterr()
    said = refused(capsys, "run=last", f"paths.runs={tmp_path / 'runs'}", code=2)
    assert f"the checkpoint in {outcome.folder} is another network's (" in said


def test_a_record_without_weights_and_one_that_wants_trust(trained, tmp_path):
    run = load_run("skip_deq", trained / "runs")
    foreign = {**run.config, "solver": {"_target_": "os.system"}, "allow_targets": ["os"]}
    with pytest.raises(UsageError, match="is not one of implicit-bench's"):
        trusted(foreign, [])
    empty = replace(run, folder=tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore(empty, Device("cpu"))
    with pytest.raises(UsageError, match="is a bench, which leaves no weights"):
        _ = replace(run, record={**run.record, "command": "bench", "config": {"rows": []}}).model


def test_a_benchs_record_is_no_training(tmp_path, capsys):
    rec = record.new_record("bench", {"rows": []}, status="done")
    record.write_record(tmp_path / "bench-digits-0123456789", rec)
    assert main(["eval", "run=bench-digits", f"paths.runs={tmp_path}"]) == 2
    assert "bench-digits-0123456789 is a bench's; eval looks at trainings" in capsys.readouterr().err
