"""Metrics on the validation split: what chooses the best checkpoint."""

import functools
from collections.abc import Callable

import jax

from gfa_jax import attacks, data
from gfa_jax.config import TrainConfig
from gfa_jax.training import layout, recipe, state, step
from gfa_jax.training.metrics import to_floats

_EVAL_KEY = 1

Evaluator = Callable[[state.TrainState], dict[str, float]]
"""``state -> validation metrics``."""


def make_evaluator(
    config: TrainConfig,
    built: recipe.Recipe,
    validation_set: data.Dataset,
    mesh: jax.sharding.Mesh,
    template: state.TrainState,
) -> Evaluator:
    """Returns ``state -> validation metrics``, traced now and compiled at its first use.

    Every process passes its share of each batch; the sums are over all.

    Args:
      config: the recipe.
      built: its functions.
      validation_set: the examples, the same on every process.
      mesh: from ``layout.data_mesh``.
      template: shapes and shardings of the state.
    """
    attack = None
    if config.loop.eval_attack_steps:
        attack = attacks.create("pgd-margin", built.threat, num_steps=config.loop.eval_attack_steps)
    eval_step = step.make_eval_step(
        built.module,
        layers=built.layers,
        layer_norms=built.layer_norms,
        attack=attack,
        to_float=data.to_float,
        mesh=mesh,
        shardings=jax.tree.map(lambda leaf: leaf.sharding, template.evaluated),
    )
    key = layout.everywhere(
        lambda: jax.random.fold_in(jax.random.key(config.seed), _EVAL_KEY), mesh
    )
    # Every device gets the same number of examples; the padding is masked.
    batch_size = -(-config.loop.eval_batch_size // mesh.size) * mesh.size
    batches = functools.partial(
        data.eval_batches,
        validation_set,
        batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    split = layout.split(mesh)
    first_batch = data.put(next(batches()), split)
    compiled = functools.cache(eval_step.lower(*template.evaluated, first_batch, key).compile)

    def evaluate(current: state.TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in batches():
            sums = to_floats(compiled()(*current.evaluated, data.put(batch, split), key))
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
        count = totals.pop("num_examples")
        return {f"eval/{name}": value / count for name, value in totals.items()}

    return evaluate
