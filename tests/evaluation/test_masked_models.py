"""Models whose gradients are masked on purpose are told from sound ones, end to end."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_gfa, digits_pgd_at, digits_standard
from gfa_jax import ThreatModel, data
from gfa_jax.evaluation import diagnostics, evaluate_model, loading
from gfa_jax.training import loop

ATTACKS = "fgsm,pgd,pgd-margin,apgd-ce,apgd-t:num_targets=3,square:num_queries=500"

pytestmark = pytest.mark.slow


def saturating():
    """GFA on the gradient of the cross-entropy itself, which is aligned best where it is zero."""
    config = digits_gfa.get_config()
    return dataclasses.replace(
        config, gfa=dataclasses.replace(config.gfa, target="cross_entropy", weight=3.0)
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a recipe once, and returns the run."""
    runs = {}

    def get(recipe):
        if recipe not in runs:
            path = tmp_path_factory.mktemp("runs") / "run"
            loop.train_and_evaluate(recipe(), path)
            runs[recipe] = loading.load_run(path, num_examples=200)
        return runs[recipe]

    return get


def diagnose(run, tmp_path, *, scale=1.0, levels=None):
    """Returns statuses by diagnostic, and whether masking is suspected.

    Args:
      run: a trained model.
      tmp_path: for the evaluation.
      scale: of its logits.
      levels: to how many levels pixels are rounded before it sees them.
    """

    def logits_fn(variables, inputs):
        if levels is not None:
            inputs = jnp.round(inputs * levels) / levels
        return scale * run.apply(*variables, {}, inputs)[0]

    results = evaluate_model(
        logits_fn,
        np.asarray(data.to_float(run.test_set.images)),
        run.test_set.labels,
        ThreatModel("linf", run.config.threat.epsilon),
        tmp_path,
        variables=(run.params, run.model_state),
        attacks=ATTACKS,
    )
    statuses = {entry["id"]: entry["status"] for entry in results["diagnostics"]}
    return statuses, diagnostics.masking_suspected(results["diagnostics"])


@pytest.mark.parametrize("recipe", [digits_standard.get_config, digits_pgd_at.get_config])
def test_sound_models_are_not_suspected(recipe, train, tmp_path):
    statuses, suspected = diagnose(train(recipe), tmp_path)
    assert not suspected, statuses


def test_logits_times_1000_are_told_by_the_choice_of_loss_and_their_size(train, tmp_path):
    statuses, _ = diagnose(train(digits_standard.get_config), tmp_path, scale=1000.0)
    for identifier in ("D10", "D11", "D23"):
        assert statuses[identifier] in ("WARN", "FAIL"), (identifier, statuses)


def test_a_quantiser_is_told_by_its_missing_gradients(train, tmp_path):
    statuses, suspected = diagnose(train(digits_standard.get_config), tmp_path, levels=16)
    assert suspected
    for identifier in ("D4", "D5", "D14", "D20"):
        assert statuses[identifier] == "FAIL", (identifier, statuses)


def test_a_saturated_alignment_is_told_by_the_choice_of_loss(train, tmp_path):
    statuses, _ = diagnose(train(saturating), tmp_path)
    assert statuses["D10"] in ("WARN", "FAIL"), statuses
