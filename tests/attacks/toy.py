"""The golden model: six examples and five classes of trigonometric numbers, no generator.

Values that official implementations give for it are in the tests that use it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks


def _toy():
    size, hidden, classes, batch = 48, 16, 5, 6
    i, j, k, n = np.arange(size), np.arange(hidden), np.arange(classes), np.arange(batch * size)
    first = np.sin(0.7 * i * (j[:, None] + 1) + 1.3 * j[:, None] + 0.1) * 4 / np.sqrt(size)
    second = 2 * np.cos(1.1 * j * (k[:, None] + 1) + 0.5 * k[:, None])
    inputs = (0.5 + 0.5 * np.sin(0.37 * (n + 1) ** 1.5)).reshape(batch, size)
    return first.T.astype(np.float32), second.T.astype(np.float32), inputs.astype(np.float32)


FIRST, SECOND, INPUTS = _toy()
LABELS = np.array([0, 0, 0, 4, 0, 4], np.int32)
KEYS = jax.jit(attacks.example_keys)(jax.random.key(0), np.arange(len(INPUTS)))

# Norms of the adversarial perturbations that the official FAB attack finds (30 iterations, any
# wrong class, from the clean input).
REACHABLE = {
    "linf": np.array([0.040177, 0.03736, 0.075013, 0.017266, 0.103648, 0.016401]),
    "l2": np.array([0.203337, 0.181042, 0.339342, 0.099051, 0.408586, 0.093813]),
    "l1": np.array([0.64966, 0.489731, 0.771574, 0.381769, 1.166413, 0.264687]),
}


def logits_fn(inputs):
    return jnp.tanh(inputs.reshape(len(inputs), -1) @ FIRST) @ SECOND
