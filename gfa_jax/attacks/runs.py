"""An attack as a series of runs: restarts, or target classes tried one after another.

``Attack`` makes them all in one compiled loop. A caller that has many examples makes them one at a
time (``run=index``) and drops the examples that are done in between (``attacks.compaction``); the
results are the same, since every example has a key of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import EXACT, Estimator, Model, fold_in
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackResult, LossFn

KL = "kl"
"""The loss ``losses.kl`` against the clean logits, by name."""


class Problem(NamedTuple):
    """What the runs of one attack share.

    Attributes:
      inputs: clean, ``[B, ...]``.
      labels: int ``[B]``.
      targets: int ``[B]`` for a targeted attack, or ``None``.
      start: ``[B, ...]`` inside ball and box, or ``None``.
      clean_logits: ``[B, C]``; ``[B, 0]`` where the attack needs none.
      active: bool ``[B]``; what a run does to the other examples is ignored, and a loop may end
        early once the active ones are done.
    """

    inputs: Array
    labels: Array
    targets: Array | None
    start: Array | None
    clean_logits: Array
    active: Array


class Found(NamedTuple):
    """What a run found; the fields are those of ``AttackResult``."""

    adv_inputs: Array
    success: Array
    loss: Array
    num_forwards: Array
    num_backwards: Array
    num_zero_gradients: Array


GoalFn = Callable[[Problem, int | Array], base.Goal]
"""The goal of the run of an index."""
RunFn = Callable[[Model, Array | None, Problem, base.Goal, int | Array], Found]
"""``(model, keys of this run, problem, goal, index) -> Found``."""


def goal_of(loss: str | LossFn) -> GoalFn:
    """The goal of maximising a loss, towards targets where the attack is given any.

    ``kl`` is the divergence from the clean predictions (TRADES).

    Raises:
      ValueError: for an unknown loss.
    """
    if loss == KL:
        return _kl_goal
    loss_fn, targeted_loss_fn = losses.get(loss), losses.get_targeted(loss)

    def goal(problem: Problem, index: int | Array) -> base.Goal:
        if problem.targets is None:
            return base.untargeted(loss_fn, problem.labels)
        return base.targeted(targeted_loss_fn, problem.labels, problem.targets)

    return goal


def _kl_goal(problem: Problem, index: int | Array) -> base.Goal:
    if problem.targets is not None:
        raise ValueError(
            f"loss={KL!r} has no targeted form: it only moves away from the clean one."
        )
    # Its gradient at the clean input is zero: an attack that maximises it starts elsewhere.
    away = base.untargeted(losses.margin, problem.labels)
    return away._replace(loss=lambda logits: losses.kl(logits, problem.clean_logits))


def goal_of_ranks(loss: str, num_restarts: int) -> GoalFn:
    """Any wrong class, tried by rank: run ``i`` moves towards the ``2 + i // num_restarts``-th.

    Classes are ranked by the clean logits, so that the first of them is the label itself.
    """
    loss_fn = losses.get_targeted(loss)

    def goal(problem: Problem, index: int | Array) -> base.Goal:
        ranked = base.classes_by_rank(problem.clean_logits)
        targets = ranked[:, 1 + index // num_restarts].astype(problem.labels.dtype)
        return base.multi_targeted(loss_fn, problem.labels, targets)

    return goal


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """An attack made of independent runs; an ``AttackFn``.

    Attributes:
      threat: ball and box.
      goal: what each run wants.
      run: one run.
      num_restarts: runs for each target class, or in all.
      num_targets: for an attack that chooses targets by rank, how many at most; otherwise ``None``.
      keep: ``best``: over the runs, points that mislead the model first, then the larger loss.
        ``closest``: points that mislead the model, then the smaller distance. ``last``: the only
        run's point, successful or not; then inputs that mislead the model already are attacked too.
      stop: when later runs leave an example alone: after a ``success``, after one within
        ``epsilon``, or ``never``.
      estimator: how the model is seen.
      draws: whether a run draws its start; none is drawn where one is given.
      draws_steps: whether a run draws on its way, too.
    """

    threat: ThreatModel
    goal: GoalFn
    run: RunFn
    num_restarts: int = 1
    num_targets: int | None = None
    keep: str = "best"
    stop: str = "success"
    estimator: Estimator = EXACT
    draws: bool = True
    draws_steps: bool = False

    def parts(self) -> dict[str, "Attack"]:
        """Returns the attack itself, as an ensemble returns its members."""
        return {"": self}

    def num_runs(self, num_classes: int) -> int:
        """Returns how many runs there are for a model of so many classes."""
        if self.num_targets is None:
            return self.num_restarts
        return self.num_restarts * min(self.num_targets, num_classes - 1)

    def __call__(
        self,
        logits_fn: Model,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        *,
        targets: Array | None = None,
        start: Array | None = None,
        active: Array | None = None,
        run: int | Array | None = None,
    ) -> AttackResult:
        """Attacks each example on its own; see ``AttackFn``.

        Args:
          logits_fn: the model, or what the estimator asks for.
          keys: typed PRNG keys ``[B]``.
          inputs: ``[B, ...]``.
          labels: int ``[B]``.
          targets: int ``[B]`` or ``None``.
          start: ``[B, ...]`` or ``None``.
          active: bool ``[B]`` or ``None``.
          run: the index of the only run to make, which may be traced; all of them by default.

        Raises:
          ValueError: for inputs, labels, targets or keys that do not fit.
        """
        base.check_inputs(self.threat, inputs, labels)
        self._check_optional(inputs, keys, targets, start, active)
        # Known arrays may be NumPy's, which cannot be indexed by what is traced.
        inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
        problem = self._problem(logits_fn, keys, inputs, labels, targets, start, active)
        # The first run's, whatever is to run: its loss at the clean input is one for all runs.
        goal = self.goal(problem, 0)
        if self.keep == "last":
            found = self.run(logits_fn, self._keys(keys, 0), problem, goal, 0)
            looks = self.estimator.num_judging * self._needs_clean_logits
            return self._finish(problem, found._replace(num_forwards=found.num_forwards + looks))
        reached = goal.reached(problem.clean_logits)
        asked = problem.active
        loss = goal.loss(problem.clean_logits).astype(jnp.float32)
        none = jnp.zeros_like(labels, jnp.int32)
        clean = Found(inputs, reached & asked, loss, none, none, none)
        problem = problem._replace(active=asked & ~reached)

        def make(index: int | Array, still: Problem, found: Found) -> Found:
            goal = self.goal(still, index)
            run_keys = self._keys(keys, index)
            new = self.run(logits_fn, run_keys, still, goal, index)
            if self.estimator.is_random:
                # On the way, success is that of single passes.
                logits = self.estimator.logits(logits_fn, new.adv_inputs, run_keys)
                new = new._replace(
                    success=new.success & goal.reached(logits),
                    num_forwards=new.num_forwards + self.estimator.num_judging,
                )
            return self._merge(still, found, new)

        def attempt(index: Array, found: Found) -> Found:
            if self.stop == "never":
                return make(index, problem, found)
            distance = self._distance(problem.inputs, found.adv_inputs)
            still = problem._replace(active=problem.active & ~self.is_done(found.success, distance))
            return jax.lax.cond(
                still.active.any(), lambda: make(index, still, found), lambda: found
            )

        num_runs = self.num_runs(problem.clean_logits.shape[1])
        if run is not None or num_runs == 1:
            found = make(0 if run is None else run, problem, clean)
        else:
            found = jax.lax.fori_loop(0, num_runs, attempt, clean)
        judged = self.estimator.num_judging * asked.astype(jnp.int32)
        return self._finish(problem, found._replace(num_forwards=found.num_forwards + judged))

    def _problem(
        self,
        logits_fn: Model,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        targets: Array | None,
        start: Array | None,
        active: Array | None,
    ) -> Problem:
        inputs = jax.lax.stop_gradient(inputs)
        clean_logits = (
            self.estimator.logits(logits_fn, inputs, self._keys(keys, _CLEAN))
            if self._needs_clean_logits
            else jnp.zeros((inputs.shape[0], 0))
        )
        return Problem(
            inputs=inputs,
            labels=labels,
            targets=None if targets is None else jnp.asarray(targets),
            start=None
            if start is None
            else self.threat.project(inputs, jnp.asarray(start, inputs.dtype)),
            clean_logits=clean_logits,
            active=jnp.ones(labels.shape, bool) if active is None else jnp.asarray(active),
        )

    @property
    def _needs_clean_logits(self) -> bool:
        """Attacks that return their only point have few uses for them."""
        return self.keep != "last" or self.goal is _kl_goal

    def _distance(self, inputs: Array, adv_inputs: Array) -> Array:
        return self.threat.distance(inputs, adv_inputs).astype(jnp.float32)

    def _keys(self, keys: Array | None, index: int | Array) -> Array | None:
        return None if keys is None else fold_in(keys, index)

    def is_done(self, success: Array, distance: Array) -> Array:
        """Returns which examples later runs leave alone, bool ``[B]``; NumPy arrays stay NumPy."""
        if self.stop == "never":
            return success & ~success
        return success if self.stop == "success" else success & (distance <= self.threat.epsilon)

    def _merge(self, problem: Problem, old: Found, new: Found) -> Found:
        """Returns the better of two finds for the active examples, and all counts."""
        if self.keep == "closest":
            scores = [-self._distance(problem.inputs, found[0]) for found in (old, new)]
        else:
            scores = [old.loss, new.loss]
        better = base.is_better(old.success, scores[0], new.success, scores[1])
        better &= problem.active
        count = problem.active.astype(jnp.int32)
        return Found(
            adv_inputs=jnp.where(norms.expand(better, old.adv_inputs), new.adv_inputs, old[0]),
            success=old.success | (new.success & problem.active),
            loss=jnp.where(better, new.loss, old.loss),
            num_forwards=old.num_forwards + count * new.num_forwards,
            num_backwards=old.num_backwards + count * new.num_backwards,
            num_zero_gradients=old.num_zero_gradients + count * new.num_zero_gradients,
        )

    def _finish(self, problem: Problem, found: Found) -> AttackResult:
        kept = problem.active if self.keep == "last" else found.success
        adv_inputs = jnp.where(norms.expand(kept, problem.inputs), found.adv_inputs, problem.inputs)
        success = found.success
        if self.keep == "last":
            # Other attacks have counted and merged active examples alone.
            success &= problem.active
            count = problem.active.astype(jnp.int32)
            found = found._replace(
                num_forwards=count * found.num_forwards,
                num_backwards=count * found.num_backwards,
                num_zero_gradients=count * found.num_zero_gradients,
            )
        result = AttackResult(
            adv_inputs=adv_inputs,
            success=success,
            distance=self._distance(problem.inputs, adv_inputs),
            loss=found.loss,
            num_forwards=found.num_forwards,
            num_backwards=found.num_backwards,
            num_zero_gradients=found.num_zero_gradients,
            members={},
        )
        return jax.lax.stop_gradient(result)

    def _check_optional(
        self,
        inputs: Array,
        keys: Array | None,
        targets: Array | None,
        start: Array | None,
        active: Array | None,
    ) -> None:
        """Refuses optional arguments that do not fit; see ``AttackFn``."""
        size = inputs.shape[0]
        needed = self.estimator.needs_keys or self.draws_steps or (self.draws and start is None)
        if needed and keys is None:
            raise ValueError(
                "keys=None, but this attack draws for each example (random_start=True or a "
                "randomised gradient): pass keys of shape [B] (example_keys)."
            )
        if keys is not None and keys.shape != (size,):
            raise ValueError(
                f"keys has shape {keys.shape}; expected one typed key for each of the {size} "
                "examples."
            )
        if start is not None and start.shape != inputs.shape:
            raise ValueError(f"start has shape {start.shape}; expected {inputs.shape}.")
        if active is not None and (active.shape != (size,) or active.dtype != bool):
            raise ValueError(
                f"active has shape {active.shape} and dtype {active.dtype}; expected bool of shape "
                f"{(size,)}."
            )
        if targets is None:
            return
        if self.num_targets is not None:
            raise ValueError(
                "targets were given to an attack that chooses its own classes: use the attack "
                "without -t in its name (apgd-dlr, fab) for given targets."
            )
        if targets.shape != (size,) or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"targets have shape {targets.shape} and dtype {targets.dtype}; expected integers "
                f"of shape {(size,)}."
            )
        if not isinstance(targets, jax.core.Tracer) and size and np.asarray(targets).min() < 0:
            raise ValueError("targets hold negative values; classes are counted from 0.")


def starting_point(
    threat: ThreatModel, keys: Array | None, problem: Problem, random_start: bool
) -> Array:
    """Returns the given start, a random allowed point, or the clean inputs."""
    if problem.start is not None:
        return problem.start
    if random_start:
        assert keys is not None
        return threat.random_start(keys, problem.inputs)
    return problem.inputs


def draw_noise(keys: Array, inputs: Array, norm: str) -> Array:
    """Returns noise ``[B, ...]``, uniform in [-1, 1] for ``linf`` and otherwise normal.

    What AutoAttack's code scales to a radius for its random starts.
    """

    def draw(key: Array) -> Array:
        if norm == "linf":
            return jax.random.uniform(key, inputs.shape[1:], inputs.dtype, -1, 1)
        return jax.random.normal(key, inputs.shape[1:], inputs.dtype)

    return jax.vmap(draw)(keys)


def refuse_start(problem: Problem) -> None:
    """Raises ValueError for a given start, in an attack that moves away from the clean input."""
    if problem.start is not None:
        raise ValueError(
            "start was given to an attack that always starts at the clean input: use start=None."
        )


_CLEAN = 2**31 - 1
"""The key index of the clean evaluation, which no run uses."""
