"""Every config file, the precedence between them, Hydra's sweep grammar, and mistakes told in one sentence each."""

import math
import sys
from pathlib import Path

import jobs
import pytest
import torch
import yaml

from implicit_bench import config, schema
from implicit_bench.cli import main
from implicit_bench.data import ImageData
from implicit_bench.device import Device
from implicit_bench.record import read_record, run_id

CONFIGS = Path(__file__).parent.parent / "configs"


def files(group):
    folder = CONFIGS / group
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def compose(*words, search=()):
    return config.compose("train", words, search)


# ------------------------------------------------------------------------------------------ every file of every group

EVERY = [(group, file) for group in schema.GROUPS for file in files(group)]
NEEDS = {  # what a choice cannot do without
    **{f"solver={file}": ["model=neural_ode"] for file in files("solver") if file.startswith("torchdiffeq/")},
    "stop=end_time": ["model=neural_ode"],
    "penalty=[local_error]": ["model=cdeq"],
    "adjoint=backsolve": ["model=neural_ode"],
    "network=mdeq_imagenet": ["dataset=cifar10"],  # halves an image five times
    "network=node_conv": ["model=neural_ode", "init=stem"],  # its cell does not see x
    "experiment=cdeq_cifar10_small": ["stop.max_steps=9"],  # for time
    "experiment=cdeq_cifar10_large": ["stop.max_steps=9"],
    "experiment=cdeq_imagenet_small": ["stop.max_steps=9", "dataset.size=32"],
}
SETTABLE = ("network", "init", "solver", "stop", "adjoint", "recipe", "dataset")


@pytest.fixture(scope="module")
def digits():
    """One batch of 32, (x, y)."""
    data = compose().config["dataset"]
    data = ImageData(**{k: v for k, v in data.items() if k != "_target_"}).load("nowhere")
    return data.batch(data.train, torch.arange(32))


def learn_once(parts, device, x, y):
    """The loss of one batch, and the model with its gradients."""
    model = device.place(parts.model)
    with device.autocast():
        out = model(device.images(x))
        task = lambda z: torch.nn.functional.cross_entropy(model.head(z), y)  # noqa: E731
        loss = task(out.layer.z)
        loss = sum((penalty(out.layer, task) for penalty in parts.penalties), loss)
    loss.backward()
    return loss.detach(), model


def test_every_folder_is_a_group_and_no_group_is_empty():
    folders = {p.name for p in CONFIGS.iterdir() if p.is_dir()} - {"tune", "table", "hydra"}
    assert folders == set(schema.GROUPS) == {group for group, _ in EVERY}


@pytest.mark.parametrize(("group", "file"), EVERY, ids=lambda word: word.replace("/", "_"))
def test_every_file_composes_builds_and_learns(group, file, digits):
    choice = f"{group}=[{file}]" if group == "penalty" else f"{group}={file}"
    job = compose(*NEEDS.get(choice, []), choice)
    written = yaml.safe_load((CONFIGS / group / f"{file}.yaml").read_text())
    arrived = job.config.get(group, {})
    assert job.choices.get(group, file) == file
    for key, value in written.items() if group not in ("model", "length", "experiment") else ():
        if key == "defaults":
            continue
        assert arrived[key] == value or "${" in str(value), key
    assert "${" not in str(job.config)
    parts = config.build(job.config)
    if group == "gpu" and file == "cuda" and not torch.cuda.is_available():
        with pytest.raises(schema.UsageError, match=r"^gpu=cuda, but torch sees no CUDA device here; use"):
            config.make(job.config["gpu"], "gpu")
        return
    device = config.make(job.config["gpu"], "gpu")
    x, y = digits if parts.dataset.shape == (1, 8, 8) else (torch.rand(8, *parts.dataset.shape), torch.arange(8))
    loss, model = learn_once(parts, device, x.to(device.torch), y.to(device.torch))
    chance = math.log(parts.dataset.classes)
    most = 2.6 if file == "correction" else 1.75  # three losses, of weights 1, .8 and .64
    assert 0.65 * chance < loss < most * chance  # and a little penalty
    for part in (model.stem, model.layer.cell, model.head):
        for name, parameter in part.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or name == "cells.0.W.weight", name  # which a start of zero never reaches


TABLE = {  # design.md's
    "deq": ("zero", "broyden", "residual", "ift", []),
    "skip_deq": ("skip_net", "broyden", "residual", "ift", ["skip"]),
    "skip_reg_deq": ("f_zero", "broyden", "residual", "ift", ["skip"]),
    "cdeq": ("zero", "vcab3", "residual", "ift", []),
    "skip_cdeq": ("skip_net", "vcab3", "residual", "ift", ["skip"]),
    "skip_reg_cdeq": ("f_zero", "vcab3", "residual", "ift", ["skip"]),
    "neural_ode": ("zero", "vcab3", "end_time", "backsolve", []),
    "anode": ("stem_zeros", "dopri5", "end_time", "backsolve", []),
    "homo_ode": ("shared", "torchdiffeq/dopri5", "end_time", "unroll", ["init_fit"]),
    "explicit": ("zero", "picard", "fixed_steps", "unroll", []),
    "resnet": ("zero", "picard", "fixed_steps", "unroll", []),
}


def test_a_model_is_its_row_of_the_table():
    assert set(TABLE) == set(files("model"))
    for name, (init, solver, stop, adjoint, penalty) in TABLE.items():
        # whatever was chosen above it in the defaults list, a model names all of its parts
        job = compose(f"model={name}")
        picked = tuple(job.choices[group] for group in ("init", "solver", "stop", "adjoint"))
        assert picked == (init, solver, stop, adjoint), name
        assert list(job.config["penalty"]) == penalty, name
        assert job.config["model"] == {"name": name}
        assert job.config["field"] == ("ode" if name in ("neural_ode", "anode", "homo_ode") else "equilibrium"), name
        assert job.config["network"]["untied"] == (10 if name == "resnet" else 0), name


def test_controls_and_the_neural_ode_as_the_table_says():
    assert compose("model=neural_ode").config["stop"]["t1"] == 1.0
    resnet = config.build(compose("model=resnet", "stop.steps=7").config).model.layer
    explicit = config.build(compose("model=explicit", "stop.steps=7").config).model.layer
    assert len({id(cell) for cell in resnet.cell.cells}) == resnet.stop.steps == explicit.stop.steps == 7
    assert not hasattr(explicit.cell, "cells")


def test_parameters_are_the_papers_on_mnist():
    for model, total in (("deq", 134_538), ("skip_reg_cdeq", 134_538), ("skip_deq", 151_050), ("neural_ode", 134_538)):
        parts = config.build(compose(f"model={model}", "dataset=mnist").config)
        assert sum(parts.model.parameter_counts().values()) == total, model


@pytest.mark.parametrize(
    ("network", "dataset", "total", "with_skip_net"),
    [("mdeq_small", "cifar10", 163_546, 200_122), ("mdeq_large", "cifar10", 10_631_958, 11_186_774),
     ("mdeq_imagenet", "imagenet", 17_912_456, 18_467_272)],
)  # fmt: skip
def test_parameters_are_the_papers_on_cifar10_and_imagenet(network, dataset, total, with_skip_net):
    with torch.device("meta"):
        for model, count in (("deq", total), ("skip_deq", with_skip_net)):
            parts = config.build(compose(f"model={model}", f"network={network}", f"dataset={dataset}").config)
            assert sum(parts.model.parameter_counts().values()) == count


def test_the_sound_protocol():
    job = compose("model=cdeq").config
    assert (job["stop"]["tol"], job["stop"]["norm"], job["stop"]["max_steps"]) == (1e-2, "rel", 100)
    assert job["solver"]["rtol"] == job["solver"]["atol"] == 1e-3  # a tenth of the stopping tolerance
    assert (job["adjoint"]["rtol"], job["adjoint"]["atol"], job["adjoint"]["max_iter"]) == (1e-2, 0.0, 50)
    assert compose("model=neural_ode").config["solver"]["rtol"] == 1e-3
    for model in files("model"):
        assert compose(f"model={model}").config["dataset"]["val_size"] > 0


def test_dtypes_and_devices(digits):
    x, y = digits
    for dtype in ("float64", "bfloat16"):
        job = compose("model=skip_deq", f"gpu.dtype={dtype}", "gpu=cpu", "gpu.channels_last=true")
        device = config.make(job.config["gpu"], "gpu")
        loss, model = learn_once(config.build(job.config), device, x, y)
        assert 1.5 < loss < 4
        assert {p.grad.dtype for p in model.parameters()} == {torch.float64 if dtype == "float64" else torch.float32}
    if not torch.cuda.is_available():
        assert Device("auto", threads=1).settings() == Device("cpu", threads=1).settings()
    assert Device("cpu", allocator="default").settings()["allocator"] == "default"
    assert Device("cpu", threads=3).settings()["threads"] == 3


# ---------------------------------------------------------------------------------------------------------- identity


def identity(*words):
    return run_id(compose(*words).config)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model=deq solver=vcab3", "model=cdeq"),
        ("model=skip_deq solver=vcab3", "model=skip_cdeq"),
        ("model=skip_reg_deq solver=vcab3", "model=skip_reg_cdeq"),
        ("model=cdeq solver=broyden", "model=deq"),
        ("model=deq init=skip_net penalty=[skip]", "model=skip_deq"),
        ("model=skip_deq init=f_zero", "model=skip_reg_deq"),
        ("model=deq solver=picard stop=fixed_steps adjoint=unroll", "model=explicit"),
        ("model=explicit network.untied=10", "model=resnet"),
        ("model=deq penalty=[]", "model=deq"),
        ("model=deq penalty=[skip,none]", "model=deq penalty=skip"),
        ("model=deq stop.tol=0.010", "model=deq"),
        ("model=deq protocol.tol=1e-3", "model=deq stop.tol=1e-3"),
        ("length=short", "recipe.epochs=3"),
        ("length=smoke", "recipe.epochs=1 recipe.max_steps=100 recipe.batch=32 recipe.eval_images=200 "
         "recipe.schedule=constant"),
        ("logger=none paths.runs=x paths.data=y force=true progress.log_steps=7 loader.workers=3", "seed=0"),
    ],
)
def test_the_same_computation_has_the_same_id_whatever_it_is_called(one, other):
    assert identity(*one.split()) == identity(*other.split())


def test_another_computation_has_another_id():
    words = ["model=deq", "model=cdeq", "model=skip_deq", "model=neural_ode", "model=explicit", "model=resnet",
             "seed=1", "stop.tol=1e-3", "model=cdeq solver.rtol=1e-4", "gpu.dtype=float64", "dataset=mnist",
             "recipe.lr=1e-2", "adjoint=jfb", "dataset.flip=0.5", "model=skip_deq penalty.skip.weight=1"]  # fmt: skip
    assert len({identity(*w.split()) for w in words}) == len(words)


# -------------------------------------------------------------------------------------------------------- precedence


@pytest.fixture
def mine(tmp_path):
    """A folder for --config-dir in which each kind of file wants something that another one wants too."""

    def write(name, text):
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for name, hidden in (("narrow", 16), ("wide", 64)):
        write(f"network/{name}", f"_target_: implicit_bench.models.Dense\nhidden: {hidden}\n")
    write("dataset/small", "# @package _global_\ndefaults:\n  - digits@dataset\n  - override /network: narrow\n"
          "dataset: {val_size: 10}\n")  # fmt: skip
    write("model/big", "# @package _global_\ndefaults:\n  - deq\n  - override /network: wide\nmodel: {name: big}\n")
    write("protocol/strict", "defaults:\n  - sound\n  - _self_\n"
          "name: strict\ntol: 1.0e-4\nmax_steps: 9\nstep_tol: 1.0e-5\n")  # fmt: skip
    write("experiment/mine", "# @package _global_\ndefaults:\n  - override /model: skip_cdeq\n"
          "  - override /dataset: small\n"
          "recipe: {epochs: 7, batch: 8, lr: 0.5}\nprotocol: {max_steps: 8}\n")  # fmt: skip
    write("tune/mine_strict", "# @package _global_\nrecipe: {batch: 9, epochs: 8}\nprotocol: {max_steps: 7}\n")
    return [str(tmp_path / "mine")]


def test_a_data_set_picks_its_network_a_model_may_too_and_the_command_line_wins(mine):
    assert compose("dataset=small", search=mine).choices["network"] == "narrow"
    assert compose("dataset=small", "model=big", search=mine).choices["network"] == "wide"
    assert compose("dataset=small", "model=big", "network=dense", search=mine).choices["network"] == "dense"


def test_a_model_wins_over_the_default_and_the_command_line_over_the_model(mine):
    assert compose().choices["solver"] == "broyden"
    assert compose("model=cdeq").choices["solver"] == "vcab3"
    assert compose("model=cdeq", "solver=picard").choices["solver"] == "picard"
    assert compose("solver=picard", "model=cdeq").choices["solver"] == "picard"  # in whatever order


def test_a_protocol_wins_over_a_model_and_never_selects_a_solver(mine):
    for model in ("deq", "cdeq"):
        job = compose(f"model={model}", "protocol=strict", search=mine)
        assert (job.config["stop"]["tol"], job.config["stop"]["max_steps"]) == (1e-4, 9)
        assert job.choices["solver"] == compose(f"model={model}").choices["solver"]
    assert compose("protocol=strict", "stop.tol=0.5", search=mine).config["stop"]["tol"] == 0.5


def test_a_protocol_says_whether_there_is_validation_pretraining_and_a_watch_on_the_test_split(mine):
    ours = Path(mine[0], "protocol", "bare.yaml")
    ours.write_text("defaults:\n  - sound\n  - _self_\nname: bare\nval_size: 0\nwatch_test: true\npretrain_steps: 7\n"
                    "pretrain_depth: 3\n")  # fmt: skip
    for dataset in files("dataset"):
        assert compose(f"dataset={dataset}").config["dataset"]["val_size"] > 0
        job = compose(f"dataset={dataset}", "protocol=bare", search=mine).config
        assert job["dataset"]["val_size"] == 0
        assert [job["recipe"][k] for k in ("watch_test", "pretrain_steps", "pretrain_depth")] == [True, 7, 3]
        alone = config.compose("data", [f"dataset={dataset}"]).config["dataset"]
        assert alone == compose(f"dataset={dataset}").config["dataset"]
    job = compose("protocol=bare", "length=smoke", "dataset.val_size=9", search=mine).config
    assert (job["dataset"]["val_size"], job["recipe"]["pretrain_steps"]) == (9, 0)
    sound = compose().config["recipe"]
    assert [sound[k] for k in ("watch_test", "pretrain_steps", "pretrain_depth")] == [False, 0, 5]


def test_an_experiment_is_a_recipe_a_data_set_and_a_model_that_the_command_line_wins_over(mine):
    job = compose("experiment=mine", search=mine)
    assert (job.choices["model"], job.choices["solver"], job.choices["dataset"]) == ("skip_cdeq", "vcab3", "small")
    assert (job.choices["network"], job.config["recipe"]["epochs"]) == ("narrow", 7)
    assert job.config["stop"]["max_steps"] == 8  # over protocol=sound
    job = compose("experiment=mine", "model=deq", "recipe.lr=0.25", search=mine)
    assert (job.choices["model"], job.choices["solver"], job.config["recipe"]["lr"]) == ("deq", "broyden", 0.25)


def test_a_tune_file_of_experiment_and_protocol_wins_over_both(mine):
    job = compose("experiment=mine", "protocol=strict", search=mine).config
    assert (job["recipe"]["batch"], job["stop"]["max_steps"], job["recipe"]["lr"]) == (9, 7, 0.5)


def test_length_wins_over_every_recipe_number_and_the_command_line_over_length(mine):
    assert compose("length=smoke").config["recipe"]["epochs"] == 1
    job = compose("experiment=mine", "protocol=strict", "length=smoke", search=mine).config["recipe"]
    assert (job["epochs"], job["max_steps"], job["batch"]) == (1, 100, 32)
    assert compose("length=smoke", "recipe.epochs=4", "recipe.max_steps=null").config["recipe"]["epochs"] == 4
    for length in set(files("length")) - {"full"}:
        assert compose(f"length={length}", "experiment=mine", search=mine).config["recipe"]["pretrain_steps"] == 0


def test_cdeq_mnist_is_the_papers_recipe_for_each_of_its_models():
    """Dense network, Adam at 1e-3 throughout, batch 32, 25 epochs, raw pixels, weight .01 where there is a start."""
    solves = set()
    for model in (None, "cdeq", "skip_cdeq", "skip_reg_cdeq", "neural_ode"):
        words = ["experiment=cdeq_mnist", *([f"model={model}"] if model else [])]
        job = compose(*words)
        init, _, stop, adjoint, penalty = TABLE[model or "cdeq"]
        picked = tuple(job.choices[group] for group in ("model", "network", "dataset", "init", "stop", "adjoint"))
        assert picked == (model or "cdeq", "dense", "mnist", init, stop, adjoint)
        solves.add(job.choices["solver"])
        recipe, data = job.config["recipe"], job.config["dataset"]
        assert [recipe[k] for k in ("epochs", "batch", "optimizer", "lr", "weight_decay", "schedule", "max_steps",
                                    "pretrain_steps")] == [25, 32, "adam", 1e-3, 0.0, "constant", None, 0]  # fmt: skip
        assert (data["name"], data["mean"], data["std"], data["flip"], data["pad"]) == ("mnist", [0.0], [1.0], 0, 0)
        assert job.config["penalty"] == ({"skip": {"_target_": "implicit_bench.models.Skip", "weight": 0.01}}
                                         if penalty else {})  # fmt: skip
        count = sum(config.build(job.config).model.parameter_counts().values())
        assert count == (151_050 if model == "skip_cdeq" else 134_538)
    assert len(solves) == 1  # a claim about models, not solvers
    job = compose("experiment=cdeq_mnist", "length=smoke", "recipe.lr=1e-2", "network=mdeq_small", "model=skip_deq",
                  "dataset=digits", "protocol.skip_weight=5")  # fmt: skip
    assert (job.config["recipe"]["max_steps"], job.config["recipe"]["lr"]) == (100, 1e-2)
    assert (job.choices["network"], job.choices["dataset"]) == ("mdeq_small", "digits")
    assert job.config["penalty"]["skip"]["weight"] == 5
    assert compose("experiment=cdeq_mnist", "model=skip_deq", "penalty.skip.weight=2").config["penalty"]["skip"] == {
        "_target_": "implicit_bench.models.Skip", "weight": 2}  # fmt: skip


CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}  # cdeq.md, 3.1
EXPERIMENTS = {  # the first paper's code (3.1, of its digest): network, data set, recipe, presentation, images, steps
    "cdeq_cifar10_small": (
        "mdeq_small", "cifar10",
        {"batch": 128, "eval_batch": 128, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 2.5e-5,
         "constant_decay": True, "schedule": "cosine", "lr_min": 1e-5, "clip": None},
        {**CIFAR, "flip": 0.0, "pad": 0, "zoom": 0}, 50_000, 20_000),
    "cdeq_cifar10_large": (
        "mdeq_large", "cifar10",
        {"batch": 128, "eval_batch": 128, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0,
         "constant_decay": False, "schedule": "cosine", "lr_min": 1e-5, "clip": None},
        {**CIFAR, "flip": 0.5, "pad": 0, "zoom": 42}, 50_000, 90_000),
    "cdeq_imagenet_small": (
        "mdeq_imagenet", "imagenet",
        {"batch": 64, "eval_batch": 64, "optimizer": "sgd", "momentum": 0.9, "nesterov": True, "lr": 0.05,
         "weight_decay": 1e-6, "constant_decay": False, "schedule": "step",
         "milestones": [100_000, 150_000, 250_000], "gamma": 0.1},
        {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "flip": 0.5, "size": 224, "crop": "squash",
         "resize": 256}, 1_281_167, 500_000),
    "mdeq_fashion": (  # 3.3, version 1; its length is our own
        "mdeq_mnist", "fashion_mnist",
        {"epochs": 3, "epoch_images": 20_000, "batch": 64, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 2.5e-6,
         "schedule": "cosine", "lr_min": 1e-6},
        {"flip": 0.0, "pad": 0, "zoom": 0}, 60_000, 3 * (20_000 // 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_of_the_first_paper_has_its_numbers(name):
    network, dataset, recipe, presented, images, steps = EXPERIMENTS[name]
    for model in (None, "deq", "skip_reg_cdeq", "neural_ode"):
        job = compose(f"experiment={name}", *([f"model={model}"] if model else []))
        init, _, stop, adjoint, penalty = TABLE[model or "cdeq"]
        picked = tuple(job.choices[group] for group in ("model", "network", "dataset", "init", "stop", "adjoint"))
        assert picked == (model or "cdeq", network, dataset, init, stop, adjoint)
        assert recipe.items() <= job.config["recipe"].items()
        assert presented.items() <= job.config["dataset"].items()
        weight = {"mdeq_fashion": 1.0}.get(name, 0.01)  # 1., 3.3
        assert [p["weight"] for p in job.config["penalty"].values()] == [weight] * len(penalty)
    made = config.make(job.config["recipe"], "recipe")
    for val_size in (job.config["dataset"]["val_size"], 0):  # under sound, and as the paper
        assert made.total_steps(images - val_size) == steps
    smoke = compose(f"experiment={name}", "length=smoke").config["recipe"]
    assert config.make(smoke, "recipe").total_steps(images) == {"cdeq_cifar10_small": 450}.get(name, 100)
    assert smoke["pretrain_steps"] == {"cdeq_cifar10_small": 440}.get(name, 0)
    short = config.make(compose(f"experiment={name}", "length=short").config["recipe"], "recipe")
    assert short.total_steps(images) == 3 * short.steps_an_epoch(images) < 70_000


def test_every_experiment_of_the_first_paper_is_looked_at():
    assert {file for file in files("experiment") if file.startswith(("cdeq_", "mdeq_"))} == {*EXPERIMENTS, "cdeq_mnist"}


def test_a_file_of_ones_own_cannot_hide_behind_one_of_ours(tmp_path, capsys):
    (tmp_path / "length").mkdir()
    path = tmp_path / "length" / "short.yaml"
    path.write_text("# @package _global_\nrecipe: {epochs: 2}\n")
    sentence = f"implicit-bench: {path} has the name of one of implicit-bench's own; give it another\n"
    for words in (["length=short"], ["-m", "seed=0,1"], ["--cfg", "job"]):
        assert main(["train", "--config-dir", str(tmp_path), *words]) == 2
        assert capsys.readouterr().err == sentence
    path.rename(path.with_name("shorter.yaml"))
    assert main(["train", "--cfg", "job", "--config-dir", str(tmp_path), "length=shorter"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["recipe"]["epochs"] == 2


# ------------------------------------------------------------------------------------------------------------ sweeps


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["model=a,b", "seed=0,1"], [["model=a", "seed=0"], ["model=a", "seed=1"],
                                     ["model=b", "seed=0"], ["model=b", "seed=1"]]),
        (["seed=range(0,6,2)", "x=1"], [["seed=0", "x=1"], ["seed=2", "x=1"], ["seed=4", "x=1"]]),
        (["model=choice(a,b)"], [["model=a"], ["model=b"]]),
        (["model=glob(skip_reg*)"], [["model=skip_reg_cdeq"], ["model=skip_reg_deq"]]),
        (["penalty=[skip],[none]"], [["penalty=[skip]"], ["penalty=[none]"]]),
        (["recipe.milestones=[1,2]"], [["recipe.milestones=[1,2]"]]),
        (["logger.group='a,b'"], [["logger.group='a,b'"]]),
        (["logger.group='a,b','c'"], [["logger.group='a,b'"], ["logger.group='c'"]]),
        (["+x=1,2"], [["+x=1"], ["+x=2"]]),
        ([], [[]]),
    ],
)  # fmt: skip
def test_sweeps_expand_by_hydras_grammar(words, rows):
    assert config.expand(words) == rows


def test_each_value_is_tried_once_however_large_the_product():
    few = config.each_value([f"k{i}=range(0,10)" for i in range(12)])  # 10^12 jobs
    assert len(few) == 1 + 12 * 9
    assert {word for job in few for word in job} == {f"k{i}={n}" for i in range(12) for n in range(10)}


# ---------------------------------------------------------------------------------------------------------- mistakes

MODELS = "anode, cdeq, deq, explicit, homo_ode, neural_ode, resnet, skip_cdeq, skip_deq, skip_reg_cdeq, skip_reg_deq"
WRONG = {
    # names
    "model=skip_dq": "no model 'skip_dq'; nearest: skip_deq (implicit-bench list models)",
    "model=CDEQ": "no model 'CDEQ'; nearest: cdeq (implicit-bench list models)",
    "model=xyz": f"no model 'xyz'; there are: {MODELS} (implicit-bench list models)",
    "model=null": f"no model 'null'; there are: {MODELS} (implicit-bench list models)",
    "model=[deq]": "no model '[deq]'; nearest: deq (implicit-bench list models)",
    "penalty=[skp]": "no penalty 'skp'; nearest: skip (implicit-bench list penalties)",
    "solver=midpoint": "no solver 'midpoint'; nearest: torchdiffeq/midpoint (implicit-bench list solvers)",
    "tune=mine": "no tune 'mine'",
    # keys
    "modle=deq": "no key 'modle'; nearest: model",
    "length=smoke solvr=broyden": "no key 'solvr'; nearest: solver",
    "experiment=cdeq_mnist solver.rtoll=1e-3": "no key 'solver.rtoll'; nearest: solver.rtol",
    "epochs=3": "no key 'epochs'; nearest: recipe.epochs",
    "tol=3": "no key 'tol'; nearest: stop.tol, protocol.tol",
    "stop.tool=3": "no key 'stop.tool'; nearest: stop.tol",
    "+stop.tool=3": "no key 'stop.tool'; nearest: stop.tol",
    "+sed=3": "no key 'sed'; nearest: seed",
    "+protocol.toll=3": "no key 'protocol.toll'; nearest: protocol.tol",
    "+paths.run=x": "no key 'paths.run'; nearest: paths.runs",
    "+penalty.skip.weight=1": "penalty.skip has no _target_, the class to make it from",
    "+model=deq": "model is there already; write model=deq without a plus sign",
    "~solver": "cannot leave 'solver' out; write solver=value",
    # types
    "stop.tol=abc": "stop.tol='abc' is not possible; it wants a number",
    "stop.tol=null": "stop.tol=null is not possible; it wants a number",
    "stop.tol=nan": "stop.tol=NaN is not possible; it wants a number",
    "stop.max_steps=2.5": "stop.max_steps=2.5 is not possible; it wants a whole number",
    "stop.max_steps=true": "stop.max_steps=true is not possible; it wants a whole number",
    "stop.per_sample=maybe": "stop.per_sample='maybe' is not possible; there are: true, false, auto",
    "stop.norm=relative": "stop.norm='relative' is not possible; nearest: rel",
    "gpu.threads=two": "gpu.threads='two' is not possible; it wants a whole number or null",
    "recipe.milestones=3": "recipe.milestones=3 is not possible; it wants a list in brackets, each a whole number",
    "recipe.optimizer=adamq": "recipe.optimizer='adamq' is not possible; nearest: adam",
    "seed=abc": "seed='abc' is not possible; it wants a whole number",
    "force=maybe": "force='maybe' is not possible; there are: true, false",
    "field=odd": "field='odd' is not possible; nearest: ode",
    "paths.runs=null": "paths.runs=null is not possible; it wants text",
    "allow_targets=os": "allow_targets='os' is not possible; write allow_targets=[os]",
    # values
    "stop.tol=-1": "stop.tol=-1 must be positive and finite, such as 1e-2",
    "recipe.epochs=0": "recipe.epochs=0 must be positive",
    "recipe.constant_decay=true": "recipe.constant_decay=true needs recipe.optimizer=adamw, not adam",
    "recipe.epoch_images=31": "recipe.epoch_images=31 must be at least recipe.batch=32",
    "dataset.zoom=7": "dataset.zoom=7 is smaller than the images of digits, 8 x 8; take 8 or more, or 0 for none",
    "seed=-1": "seed=-1 must be at least 0",
    f"seed={10**20}": f"seed={10**20} is too large",
    "progress.log_steps=0": "progress.log_steps=0 must be at least 1",
    "gpu.threads=0": "gpu.threads=0 must be at least 1",
    "loader.workers=-1": "loader.workers=-1 must be at least 0",
    "loader.workers=two": "loader.workers='two' is not possible; it wants a whole number or auto",
    "stop.tol=${protocol.tool}": "cannot resolve the configuration: Interpolation key 'protocol.tool' not found",
    # syntax
    "deq": "cannot read 'deq' as key=value, such as model=deq",
    "=3": "cannot read '=3' as key=value, such as model=deq",
    "model=[deq": "cannot read 'model=[deq' as key=value; a value with commas, brackets or other signs in it needs "
                  "quotes inside the shell's: \"key='a,b'\"",
    "model=deq,cdeq": "'model=deq,cdeq' names several values: add -m for one run each, or quote a comma",
    # targets
    "stop._target_=os.system": "stop._target_='os.system' is not one of implicit-bench's; to use your own package add "
                               "'allow_targets=[os]'",
    "solver._target_=implicit_bench.core.solve": "solver._target_='implicit_bench.core.solve' is not a class",
    "stop._target_=implicit_bench.core.Residul":
        "stop._target_='implicit_bench.core.Residul' is not there; nearest: Residual",
    "stop._target_=implicit_bench.cor.Residual":
        "stop._target_='implicit_bench.cor.Residual' cannot be imported: No module named 'implicit_bench.cor'",
    "stop._target_=torch.save": "stop._target_='torch.save' is not a class",
    "stop._target_=torch.Tensor": "stop._target_='torch.Tensor' is not a Module, an Optimizer or an LRScheduler",
    "allow_targets=[os] stop._target_=os.system": "stop._target_='os.system' is not a class",
    # combinations
    "solver=torchdiffeq/dopri5": "solver=torchdiffeq/dopri5 integrates to an end time and cannot stop at "
                                 "a residual; use "
                                 "solver=tsit5, or stop=end_time with a long stop.t1 such as 20",
    "field=ode": "stop=residual looks for f(z) = z, but field=ode has no equilibrium meaning; use stop=end_time or "
                 "field=equilibrium",
    "model=neural_ode adjoint=ift": "adjoint=ift needs a fixed point, which field=ode does not have; use "
                                    "adjoint=backsolve or adjoint=unroll",
    "model=neural_ode solver=anderson": "solver=anderson finds roots and has no time; use stop=residual or "
                                        "solver=tsit5",
    "adjoint=backsolve": "adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift",
    "model=resnet network.untied=3": "3 untied cells are applied once each; use solver=picard adjoint=unroll "
                                     "stop=fixed_steps stop.steps=3",
    "model=resnet solver=anderson": "10 untied cells are applied once each; use solver=picard adjoint=unroll "
                                    "stop=fixed_steps stop.steps=10",
    # flags
    "--foo": "no flag '--foo'; nearest: --info",
    "--cfg jobs": "no --cfg 'jobs'; nearest: job",
    "--config-dir": "--config-dir wants one folder, such as --config-dir my-configs",
    "--config-dir /nowhere": "no folder /nowhere for --config-dir",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "logger=none", "recipe.max_steps=1", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert err == f"implicit-bench: {WRONG[words]}\n"
    assert out == ""


def test_in_a_sweep_and_before_printing_too_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["-m", "model=deq,cdq"], ["--cfg", "job", "model=cdq"], ["-m", "model=deq", "stop.tol=1e-2,x"]):
        assert main(["train", "logger=none", "recipe.max_steps=1", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err in ("implicit-bench: no model 'cdq'; nearest: cdeq (implicit-bench list models)\n",
                       "implicit-bench: stop.tol='x' is not possible; it wants a number\n")  # fmt: skip
        assert not list(tmp_path.rglob("record.json"))
    assert main(["train", "-m", "stop.tol=interval(0,1)"]) == 2
    assert capsys.readouterr().err == ("implicit-bench: 'stop.tol=interval(0,1)' has no list of values; write them, or "
                                       "range(start,stop,step)\n")  # fmt: skip
    assert main(["train", "-m", "model=deq,cdeq", "seed=1", "model=skip_deq"]) == 2
    assert capsys.readouterr().err == ("implicit-bench: 'model=deq,cdeq' lists values of a key that is given twice; "
                                       "give it once\n")  # fmt: skip


def test_what_a_command_does_not_have(capsys):
    assert main(["data", "model=deq"]) == 2
    assert "no key 'model'; there are: dataset, " in capsys.readouterr().err
    assert main(["bench", "model=deq,cdeq", "rownds=3"]) == 2
    assert capsys.readouterr().err == "implicit-bench: no key 'rownds'; nearest: rounds\n"


@pytest.mark.parametrize("word", ["stop.tol=1", "recipe.clip=null", "recipe.clip=2", "recipe.max_steps=null",
                                  "stop.per_sample=true", "stop.per_sample=false", "gpu.threads=2", "penalty=skip",
                                  "recipe.milestones=[1,2]", "++stop.tol=1e-3", "stop={tol:0.5}"])  # fmt: skip
def test_values_that_fit(word):
    config.build(compose(word).config)


@pytest.mark.parametrize("word", ["recipe.lr=true", "recipe.nesterov=1", "recipe.epochs=2.0", "recipe.epochs=null",
                                  "recipe.epochs='3'", "recipe.milestones=[1,true]", "dataset.flip='0.5'", "seed=true",
                                  "gpu.device=0", "gpu.threads=1.5", "paths.runs=3"])  # fmt: skip
def test_values_that_do_not(word):
    with pytest.raises(schema.UsageError, match=f"^{word.partition('=')[0]}=.* is not possible; "):
        compose(word)


def test_per_sample_stopping_on_independent_samples_is_fine():
    assert config.build(compose("stop.per_sample=true").config).model.layer.reduce.per_sample
    assert not config.build(compose("stop.per_sample=false").config).model.layer.reduce.per_sample
    assert config.build(compose().config).model.layer.reduce.per_sample


# ------------------------------------------------------------------------------------------------- packages of a user

PACKAGE = """
from implicit_bench.solvers import Picard

class Half(Picard):
    def __init__(self, damping: float = 0.5, weight=None, **more):
        super().__init__(damping)

class Shy(Half):
    def __init__(self, damping: "Nowhere" = 0.5, weight=None):
        super().__init__(damping)

def make():
    return Half()
"""


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A module in the working directory, its YAML in a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "my_solvers.py").write_text(PACKAGE)
    (tmp_path / "conf" / "solver").mkdir(parents=True)
    (tmp_path / "conf" / "solver" / "half.yaml").write_text("# mine\n_target_: my_solvers.Half\nweight: [3, x]\n")
    yield ["train", "--config-dir", "conf", "solver=half", *jobs.words(tmp_path, "recipe.max_steps=2")]
    sys.modules.pop("my_solvers", None)


def test_a_class_of_ones_own_from_the_working_directory(ours, tmp_path, capsys):
    assert main([*ours, "allow_targets=[my_solvers]", "+solver.damping=0.75", "+solver.depth=3"]) == 0
    (path,) = tmp_path.glob("runs/*/config.yaml")
    solver = yaml.safe_load(path.read_text())["solver"]
    assert solver == {"_target_": "my_solvers.Half", "weight": [3, "x"], "damping": 0.75, "depth": 3}
    assert "z0 = zero → half to residual" in capsys.readouterr().out
    assert main([*ours, "allow_targets=[my_solvers]", "solver._target_=my_solvers.Shy"]) == 0


def test_a_run_is_another_once_the_class_of_ones_own_is_edited(ours, tmp_path, capsys):
    words = [*ours, "allow_targets=[my_solvers]"]
    assert main(words) == main(words) == 0
    assert len(list(tmp_path.glob("runs/*"))) == 1
    assert "is done" in capsys.readouterr().out
    (tmp_path / "my_solvers.py").write_text(PACKAGE.replace("0.5", "0.25"))
    sys.modules.pop("my_solvers")
    assert main(words) == 0
    assert len(list(tmp_path.glob("runs/*"))) == 2


def test_it_has_to_be_allowed_and_a_class_and_given_what_it_wants(ours, capsys):
    def refused(*words):
        assert main([*ours, *words]) == 2
        return capsys.readouterr().err

    assert refused() == ("implicit-bench: solver._target_='my_solvers.Half' is not one of implicit-bench's; to use "
                         "your own package add 'allow_targets=[my_solvers]'\n")  # fmt: skip
    assert "my_solvers" not in sys.modules  # looked at by name alone
    assert refused("allow_targets=[my]").startswith("implicit-bench: solver._target_='my_solvers.Half' is not one of")
    assert refused("allow_targets=[my_solvers]", "solver._target_=my_solvers.make").endswith("is not a class\n")
    assert refused("allow_targets=[my_solvers]", "+solver.damping=x").endswith("it wants a number\n")
    typo = refused("allow_targets=[my_solvers]", "solver._target_=my_solvrs.Half")
    assert typo.endswith("is not one of implicit-bench's; allow_targets has 'my_solvers'\n")


def test_a_module_of_ones_own_that_does_not_load_is_one_sentence(ours, tmp_path, capsys):
    (tmp_path / "my_slip.py").write_text("def f(:\n")
    assert main([*ours, "allow_targets=[my_slip]", "solver._target_=my_slip.Half"]) == 2
    assert capsys.readouterr().err == (
        "implicit-bench: solver._target_='my_slip.Half' cannot be imported: invalid syntax (my_slip.py, line 1)\n"
    )


def test_a_file_of_ones_own_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "solver").mkdir()
    (tmp_path / "solver" / "none.yaml").write_text("damping: 1\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\nrecip: {epochs: 3}\n")
    (tmp_path / "solver" / "broken.yaml").write_text("damping: [1,\nb: 2")
    for words, sentence in (("solver=none", "solver has no _target_, the class to make it from"),
                            ("solver=broken", "a file of --config-dir is no YAML: while parsing a flow sequence in"),
                            ("experiment=typo", "no key 'recip.epochs'; nearest: recipe")):  # fmt: skip
        assert main(["train", "--config-dir", str(tmp_path), words]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"implicit-bench: {sentence}")
        assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- two steps


@pytest.mark.parametrize("model", files("model"))
def test_every_model_trains_two_steps_from_the_command_line(model, tmp_path, capsys):
    assert main(["train", f"model={model}", *jobs.words(tmp_path, "recipe.max_steps=2")]) == 0
    (folder,) = tmp_path.glob(f"runs/{model}-digits-s0-*")
    rec = read_record(folder)
    assert (rec["status"], rec["steps"], rec["epochs"], rec["error"]) == ("done", 2, 1, None)
    assert 0 < rec["metrics"]["train_loss"] < 5
    assert 0 <= rec["metrics"]["test_acc"] <= 1
    assert rec["solve"]["nfe_forward"] >= 2
    assert rec["solve"]["nfe_backward"] >= 2
    assert f"run {folder.name}" in capsys.readouterr().out


def test_the_files_of_many_jobs_are_read_once_and_anew_the_next_time(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    real, read = OmegaConf.load, []
    monkeypatch.setattr(OmegaConf, "load", lambda file: read.append(file.name) or real(file))
    (tmp_path / "solver").mkdir()
    mine = tmp_path / "solver" / "mine.yaml"
    for damping in (0.5, 0.25):
        mine.write_text(f"_target_: implicit_bench.solvers.Picard\ndamping: {damping}\n")
        read.clear()
        found = config.compose_all("train", [["solver=mine", f"seed={seed}"] for seed in range(3)], [str(tmp_path)])
        assert [job.config["solver"]["damping"] for job in found] == 3 * [damping]
        assert [job.config["seed"] for job in found] == [0, 1, 2]
        assert str(mine) in read
        assert len(read) == len(set(read))
