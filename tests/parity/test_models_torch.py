"""Models and layers equal PyTorch networks that are written independently, on copied weights."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import models
from gfa_jax.models import convolution, vit

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


class ResidualBlock(torch.nn.Module):
    """The pre-activation block of kuangliu/pytorch-cifar and of yaodongyu/TRADES."""

    def __init__(self, before, after, stride, plain, scale):
        super().__init__()
        self.scale = scale
        norm = torch.nn.BatchNorm2d if plain else torch.nn.Identity
        self.norm1, self.norm2 = norm(before), norm(after)
        self.conv1 = torch.nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.conv2 = torch.nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != after:
            self.shortcut = torch.nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, inputs):
        active = torch.relu(self.norm1(inputs))
        branch = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return (inputs if self.shortcut is None else self.shortcut(active)) + self.scale * branch


class Residual(torch.nn.Module):
    """A pre-activation network with a last BatchNorm; its homogeneous form where not ``plain``."""

    def __init__(self, stem, stages, plain):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, stem, 3, padding=1, bias=False)
        scale = 1 if plain else sum(map(len, stages)) ** -0.5
        before, blocks = stem, []
        for stage, widths in enumerate(stages):
            for position, after in enumerate(widths):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(ResidualBlock(before, after, stride, plain, scale))
                before = after
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.BatchNorm2d(before) if plain else torch.nn.Identity()
        self.head = torch.nn.Linear(before, 10, bias=plain)

    def forward(self, images):
        mean, std = (
            torch.tensor(values, dtype=images.dtype)[None, :, None, None] for values in (MEAN, STD)
        )
        hidden = self.stem((images - mean) / std)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(torch.relu(self.norm(hidden)).mean(dim=(2, 3)))


RESIDUAL_STAGES = {
    "preact_resnet18": ((64, 64), (128, 128), (256, 256), (512, 512)),
    "wide_resnet28_10": ((160,) * 4, (320,) * 4, (640,) * 4),
    "wide_resnet34_10": ((160,) * 5, (320,) * 5, (640,) * 5),
}


def residual_pair(name, plain, width=1.0):
    """A model of the registry and its PyTorch twin, still without weights."""
    module = models.create(
        name, num_classes=10, homogeneous=not plain, width=width, input_mean=MEAN, input_std=STD
    )
    scaled = tuple(tuple(round(n * width) for n in stage) for stage in RESIDUAL_STAGES[name])
    stem = max(1, round((64 if name == "preact_resnet18" else 16) * width))
    with torch.device("meta"):
        return module, Residual(stem, scaled, plain)


def residual_variables(network):
    """The network's weights and statistics in the layout of ``models.resnet``."""
    params, statistics = {}, {}

    def kernel(conv):
        return {"kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0)}

    def norm(module):
        weights = {"scale": module.weight.detach().numpy(), "bias": module.bias.detach().numpy()}
        running = {"mean": module.running_mean.numpy(), "var": module.running_var.numpy()}
        # Copies, as torch updates its statistics in place.
        return {"norm": weights}, {"norm": {key: value.copy() for key, value in running.items()}}

    params["stem"] = kernel(network.stem)
    for index, block in enumerate(network.blocks):
        name = f"block_{index}"
        params[name] = {"conv_0": kernel(block.conv1), "conv_1": kernel(block.conv2)}
        if block.shortcut is not None:
            params[name]["shortcut"] = kernel(block.shortcut)
        if isinstance(block.norm1, torch.nn.BatchNorm2d):
            pairs = {"activation_0": norm(block.norm1), "activation_1": norm(block.norm2)}
            params[name] |= {part: pair[0] for part, pair in pairs.items()}
            statistics[name] = {part: pair[1] for part, pair in pairs.items()}
    if isinstance(network.norm, torch.nn.BatchNorm2d):
        params["activation"], statistics["activation"] = norm(network.norm)
    params["head"] = {"kernel": network.head.weight.detach().numpy().T}
    if network.head.bias is not None:
        params["head"]["bias"] = network.head.bias.detach().numpy()
    return {"params": params, "batch_stats": statistics} if statistics else {"params": params}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", RESIDUAL_STAGES)
def test_residual_networks_have_the_parameters_of_the_torch_network(name, plain):
    module, network = residual_pair(name, plain)
    num_torch = sum(parameter.numel() for parameter in network.parameters())
    shapes = initial_shapes(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == num_torch
    module, network = residual_pair(name, plain, width=0.05)
    copied = jax.tree.map(np.shape, residual_variables(network.to_empty(device="cpu")))
    assert copied == jax.tree.map(lambda leaf: leaf.shape, dict(initial_shapes(module)))


RESIDUAL_CASES = [("preact_resnet18", 0.125, 16), ("wide_resnet28_10", 0.025, 9)]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("name", "width", "size"), RESIDUAL_CASES)
def test_residual_logits_and_input_gradients_equal_those_of_the_torch_network(
    name, width, size, plain
):
    module, network = residual_pair(name, plain, width)
    network = randomize(network.to_empty(device="cpu").double())
    variables = residual_variables(network)
    images = np.random.default_rng(0).uniform(size=(3, 3, size, size))
    labels = np.array([3, 1, 4])

    inputs = torch.tensor(images, requires_grad=True)
    expected = network(inputs)
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels), reduction="sum").backward()

    def loss(inputs):
        logits = module.apply(variables, inputs, train=False)
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(3), labels]), logits

    # In float64, as rounding would switch some of the ReLUs of so deep a network.
    with jax.enable_x64(True):
        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            images.transpose(0, 2, 3, 1)
        )
    expected = expected.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-9 * np.abs(expected).max())
    gradient, expected = np.asarray(gradient).transpose(0, 3, 1, 2), inputs.grad.numpy()
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(gradient, expected, atol=1e-9 * np.abs(expected).max())


def test_statistics_after_a_training_batch_equal_those_of_the_torch_network():
    """PyTorch normalises by the biased variance, stores the unbiased one; flax stores the biased.

    So PyTorch's running variances take in n / (n - 1) of flax's, for the n values of a channel; in
    the last stage of this test n is 5.
    """
    module, network = residual_pair("preact_resnet18", True, 0.125)
    network = randomize(network.to_empty(device="cpu").double())
    variables = residual_variables(network)
    images = np.random.default_rng(0).uniform(size=(5, 3, 8, 8))

    counts = {}
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_hook(
                lambda part, inputs, _: counts.update({part: inputs[0][:, 0].numel()})
            )
    with torch.no_grad():
        expected = network.train()(torch.tensor(images)).numpy()
    after = residual_variables(network)["batch_stats"]
    numbers = {
        (f"block_{index}", f"activation_{side}"): counts[norm]
        for index, block in enumerate(network.blocks)
        for side, norm in enumerate((block.norm1, block.norm2))
    } | {("activation",): counts[network.norm]}

    with jax.enable_x64(True):
        logits, updated = jax.jit(
            lambda inputs: module.apply(variables, inputs, train=True, mutable="batch_stats")
        )(images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(logits, expected, atol=1e-9 * np.abs(expected).max())
    for path, number in numbers.items():
        before, torch_after, flax_after = variables["batch_stats"], after, updated["batch_stats"]
        for part in (*path, "norm"):
            before, torch_after, flax_after = before[part], torch_after[part], flax_after[part]
        np.testing.assert_allclose(flax_after["mean"], torch_after["mean"], rtol=1e-9, atol=1e-12)
        kept = 0.9 * before["var"]
        biased = (torch_after["var"] - kept) * (number - 1) / number
        np.testing.assert_allclose(flax_after["var"], kept + biased, rtol=1e-9)


class TorchViT(torch.nn.Module):
    """A pre-LayerNorm transformer of images, on PyTorch's own attention."""

    def __init__(self, module, num_places):
        super().__init__()
        features, self.patch, self.pooling = module.features, module.patch_size, module.pooling
        self.embedding = torch.nn.Conv2d(3, features, self.patch, stride=self.patch)
        self.positions = torch.nn.Parameter(torch.randn(1, num_places, features))
        self.token = torch.nn.Parameter(torch.randn(1, 1, features))
        self.blocks = torch.nn.ModuleList()
        for _ in range(module.depth):
            self.blocks.append(
                torch.nn.TransformerEncoderLayer(
                    features,
                    module.num_heads,
                    module.hidden,
                    dropout=0,
                    activation=torch.nn.GELU("tanh"),
                    layer_norm_eps=1e-6,
                    batch_first=True,
                    norm_first=True,
                )
            )
        self.norm = torch.nn.LayerNorm(features, eps=1e-6)
        self.head = torch.nn.Linear(features, module.num_classes)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5)

    def forward(self, images):
        mean, std = (
            torch.tensor(values, dtype=images.dtype)[None, :, None, None] for values in (MEAN, STD)
        )
        tokens = self.embedding((images - mean) / std).flatten(2).transpose(1, 2) + self.positions
        if self.pooling == "token":
            tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.head(tokens[:, 0] if self.pooling == "token" else tokens.mean(dim=1))


def vit_variables(network, module):
    """The network's weights in the layout of ``models.vit``."""
    features, num_heads = module.features, module.num_heads

    def array(parameter):
        return parameter.detach().numpy()

    def norm(layer):
        return {"scale": array(layer.weight), "bias": array(layer.bias)}

    def dense(layer):
        return {"kernel": array(layer.weight).T, "bias": array(layer.bias)}

    kernel = array(network.embedding.weight).transpose(2, 3, 1, 0).reshape(-1, features)
    params = {
        "embedding": {"kernel": kernel, "bias": array(network.embedding.bias)},
        "positions": array(network.positions),
        "norm": norm(network.norm),
        "head": dense(network.head),
    }
    if module.pooling == "token":
        params["token"] = array(network.token)
    for index, block in enumerate(network.blocks):
        attention = {}
        weights = np.split(array(block.self_attn.in_proj_weight), 3)
        biases = np.split(array(block.self_attn.in_proj_bias), 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            attention[part] = {
                "kernel": weight.T.reshape(features, num_heads, -1),
                "bias": bias.reshape(num_heads, -1),
            }
        out = dense(block.self_attn.out_proj)
        attention["out"] = {**out, "kernel": out["kernel"].reshape(num_heads, -1, features)}
        params[f"block_{index}"] = {
            "norm_0": norm(block.norm1),
            "attention": attention,
            "norm_1": norm(block.norm2),
            "dense_0": dense(block.linear1),
            "dense_1": dense(block.linear2),
        }
    return {"params": params}


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_vit_logits_and_input_gradients_equal_those_of_the_torch_network(pooling):
    torch.manual_seed(0)
    module = vit.ViT(
        10, 12, depth=2, num_heads=3, hidden=20, pooling=pooling, input_mean=MEAN, input_std=STD
    )
    network = TorchViT(module, num_places=6).double()
    variables = vit_variables(network, module)
    images = np.random.default_rng(0).uniform(size=(3, 3, 8, 12))

    inputs = torch.tensor(images, requires_grad=True)
    expected = network(inputs)
    expected.sin().sum().backward()

    def target(inputs):
        logits = module.apply(variables, inputs)
        return jnp.sum(jnp.sin(logits)), logits

    with jax.enable_x64(True):
        (_, logits), gradient = jax.jit(jax.value_and_grad(target, has_aux=True))(
            images.transpose(0, 2, 3, 1)
        )
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-8, atol=1e-9)
    gradient, expected = np.asarray(gradient).transpose(0, 3, 1, 2), inputs.grad.numpy()
    np.testing.assert_allclose(gradient, expected, atol=1e-8 * np.abs(expected).max())


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
        conv_general_dilated=convolution.conv_general_dilated,
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
