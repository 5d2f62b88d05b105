"""Checkpoints: round trips, the latest beside the best, and errors that name a leaf."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from gfa_jax.training import checkpoint, state, step


@pytest.fixture
def mesh():
    return step.data_mesh(jax.devices()[:1])


def make_state(mesh, number=0, width=3, name="kernel"):
    params = {"layer": {name: jnp.arange(4.0 * width).reshape(4, width) + number}}
    tx = optax.adam(0.1)
    whole = state.TrainState(
        jnp.asarray(number, jnp.int32),
        params,
        {"batch_stats": {"mean": jnp.ones(2)}},
        tx.init(params),
    )
    return jax.device_put(whole, step.replicated(mesh))


def template_of(value, mesh):
    sharding = step.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), value
    )


def test_round_trip_also_in_a_fresh_manager_and_on_more_devices(tmp_path, mesh):
    saved = make_state(mesh, 7)
    first = checkpoint.Checkpoints(tmp_path)
    first.save(saved, {"train_seconds": 1.5})
    first.close()
    for other_mesh in (mesh, step.data_mesh()):
        again = checkpoint.Checkpoints(tmp_path)
        restored, metadata = again.restore_latest(template_of(saved, other_mesh))
        again.close()
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(saved))
        assert metadata == {"train_seconds": 1.5}
        kernel = restored.params["layer"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec()
        assert len(kernel.sharding.device_set) == other_mesh.size


def test_the_latest_is_kept_beside_the_best(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path, metric="accuracy", keep_best=1)
    for number, accuracy in enumerate([0.2, 0.9, 0.5, 0.4], start=1):
        checkpoints.save(make_state(mesh, number), {}, {"accuracy": accuracy})
    assert checkpoints.latest_step == 4
    template = template_of(make_state(mesh), mesh)
    model = {"params": template.params, "model_state": template.model_state}
    for which, expected in (("latest", 4), ("best", 2), (2, 2), ("4", 4)):
        params, model_state, number = checkpoints.restore_model(model, which)
        assert number == expected
        assert params["layer"]["kernel"][0, 0] == expected
        chex.assert_trees_all_equal(model_state, {"batch_stats": {"mean": jnp.ones(2)}})
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint=3 does not exist.*steps there: \[2, 4\]"
    ):
        checkpoints.restore_model(model, 3)
    checkpoints.close()


def test_checkpoints_without_the_metric_are_never_the_best(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path, metric="accuracy", keep_best=1)
    template = template_of(make_state(mesh), mesh)
    model = {"params": template.params, "model_state": template.model_state}
    checkpoints.save(make_state(mesh, 1), {})
    with pytest.raises(FileNotFoundError, match="checkpoint='best' does not exist"):
        checkpoints.restore_model(model, "best")
    for number, metrics in enumerate([{"accuracy": 0.1}, {}, {"train/loss": 3.0}], start=2):
        checkpoints.save(make_state(mesh, number), {}, metrics)
    assert checkpoints.restore_model(model, "best")[2] == 2
    assert checkpoints.latest_step == 4
    checkpoints.close()


def test_no_checkpoint_is_none(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.restore_latest(template_of(make_state(mesh), mesh)) is None
    with pytest.raises(FileNotFoundError, match="checkpoint='latest' does not exist.*none"):
        checkpoints.restore_model({}, "latest")
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 5}, r"params/layer/kernel has shape \(4, 3\).*expected \(4, 5\)"),
        ({"name": "weight"}, "params/layer/weight is missing; params/layer/kernel is not part of"),
    ],
)
def test_an_incompatible_checkpoint_names_the_leaf(tmp_path, mesh, change, message):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(mesh), {})
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(checkpoint.IncompatibleCheckpointError, match=message):
        again.restore_latest(template_of(make_state(mesh, **change), mesh))
    again.close()


def test_a_changed_dtype_is_an_error_not_a_cast(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(mesh), {})
    template = template_of(make_state(mesh), mesh)
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
        template.params,
    )
    with pytest.raises(
        checkpoint.IncompatibleCheckpointError, match="dtype float32, expected .*bfloat16"
    ):
        checkpoints.restore_latest(template.replace(params=half))
    checkpoints.close()


def test_a_damaged_checkpoint_is_named(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(mesh, 3), {})
    checkpoints.close()
    for path in (tmp_path / "3" / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    again = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint .*/3 cannot be read"):
        again.restore_latest(template_of(make_state(mesh), mesh))
    again.close()


def test_an_unfinished_save_is_not_the_latest(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(mesh, 1), {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest_step == 1
    again.close()
