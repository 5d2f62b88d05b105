"""Measured programs are those that training and attacks run, and bad ones are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from gfa_jax import ThreatModel
from gfa_jax.benchmark import programs
from gfa_jax.config import AttackConfig

TASK = programs.Task("cnn4", batch_size=8, image_shape=(8, 8, 1), num_classes=4)


def test_every_step_is_a_recipe_and_fields_can_differ():
    for step in programs.STEPS:
        config = programs.step_config(step, TASK)
        assert (config.batch_size, config.model.name, config.model.homogeneous) == (8, "cnn4", True)
    config = programs.step_config("pgd_at:attack.num_steps=3:data.flip=false", TASK)
    assert config.attack == AttackConfig(name="pgd", num_steps=3)
    assert not config.data.flip
    assert config.data.crop_padding == 4
    vit = programs.step_config("gfa", TASK._replace(model="vit_tiny"))
    assert not vit.model.homogeneous  # it has no such form


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("gafa", "steps='gafa' is unknown; valid: standard, gfa"),
        ("gfa:weight=2", "'weight=2' is not field=value with a field of the config"),
        ("gfa:gfa.weigth=2", "'gfa.weigth=2' is not field=value.*Did you mean 'weight'"),
        ("gfa:gfa=2", "'gfa=2' is not field=value"),
        ("gfa:model.input_mean=2", "'model.input_mean=2' is not field=value"),
        ("gfa:gfa.weight", "'gfa.weight' is not field=value"),
        ("pgd_at:attack.num_steps=many", "attack.num_steps=many must be an integer"),
        ("gfa:gfa.form=cubic", "gfa.form='cubic'"),
    ],
)
def test_bad_steps_are_refused(step, message):
    with pytest.raises(ValueError, match=message):
        programs.step_config(step, TASK)


def test_a_step_trains_and_says_what_it_costs():
    plain = programs.train_step(programs.step_config("standard", TASK), TASK)
    aligned = programs.train_step(programs.step_config("gfa", TASK), TASK)
    first, second = aligned.start(), aligned.start()
    assert first["alignment_penalty"] > 0
    assert np.isfinite(second["loss"])
    assert second["grad_norm"] > 0
    # Exact alignment differentiates twice: twice the products, and a bit for the input's gradient.
    assert 1.9 < aligned.flops / plain.flops < 2.2
    assert aligned.memory_bytes > plain.memory_bytes > 0
    assert min(aligned.trace_seconds, aligned.compile_seconds) > 0


def test_adapted_recipes_keep_all_but_the_task():
    config = programs.step_config("pgd_at", TASK._replace(model="cnn6", batch_size=16))
    found = programs.adapted(config, TASK._replace(dtype="bfloat16"))
    assert found.attack == config.attack
    assert (found.model.name, found.model.dtype, found.batch_size) == ("cnn4", "bfloat16", 8)
    broken = dataclasses.replace(config, attack=AttackConfig(name="pgd", num_steps=0))
    with pytest.raises(ValueError, match="num_steps=0"):
        programs.adapted(broken, TASK)


def test_an_attack_starts_from_what_the_model_says():
    # So small a radius breaks nothing where the labels are the model's own predictions.
    threat = ThreatModel("linf", 1e-6)
    program = programs.attack("pgd", {"num_steps": 3}, threat, TASK)
    result = program.start()
    assert result.adv_inputs.shape == (8, 8, 8, 1)
    images = np.asarray(programs.batch(TASK)["inputs"], np.float32) / 255
    assert 0 < np.abs(np.asarray(result.adv_inputs) - images).max() < 2e-6
    assert not np.any(result.success)
    assert program.flops > 0


def test_what_has_no_fixed_length_has_no_count():
    program = programs.attack("deepfool", {"num_steps": 2}, ThreatModel("l2", 0.3), TASK)
    assert program.flops is None or program.flops > 0
    jax.block_until_ready(program.start())
    with pytest.raises(ValueError, match="'autoattack' is an ensemble"):
        programs.attack("autoattack", {}, ThreatModel("l2", 0.3), TASK)


def test_a_product_counts_its_operations():
    assert programs.product(64).flops == 2 * 64**3
