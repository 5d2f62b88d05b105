"""Tests of what the attack benchmark measures of the attacks here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measure, networks, peers, table
from gfa_jax.models.cnn import CNN


@pytest.fixture(scope="module")
def ours() -> tuple[measure.Ours, networks.Split]:
    module = CNN(stages=((4,),), num_classes=3)
    images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype(np.float32)
    params = module.init(jax.random.key(0), jnp.asarray(images))["params"]
    network = networks.Network(module, params)
    # All are classified correctly, so that all are attacked; a tiny radius leaves them so.
    labels = np.asarray(network.logits_fn(jnp.asarray(images)).argmax(1), np.int32)
    return measure.Ours(network), networks.Split(images, labels)


def test_passes_follow_from_each_other(ours) -> None:
    """What a loop of them gives is what one after another gives: the compiler leaves none out."""
    network, split = ours
    passes = measure.Passes(network.network, split.images)
    assert min(passes.seconds()) > 0
    points = split.images
    for _ in range(passes.num_passes):
        points = points + 1e-6 * network.network.logits_fn(points)[:, :1, None, None]
    looped = passes.forward_loop(split.images)
    assert np.abs(looped - split.images).max() > 1e-5
    np.testing.assert_allclose(looped, points, atol=1e-5)


def test_network_alone_is_counted_passes_at_their_cost(ours, monkeypatch) -> None:
    network, split = ours
    monkeypatch.setattr(measure.Passes, "seconds", lambda self: (10.0, 13.0))
    task = peers.Task(
        norm="linf",
        epsilon=1e-6,
        num_steps=4,
        step_size=1e-6,
        num_targets=2,
        num_queries=7,
        num_searches=1,
        num_classes=3,
        seed=0,
    )
    found = network.run("pgd", task, split)
    # Four gradients, a pass that judges the last point, and one that judges the clean image.
    assert found.network_seconds == pytest.approx(len(split.labels) * (4 * 13.0 + 2 * 10.0))


def test_table_scales_the_network_alone_to_a_thousand_images() -> None:
    one = {
        "attack": "pgd",
        "norm": "linf",
        "library": measure.OURS,
        "num_images": 500,
        "seconds": 2.0,
        "compile_seconds": 0.5,
        "network_seconds": 0.75,
        "load": 0.0,
        "robust_accuracy": 0.5,
    }
    peer = one | {"library": "peer", "network_seconds": None, "compile_seconds": 0.0}
    page = table.render(
        {
            "environment": {
                "device": "CPU",
                "threads": 2,
                "precision": "float32",
                "started": "2026-11-27",
                "versions": {"jax": "0"},
                "clean_accuracy": 0.9,
            },
            "settings": {"model": "small", "data": "digits", "epochs": 1, "epsilons": {"linf": 1}},
            "measurements": [one, peer],
            "notes": {},
            "skipped": {},
        }
    )
    assert "| pgd | gfa_jax | 500 | 1 | 4 | 1.5 | 0.5 | 50.0% robust |" in page
    assert "| pgd | peer | 500 | 1 | 4 |  |  | 50.0% robust |" in page
