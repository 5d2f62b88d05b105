"""Short trainings on digits for tests: a recipe's own steps, without checkpoints and logs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data
from gfa_jax.training import layout, recipe

NUM_STEPS = 500


@functools.cache
def images(split):
    """Returns float images and labels; ``test`` is the 400 test images."""
    examples = data.load("digits", split, num_validation=300)
    return np.asarray(data.to_float(examples.images)), examples.labels


def train(config, num_steps=NUM_STEPS):
    """Returns the recipe and its parameters after a training of so many steps."""
    config = dataclasses.replace(config, train_steps=num_steps)
    examples = data.load("digits", "train", num_validation=300)
    built = recipe.build(config, num_classes=10, image_shape=(8, 8, 1))
    train_step = built.train_step(layout.data_mesh(jax.devices()[:1]))
    key = jax.random.key(config.seed)
    current = built.init(key)
    for number in range(num_steps):
        batch = data.train_batch(examples, config.batch_size, seed=config.seed, step=number)
        batch = {name: jnp.asarray(batch[name]) for name in ("inputs", "labels")}
        current, metrics = train_step(current, batch, key)
    assert np.isfinite(metrics["loss"])
    return built, current.params


@functools.cache
def _attack(name, threat, apply):
    attack = attacks.create(name, threat, num_steps=20)
    keys = attacks.example_keys(jax.random.key(0), jnp.arange(400))

    @jax.jit
    def resists(params, inputs, labels):
        result = attack(lambda x: apply({"params": params}, x, train=False), keys, inputs, labels)
        return ~result.success

    return resists


@functools.cache
def _applied(module):
    return module.apply


def accuracies(built, params):
    """Returns clean accuracy, and the worst case over PGD on cross-entropy and on the margin."""
    inputs, labels = images("test")
    apply = _applied(built.module)
    right = np.argmax(apply({"params": params}, inputs, train=False), axis=1) == labels
    resists = [
        np.asarray(_attack(name, built.threat, apply)(params, inputs, labels))
        for name in ("pgd", "pgd-margin")
    ]
    return right.mean(), (right & resists[0] & resists[1]).mean()
