"""FGSM and PGD equal PyTorch peers on one network: torchattacks, and the algorithms as published.

All start at the clean input, so nothing is random. Where a gradient coordinate is zero up to
rounding, its sign differs between the frameworks: all but a few pixels are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks

torch = pytest.importorskip("torch", reason="compares with PyTorch: make test-parity")
pytestmark = pytest.mark.parity

NUM_CLASSES = 7
IMAGES = np.random.default_rng(0).uniform(size=(16, 3, 12, 12)).astype(np.float32)
IMAGES[:, :, :2] = np.round(IMAGES[:, :, :2])  # some pixels at the faces of the box
SETTINGS = {
    "fgsm": {"norm": "linf", "epsilon": 8 / 255},
    "pgd": {"norm": "linf", "epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10},
    "pgd_l2": {"norm": "l2", "epsilon": 0.5, "step_size": 0.1, "num_steps": 10},
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(8, 12, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12 * 4 * 4, NUM_CLASSES),
    )
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    with torch.no_grad():  # logits of mean zero: no class is the prediction for every image
        network[-1].bias -= network(torch.tensor(IMAGES)).mean(dim=0)
    return network.eval()


@pytest.fixture(scope="module")
def logits_fn(network):
    """The network on channels-last images, in JAX."""
    weights = {
        name: jnp.asarray(value.detach().numpy()) for name, value in network.named_parameters()
    }

    def convolve(inputs, layer, padding):
        kernel = weights[f"{layer}.weight"].transpose(2, 3, 1, 0)
        outputs = jax.lax.conv_general_dilated(
            inputs, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return outputs + weights[f"{layer}.bias"][None, None, None]

    def apply(inputs):
        hidden = jax.nn.relu(convolve(inputs, 0, "SAME"))
        hidden = hidden.reshape(-1, 6, 2, 6, 2, 8).mean(axis=(2, 4))
        hidden = jax.nn.relu(convolve(hidden, 3, "VALID"))
        flat = hidden.transpose(0, 3, 1, 2).reshape(len(hidden), -1)
        return flat @ weights["6.weight"].T + weights["6.bias"][None]

    return jax.jit(apply)


@pytest.fixture(scope="module")
def labels(network):
    with torch.no_grad():
        predicted = network(torch.tensor(IMAGES)).argmax(dim=1).numpy()
    predicted[:2] = (predicted[:2] + 1) % NUM_CLASSES  # two are misclassified
    return predicted.astype(np.int32)


class Published:
    """The algorithms from their papers, in plain PyTorch."""

    def attack(self, name, network, images, labels):
        options = SETTINGS[name]
        epsilon = options["epsilon"]
        step_size, num_steps = options.get("step_size", epsilon), options.get("num_steps", 1)
        points = images.clone()
        for _ in range(num_steps):
            points.requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(network(points), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, points)
            with torch.no_grad():
                if options["norm"] == "linf":
                    change = points + step_size * gradient.sign() - images
                    change = change.clamp(-epsilon, epsilon)
                else:
                    change = points + step_size * gradient / self.length(gradient) - images
                    change = change * (epsilon / self.length(change)).clamp(max=1)
                points = (images + change).clamp(0, 1)
        return points

    @staticmethod
    def length(vectors):
        return vectors.flatten(1).norm(dim=1)[:, None, None, None]


class Torchattacks:
    """torchattacks, which differs by a mean over the batch and a floor of 1e-10 on norms."""

    def __init__(self):
        self.library = pytest.importorskip(
            "torchattacks", reason="pip install --no-deps torchattacks==3.5.1"
        )

    def attack(self, name, network, images, labels):
        options = SETTINGS[name]
        if name == "fgsm":
            peer = self.library.FGSM(network, eps=options["epsilon"])
        else:
            peer_class = self.library.PGD if name == "pgd" else self.library.PGDL2
            peer = peer_class(
                network,
                eps=options["epsilon"],
                alpha=options["step_size"],
                steps=options["num_steps"],
                random_start=False,
            )
        return peer(images, labels)


@pytest.mark.parametrize("peer", [Published, Torchattacks])
@pytest.mark.parametrize("name", SETTINGS)
def test_adversarial_images_equal_those_of_the_peer(name, peer, network, logits_fn, labels):
    expected = peer().attack(name, network, torch.tensor(IMAGES), torch.tensor(labels).long())
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)

    options = dict(SETTINGS[name])
    threat = ThreatModel(options.pop("norm"), options.pop("epsilon"))
    if name == "fgsm":
        attack = attacks.fgsm(threat)
    else:
        attack = attacks.pgd(threat, random_start=False, keep="last", **options)
    clean = IMAGES.transpose(0, 2, 3, 1)
    result = jax.jit(attack, static_argnums=0)(logits_fn, None, clean, labels)

    difference = np.abs(np.asarray(result.adv_inputs) - expected)
    assert np.mean(difference > 1e-5) < 0.002
    assert np.abs(expected - clean).max() > 0.9 * min(threat.epsilon, 0.05)  # the peer moved
    with torch.no_grad():
        peer_logits = network(torch.tensor(expected.transpose(0, 3, 1, 2)))
    fooled = peer_logits.argmax(dim=1).numpy() != labels
    np.testing.assert_array_equal(result.success, fooled)
    assert fooled.sum() > 2
    loss = torch.nn.functional.cross_entropy(
        peer_logits, torch.tensor(labels).long(), reduction="none"
    )
    np.testing.assert_allclose(result.loss, loss.numpy(), rtol=1e-3, atol=1e-4)


def test_the_networks_agree(network, logits_fn):
    with torch.no_grad():
        expected = network(torch.tensor(IMAGES)).numpy()
    np.testing.assert_allclose(logits_fn(IMAGES.transpose(0, 2, 3, 1)), expected, atol=1e-5)
