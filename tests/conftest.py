"""A strict environment: several CPU devices, no silent rank promotion, no GPU, fast compilation."""

import os
from collections.abc import Iterator

import jaxlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile thousands of small programs once each: optimising them costs more than it saves, and
# XLA's older code for fusions, which later versions have no more, compiles in half the time.
# An XLA_FLAGS of the caller's own, even an empty one, counts instead: tests that train need it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if jaxlib.__version__.startswith("0.10.") else ""),
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    """A fixed PRNG key."""
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Compiled programs of one module are no use to the next, and hundreds of them fill memory."""
    yield
    jax.clear_caches()
