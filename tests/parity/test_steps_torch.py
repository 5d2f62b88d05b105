"""Training steps in PyTorch, which the benchmark times beside ours, do the same work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch: make test-parity")

from benchmarks import networks  # noqa: E402
from benchmarks.peers import steps as torch_steps  # noqa: E402
from gfa_jax import models, objectives, taps  # noqa: E402

pytestmark = pytest.mark.parity

LAYERS = ("normalize", "block_[0-9]+")


@pytest.fixture
def network(key):
    module = models.create("cnn4", num_classes=5, input_mean=(0.4,) * 2, input_std=(0.3,) * 2)
    return networks.Network(module, module.init(key, jnp.zeros((1, 8, 8, 2)))["params"])


@pytest.mark.parametrize("step", ["standard", "gfa"])
def test_losses_and_their_gradients_are_the_same(step, network, key):
    images = np.asarray(jax.random.uniform(key, (6, 8, 8, 2)))
    labels = np.arange(6) % 5
    objective = (
        objectives.cross_entropy()
        if step == "standard"
        else objectives.gfa(1.0, layer_norms={"normalize": "linf"}, target="log_odds")
    )
    model = taps.linen_model(network.module, layers=LAYERS if step == "gfa" else ())
    batch = {"inputs": jnp.asarray(images), "labels": jnp.asarray(labels)}
    (loss, _), grads = jax.value_and_grad(functools.partial(objective, model), has_aux=True)(
        network.params, batch, key
    )

    peer = networks.to_torch(network).requires_grad_(True)
    theirs = torch_steps.loss_fn(step, 0.1)(
        peer, torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels)
    )
    theirs.backward()
    assert theirs.item() == pytest.approx(float(loss), rel=1e-5)
    found = [parameter.grad.numpy() for parameter in peer.parameters()]
    ours = [
        np.asarray(grads[name][next(iter(grads[name]))]["kernel"]).transpose(3, 2, 0, 1)
        for name in sorted(grads)
        if name != "head"
    ] + [np.asarray(grads["head"]["kernel"]).T]
    for one, other in zip(found, ours, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


def test_adversarial_examples_stay_inside_and_raise_the_loss(network, key):
    images = torch.tensor(np.asarray(jax.random.uniform(key, (6, 2, 8, 8))))
    labels = torch.arange(6) % 5
    peer = networks.to_torch(network).requires_grad_(True)
    seen = []
    peer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    attacked = torch_steps.loss_fn("pgd_at", 0.1)(peer, images, labels)
    assert len(seen) == 11
    assert (seen[-1] - images).abs().max() <= 0.1 + 1e-6
    assert seen[-1].min() >= 0
    assert seen[-1].max() <= 1
    assert attacked > torch_steps.standard(peer, images, labels)
    with pytest.raises(ValueError, match="steps='trades' has no PyTorch form"):
        torch_steps.loss_fn("trades", 0.1)
