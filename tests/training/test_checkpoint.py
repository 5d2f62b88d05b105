"""Checkpoints: round trips, the latest beside the best, and errors that name a leaf."""

import resource

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from gfa_jax.training import checkpoint, layout, state


@pytest.fixture
def mesh():
    return layout.data_mesh(jax.devices()[:1])


def make_state(mesh, number=0, width=3, name="kernel"):
    params = {"layer": {name: jnp.arange(4.0 * width).reshape(4, width) + number}}
    tx = optax.adam(0.1)
    whole = state.TrainState(
        jnp.asarray(number, jnp.int32),
        params,
        {"batch_stats": {"mean": jnp.ones(2)}},
        tx.init(params),
    )
    return jax.device_put(whole, layout.replicated(mesh))


def template_of(value, mesh):
    sharding = layout.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), value
    )


def test_round_trip_also_in_a_fresh_manager_and_on_more_devices(tmp_path, mesh):
    saved = make_state(mesh, 7)
    first = checkpoint.Checkpoints(tmp_path)
    first.save(saved, {"train_seconds": 1.5})
    first.close()
    for other_mesh in (mesh, layout.data_mesh()):
        again = checkpoint.Checkpoints(tmp_path)
        restored, metadata = again.restore_latest(template_of(saved, other_mesh))
        again.close()
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(saved))
        assert metadata == {"train_seconds": 1.5}
        kernel = restored.params["layer"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec()
        assert len(kernel.sharding.device_set) == other_mesh.size


def test_the_latest_two_are_kept_beside_the_best(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path, metric="accuracy", keep_best=1)
    for number, accuracy in enumerate([0.2, 0.9, 0.5, 0.4, 0.3], start=1):
        checkpoints.save(make_state(mesh, number), {}, {"accuracy": accuracy})
    assert checkpoints.latest_step == 5
    template = template_of(make_state(mesh), mesh)
    model = {"params": template.params, "model_state": template.model_state}
    for which, expected in (("latest", 5), ("best", 2), (2, 2), ("4", 4)):
        params, model_state, number = checkpoints.restore_model(model, which)
        assert number == expected
        assert params["layer"]["kernel"][0, 0] == expected
        chex.assert_trees_all_equal(model_state, {"batch_stats": {"mean": jnp.ones(2)}})
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint=3 does not exist.*steps there: \[2, 4, 5\]"
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
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"checkpoint .*/3 cannot be read"):
        again.restore_latest(template_of(make_state(mesh), mesh))
    again.close()
    assert (tmp_path / "3").is_dir()


def test_a_damaged_latest_checkpoint_is_set_aside(tmp_path, mesh):
    """Training goes on from the one before it, and nothing is deleted."""
    template = template_of(make_state(mesh), mesh)
    for attempt in range(2):
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
        for number in (3, 4):
            checkpoints.save(make_state(mesh, number), {"train_seconds": number})
        checkpoints.close()
        for path in (tmp_path / "checkpoints" / "4" / "training").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:7])
        again = checkpoint.Checkpoints(tmp_path / "checkpoints")
        with pytest.warns(UserWarning, match=r"checkpoint .*/4 cannot be read.*from an older one"):
            restored, metadata = again.restore_latest(template)
        chex.assert_trees_all_equal(restored, make_state(mesh, 3))
        assert metadata == {"train_seconds": 3}
        assert again.latest_step == 3
        again.close()
        assert (tmp_path / "damaged_checkpoints" / f"4-{attempt}" / "model").is_dir()


def test_checkpoints_with_damaged_metrics_do_not_take_the_others_along(tmp_path, mesh):
    options = {"metric": "accuracy", "keep_best": 1}
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", **options)
    for number in (3, 4):
        checkpoints.save(make_state(mesh, number), {}, {"accuracy": number / 10})
    checkpoints.close()
    path = tmp_path / "checkpoints" / "4" / "metrics" / "metrics"
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"checkpoint .*/4 cannot be read"):
        checkpoint.Checkpoints(tmp_path / "checkpoints", **options, read_only=True)
    assert not (tmp_path / "damaged_checkpoints").exists()
    with pytest.warns(UserWarning, match=r"checkpoint .*/4 cannot be read \(metrics: "):
        again = checkpoint.Checkpoints(tmp_path / "checkpoints", **options)
    assert again.latest_step == 3
    restored, _ = again.restore_latest(template_of(make_state(mesh), mesh))
    assert restored.step == 3
    again.close()
    assert (tmp_path / "damaged_checkpoints" / "4-0" / "model").is_dir()


def test_a_state_may_be_donated_right_after_its_save(tmp_path, mesh):
    """What is still being written is a copy."""
    checkpoints = checkpoint.Checkpoints(tmp_path)
    current = make_state(mesh, 1, width=100_000)
    expected = jax.device_get(jax.tree.map(jnp.copy, current))
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 7, tree), donate_argnums=0
    )
    checkpoints.save(current, {})
    jax.block_until_ready(overwrite(current))
    restored, _ = checkpoints.restore_latest(template_of(expected, mesh))
    chex.assert_trees_all_equal(jax.device_get(restored), expected)
    checkpoints.close()


def test_an_average_of_weights_is_the_model_and_the_weights_come_back(tmp_path, mesh):
    plain = make_state(mesh, 2)
    averaged = jax.tree.map(lambda leaf: leaf / 2, plain.evaluated)
    saved = plain.replace(ema=averaged)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(saved, {})
    template = template_of(saved, mesh)
    restored, _ = checkpoints.restore_latest(template)
    chex.assert_trees_all_equal(restored, saved)
    params, model_state, _ = checkpoints.restore_model(
        {"params": template.params, "model_state": template.model_state}
    )
    chex.assert_trees_all_equal((params, model_state), averaged)
    with pytest.raises(checkpoint.IncompatibleCheckpointError, match="weights.*not part of"):
        checkpoints.restore_latest(template_of(plain, mesh))
    checkpoints.close()


def test_what_cannot_be_written_is_an_error_and_costs_nothing(tmp_path, mesh):
    """Files that may not grow, as on a full disk; noise does not compress."""

    def noisy_state(number):
        noise = jax.random.normal(jax.random.key(number), (1000, 100))
        return jax.device_put(
            state.TrainState(jnp.asarray(number), {"kernel": noise}, {}, ()),
            layout.replicated(mesh),
        )

    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(noisy_state(1), {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(checkpoint.SaveFailedError, match="could not be written.*is intact"):
            checkpoints.save(noisy_state(2), {})
            checkpoints.wait()
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest_step == 1
    restored, _ = again.restore_latest(template_of(noisy_state(1), mesh))
    chex.assert_trees_all_equal(restored, noisy_state(1))
    again.save(noisy_state(2), {})
    again.wait()
    assert again.latest_step == 2
    again.close()


def test_an_unfinished_save_is_not_the_latest(tmp_path, mesh):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(make_state(mesh, 1), {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest_step == 1
    again.close()
