"""Golden forwards: logits in float64, for weights and images made by a formula, so that no generator matters.

A change of what a network computes, meant or not, shows here; raise record.NUMERICS with it.
"""

from pathlib import Path

import pytest
import torch
from problems import close, f64

from implicit_bench import config
from implicit_bench.adjoints import Unroll
from implicit_bench.core import FixedSteps
from implicit_bench.models import Classifier, ImplicitLayer, Stem, StemZeros, Zero
from implicit_bench.schema import locate
from implicit_bench.solvers import Picard

CONFIGS = Path(__file__).parents[2] / "configs" / "network"
GOLDEN = {
    "dense":
        [0.5349467213, 0.8964298345, 1.204381836, 1.135178581, 0.5336154687, 0.8978552363, 1.205529028, 1.133605043],
    "mdeq_mnist":
        [1.937436055, -2.409069863, 0.8406832862, 4.093402812, 1.765417195, -2.527123887, 1.059407523, 4.12492359],
    "mdeq_small":
        [1.841151937, -2.50187142, 0.97368222, 4.13358638, 1.900779148, -2.456948249, 0.8962821828, 4.119284765],
    "mdeq_small norm=group":
        [0.3724232385, -1.598206781, 2.084896654, 2.790295143, 0.373283444, -1.598997664, 2.084349343, 2.791302557],
    "mdeq_small residual=mdeq":
        [1.935985509, -2.467902486, 0.8654096152, 4.142453028, 1.807545959, -2.506441292, 1.009096163, 4.124145534],
    "mdeq_large":
        [4.127553843, -4.153048921, -7.248976786, -2.187510323, 4.140389244, -4.155257803, -7.264031963, -2.200430875],
    "mdeq_imagenet":
        [4.269558203, -4.362140186, -7.701047916, -2.58990331, 4.307563938, -4.439158642, -7.817858995, -2.632406042],
    "homo_conv":
        [-3.100514653, 5.293869626, -4.459503182, 6.829137456, -3.100469226, 5.293812197, -4.459434708, 6.829059079],
    "homo_conv inject=state":
        [-1.370115679, 4.062000769, -2.407453779, 5.573737755, -1.370115742, 4.06200092, -2.407454015, 5.573738073],
    "node_conv inject=start":
        [1.342092391, 1.140316431, 1.400480295, 0.9850475295, 1.342083939, 1.140346082, 1.400433846, 0.9851038834],
    "node_conv inject=state":
        [1.233518319, 1.320218267, 1.225130697, 1.065159974, 1.233518437, 1.320218314, 1.225130589, 1.065159903],
}  # fmt: skip


def logits(name, shape, **chosen):
    """Of two images after three applications of the cell, in evaluation mode: the first four."""
    node = config.alone(CONFIGS / f"{name}.yaml") | chosen
    net = locate(node.pop("_target_"), "network")(shape=shape, classes=10, **node).double().eval()
    init = {"start": Stem, "state": StemZeros}.get(chosen.get("inject"), Zero)(net)
    model = Classifier(net, ImplicitLayer(net.cell, init, Picard(), FixedSteps(3), Unroll()))
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            wave = torch.sin(torch.arange(p.numel()).double() * 0.7 + k).view_as(p)
            p.copy_(wave * (2 / max(1, p[0].numel())) ** 0.5 if p.dim() > 1 else 1 + 0.3 * wave)
        n = 2 * shape[0] * shape[1] * shape[2]
        images = torch.cos(torch.arange(n).double() * 0.013).view(2, *shape)
        return model(images).logits[:, :4].flatten()


@pytest.mark.parametrize("case", GOLDEN)
def test_a_network_computes_what_it_did(case):
    name, *chosen = case.split()
    side = 32 if name in ("mdeq_large", "mdeq_imagenet") else 16
    shape = (1, 28, 28) if name in ("dense", "mdeq_mnist") else (3, side, side)
    close(logits(name, shape, **dict(word.split("=") for word in chosen)), f64(GOLDEN[case]), 1e-8)


@pytest.mark.parametrize(("name", "model"), [
    ("mdeq_mnist", "skip_cdeq"), ("homo_conv", "homo_ode"), ("node_conv", "anode"),
])  # fmt: skip
def test_a_seed_decides_every_bit(name, model):
    """Weights, masks, solve and gradient of a training step, twice from the same words."""
    job, grads = config.compose("train", [f"model={model}", f"network={name}", "dataset=mnist", "seed=3"]), []
    for _ in range(2):
        parts = config.build(job.config)
        out = parts.model(torch.cos(torch.arange(2 * 784) * 0.1).view(2, 1, 28, 28))
        (out.logits.square().sum() + out.layer.start.sum()).backward()
        grads.append([out.logits.detach(), *(p.grad for p in parts.model.parameters())])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads))
