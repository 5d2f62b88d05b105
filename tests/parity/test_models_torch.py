"""Models and layers equal PyTorch networks that are written independently, on copied weights."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import models
from gfa_jax.models import layers

torch = pytest.importorskip("torch", reason="compares with PyTorch: make test-parity")
pytestmark = pytest.mark.parity

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


class Cifar(torch.nn.Module):
    """The seven-layer network ``cifar`` of MTandHJ/PyTorch-Robust."""

    def __init__(self, plain):
        super().__init__()
        widths = (3, 64, 64, 128, 128)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(before, after, 3, bias=plain)
            for before, after in itertools.pairwise(widths)
        )
        self.dense = torch.nn.ModuleList(
            [
                torch.nn.Linear(128 * 5 * 5, 256, bias=plain),
                torch.nn.Linear(256, 256, bias=plain),
            ]
        )
        self.head = torch.nn.Linear(256, 10, bias=plain)
        if plain:
            self.conv_norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(n) for n in widths[1:])
            self.dense_norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(256) for _ in range(2))
        else:
            self.conv_norms = [torch.nn.Identity()] * 4
            self.dense_norms = [torch.nn.Identity()] * 2

    def forward(self, images):
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
        hidden = (images - mean) / std
        for index, (conv, norm) in enumerate(zip(self.convs, self.conv_norms, strict=True)):
            hidden = torch.relu(norm(conv(hidden)))
            if index in (1, 3):
                hidden = torch.nn.functional.max_pool2d(hidden, 2)
        hidden = hidden.flatten(1)
        for dense, norm in zip(self.dense, self.dense_norms, strict=True):
            hidden = torch.relu(norm(dense(hidden)))
        return self.head(hidden)


def randomize(network):
    """Draws every parameter and statistic, so that no default can hide a missing copy."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
    return network.eval()


def flax_variables(network):
    """The network's weights in the layout of ``cnn7``."""
    params, statistics = {}, {}

    def layer(name, kind, module, kernel, norm=None):
        weights = {"kernel": kernel.detach().numpy()}
        if module.bias is not None:
            weights["bias"] = module.bias.detach().numpy()
        params[name] = {kind: weights} if kind else weights
        if isinstance(norm, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            params[name]["norm"] = {
                "scale": norm.weight.detach().numpy(),
                "bias": norm.bias.detach().numpy(),
            }
            statistics[name] = {
                "norm": {"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy()}
            }

    for index, (conv, norm) in enumerate(zip(network.convs, network.conv_norms, strict=True)):
        layer(f"block_{index}", "conv", conv, conv.weight.permute(2, 3, 1, 0), norm)
    for index, (dense, norm) in enumerate(zip(network.dense, network.dense_norms, strict=True)):
        kernel = dense.weight.T
        if index == 0:  # torch flattens channels first, flax channels last
            kernel = kernel.reshape(128, 5, 5, 256).permute(1, 2, 0, 3).reshape(-1, 256)
        layer(f"dense_{index}", "dense", dense, kernel, norm)
    layer("head", None, network.head, network.head.weight.T)
    variables = {"params": params}
    if statistics:
        variables["batch_stats"] = statistics
    return variables


def cnn7(homogeneous):
    return models.create(
        "cnn7", num_classes=10, homogeneous=homogeneous, input_mean=MEAN, input_std=STD
    )


def initial_shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(("homogeneous", "expected"), [(False, 1_149_770), (True, 1_147_072)])
def test_cnn7_has_the_parameters_of_the_torch_network(homogeneous, expected):
    network = Cifar(plain=not homogeneous)
    num_torch = sum(parameter.numel() for parameter in network.parameters())
    shapes = initial_shapes(cnn7(homogeneous))
    num_flax = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert num_flax == num_torch == expected
    copied = jax.tree.map(np.shape, flax_variables(network))
    assert copied == jax.tree.map(lambda leaf: leaf.shape, dict(shapes))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_cnn7_logits_and_input_gradients_equal_those_of_the_torch_network(homogeneous):
    network = randomize(Cifar(plain=not homogeneous))
    module, variables = cnn7(homogeneous), flax_variables(network)
    images = np.random.default_rng(0).uniform(size=(4, 3, 32, 32)).astype(np.float32)
    labels = np.array([3, 1, 4, 1])

    inputs = torch.tensor(images, requires_grad=True)
    expected = network(inputs)
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels), reduction="sum").backward()

    @jax.jit
    def logits_and_gradient(inputs):
        def loss(inputs):
            logits = module.apply(variables, inputs, train=False)
            log_probabilities = jax.nn.log_softmax(logits)
            return -jnp.sum(log_probabilities[jnp.arange(4), labels]), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(inputs)
        return logits, gradient

    logits, gradient = logits_and_gradient(images.transpose(0, 2, 3, 1))
    scale = float(expected.detach().abs().max())
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4 * max(scale, 1))
    gradient = np.asarray(gradient).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), atol=1e-4 * np.abs(gradient).max())


# More and fewer output positions than where the weight gradient changes its algorithm.
@pytest.mark.parametrize("size", [7, 16])
@pytest.mark.parametrize(
    ("kernel", "padding", "strides"),
    [
        ((3, 3), "SAME", 1),
        ((3, 3), "VALID", 1),
        ((1, 1), "VALID", 1),
        ((5, 3), ((2, 1), (0, 1)), 1),
        ((3, 3), "VALID", 2),
    ],
)
def test_convolution_and_its_derivatives_equal_torch(size, kernel, padding, strides):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    weights = (0.3 * rng.normal(size=(*kernel, 3, 4))).astype(np.float32)
    module = nn.Conv(
        4,
        kernel,
        strides=strides,
        padding=padding,
        use_bias=False,
        conv_general_dilated=layers.conv_general_dilated,
    )

    def value(inputs, weights):
        return jnp.sum(jnp.sin(module.apply({"params": {"kernel": weights}}, inputs)))

    def penalty(inputs, weights):
        """A function of first derivatives: its gradient needs the second ones."""
        gradients = jax.grad(value, argnums=(0, 1))(inputs, weights)
        return sum(jnp.sum(jnp.cos(gradient)) for gradient in gradients)

    first = jax.jit(jax.grad(value, argnums=(0, 1)))(inputs, weights)
    second = jax.jit(jax.grad(penalty, argnums=(0, 1)))(inputs, weights)

    torch_inputs = torch.tensor(inputs.transpose(0, 3, 1, 2), requires_grad=True)
    torch_weights = torch.tensor(weights.transpose(3, 2, 0, 1), requires_grad=True)
    if padding == "SAME":
        padding = ((1, 1), (1, 1))
    elif padding == "VALID":
        padding = ((0, 0), (0, 0))
    (top, bottom), (left, right) = padding
    padded = torch.nn.functional.pad(torch_inputs, (left, right, top, bottom))
    outputs = torch.nn.functional.conv2d(padded, torch_weights, stride=strides)
    torch_first = torch.autograd.grad(
        outputs.sin().sum(), (torch_inputs, torch_weights), create_graph=True
    )
    torch_second = torch.autograd.grad(
        sum(gradient.cos().sum() for gradient in torch_first), (torch_inputs, torch_weights)
    )

    convolved = module.apply({"params": {"kernel": weights}}, inputs)
    np.testing.assert_allclose(
        convolved, outputs.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5
    )
    for ours, theirs in ((first, torch_first), (second, torch_second)):
        layouts = ((0, 2, 3, 1), (2, 3, 1, 0))
        for derivative, reference, layout in zip(ours, theirs, layouts, strict=True):
            reference = reference.detach().numpy().transpose(layout)
            bound = 2e-4 * max(np.abs(reference).max(), 1)
            np.testing.assert_allclose(derivative, reference, atol=bound)
