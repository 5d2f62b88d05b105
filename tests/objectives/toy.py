"""Model functions small enough to compute by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NUM_CLASSES = 3
NUM_FEATURES = 4


def linear(params, taps, inputs, *, train):
    """Logits ``x W + b``; the state holds the mean of the last inputs in training mode."""
    state = {"mean": jnp.mean(inputs)} if train else {"mean": jnp.array(-1.0, inputs.dtype)}
    return (inputs @ params["kernel"] + params["bias"][None], {}), state


def smooth(params, taps, inputs, *, train):
    """Two layers with a smooth activation, and a feature to align: the input."""
    shifted = inputs + taps.get("input", 0)
    hidden = jax.nn.softplus(shifted @ params["first"] + params["bias"][None])
    return (hidden @ params["second"], {"input": shifted}), {}


def linear_params(key, dtype=jnp.float64):
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.normal(kernel_key, (NUM_FEATURES, NUM_CLASSES), dtype),
        "bias": jax.random.normal(bias_key, (NUM_CLASSES,), dtype),
    }


def smooth_params(key, dtype=jnp.float64):
    first, second, bias = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(first, (NUM_FEATURES, 5), dtype),
        "second": jax.random.normal(second, (5, NUM_CLASSES), dtype),
        "bias": jax.random.normal(bias, (5,), dtype),
    }


def batch(key, dtype=jnp.float64, size=6):
    """Inputs well inside of [0, 1]."""
    inputs = jax.random.uniform(key, (size, NUM_FEATURES), dtype, 0.3, 0.7)
    return {"inputs": inputs, "labels": jnp.arange(size) % NUM_CLASSES}


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def linear_logits(params, inputs):
    return np.asarray(inputs) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def linear_gradient(params, inputs, labels):
    """The input gradient of each example's cross-entropy, by hand."""
    errors = softmax(linear_logits(params, inputs)) - np.eye(NUM_CLASSES)[np.asarray(labels)]
    return errors @ np.asarray(params["kernel"]).T


def log_probs_at(probs, labels):
    return np.log(probs[np.arange(len(probs)), np.asarray(labels)])


def value_and_grad(objective, model):
    return jax.jit(jax.value_and_grad(functools.partial(objective, model), has_aux=True))
