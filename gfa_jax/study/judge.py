"""Quick judgements of trained models: what chooses among recipes, and distances as papers report.

Unlike an evaluation they keep nothing on the way, and models of one architecture share their
compiled programs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import ThreatModel, alignment, attacks, data, norms
from gfa_jax import taps as taps_lib
from gfa_jax.evaluation import loading
from gfa_jax.evaluation.evaluate import parse_attack
from gfa_jax.evaluation.outcomes import minimum_norm
from gfa_jax.evaluation.subject import hash_examples
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array, AttackResult, Features, Taps

_RADIUS = 0.5
"""What an attack for the smallest perturbation is told, and does not use."""


class Judge:
    """Attacks trained models.

    It keeps one function for each architecture and one object for each attack, by whose identity
    compiled programs are found again.
    """

    def __init__(self) -> None:
        """Starts without any."""
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._alignments: dict[Any, Callable[..., tuple[Array, Array]]] = {}
        self._attacks: dict[tuple[str, ThreatModel], Any] = {}

    def accuracies(
        self, run: loading.LoadedRun, specs: Sequence[str], batch_size: int
    ) -> dict[str, Any]:
        """Returns the accuracy without attack and after each, made on what those before it left.

        Args:
          run: with the examples to judge by.
          specs: attacks as for ``eval.py``.
          batch_size: examples attacked at once.

        Returns:
          ``clean_accuracy``, ``robust_accuracy`` by spec, each the worst case so far,
          ``num_examples`` and ``data``: ``name``, ``split`` and ``hash``.
        """
        resists = self.is_right(run, batch_size)
        clean_accuracy, robust_accuracy = float(resists.mean()), {}
        for spec in specs:
            found = self.attack(run, spec, run.classifier.threat, resists, batch_size)
            resists = resists & ~np.asarray(found.success)
            robust_accuracy[spec] = float(resists.mean())
        return {
            "clean_accuracy": clean_accuracy,
            "robust_accuracy": robust_accuracy,
            **_examples(run),
        }

    def distances(
        self, run: loading.LoadedRun, specs: Sequence[str], norm: str, batch_size: int
    ) -> dict[str, Any]:
        """Returns what minimum-norm attacks find for images that are right without them.

        Args:
          run: with the examples.
          specs: attacks as for ``eval.py``.
          norm: of the threat model and of the distances.
          batch_size: examples attacked at once.

        Returns:
          ``minimum_norm`` by spec (``outcomes.minimum_norm``), ``num_examples`` and ``data``.
        """
        threat = ThreatModel(norm, _RADIUS)
        right = self.is_right(run, batch_size)
        found_norms = {}
        for spec in specs:
            found = self.attack(run, spec, threat, right, batch_size)
            outcome = {
                "success": np.asarray(found.success),
                "distance": np.asarray(found.distance),
                "attacked": right,
            }
            found_norms[spec] = minimum_norm(outcome, right, norm)
        return {"minimum_norm": found_norms, **_examples(run)}

    def radii(self, run: loading.LoadedRun, batch_size: int) -> dict[str, Any]:
        """Returns what the radius identity relates, for the images that are right.

        In a homogeneous network the linear radius is ``|h|_p a``, with the normalised image ``h``
        and the alignment ``a`` of the margin (``alignment``).

        Args:
          run: with the examples.
          batch_size: examples attacked at once.

        Returns:
          Lists of one length: ``alignment`` at the input, in the norm of the threat model whatever
          the training's; ``linear``, the radius by the identity in units of the input (with the
          mean standard deviation of the normalisation); and ``measured``, DeepFool's distance in
          that norm, ``None`` where it finds nothing. Beside them that ``norm``, ``num_examples``
          and ``data``.
        """
        threat, right = run.classifier.threat, self.is_right(run, batch_size)
        found = self.attack(run, "deepfool", threat, right, batch_size)
        measured = [
            [np.asarray(value)[batch["mask"]] for value in self._align(run, batch)]
            for batch in data.eval_batches(run.test_set, batch_size)
        ]
        aligned, linear = (np.concatenate(parts)[right] for parts in zip(*measured, strict=True))
        distance = np.where(np.asarray(found.success), np.asarray(found.distance), np.nan)[right]
        return {
            "norm": threat.norm,
            "alignment": [round(float(value), 5) for value in aligned],
            "linear": [round(float(value), 5) for value in linear],
            "measured": [
                None if math.isnan(value) else round(float(value), 5) for value in distance
            ],
            **_examples(run),
        }

    def is_right(self, run: loading.LoadedRun, batch_size: int) -> np.ndarray:
        """Returns which examples are classified correctly, bool ``[N]``."""
        with jax.default_matmul_precision("highest"):
            logits = [
                self._apply(run)(_variables(run), data.to_float(batch["inputs"]))[batch["mask"]]
                for batch in data.eval_batches(run.test_set, batch_size)
            ]
        predicted = np.concatenate([np.argmax(np.asarray(one), axis=1) for one in logits])
        right: np.ndarray = predicted == run.test_set.labels
        return right

    def attack(
        self,
        run: loading.LoadedRun,
        spec: str,
        threat: ThreatModel,
        active: np.ndarray,
        batch_size: int,
    ) -> AttackResult:
        """Attacks the examples of a run, with the same draws for every run.

        Args:
          run: with the examples.
          spec: an attack as for ``eval.py``, on a model of logits alone.
          threat: ball and box.
          active: bool ``[N]``, the examples to attack.
          batch_size: examples attacked at once.

        Raises:
          ValueError: for an unknown attack or option.
        """
        name, options = parse_attack(spec)
        attack = self._attacks.setdefault((spec, threat), attacks.create(name, threat, **options))
        progress = Progress(spec, int(active.sum()))
        try:
            with jax.default_matmul_precision("highest"):
                return attacks.attack_in_batches(
                    attack,
                    self._apply(run),
                    _variables(run),
                    attacks.example_keys(jax.random.key(0), jnp.asarray(run.test_set.ids)),
                    np.asarray(data.to_float(run.test_set.images)),
                    run.test_set.labels,
                    batch_size=batch_size,
                    active=active,
                    on_batch=lambda text, done, todo: progress.update(done, text),
                )
        finally:
            progress.close()

    def _apply(self, run: loading.LoadedRun) -> Callable[..., Any]:
        module = run.classifier.module
        return self._functions.setdefault(
            module, jax.jit(lambda variables, inputs: module.apply(variables, inputs, train=False))
        )

    def _align(self, run: loading.LoadedRun, batch: dict[str, np.ndarray]) -> tuple[Array, Array]:
        """Returns ``a`` and, in units of the input, ``|h|_p a``; each ``[B]``."""
        key = (run.classifier.module, run.classifier.layers, run.classifier.threat.norm)
        measure = self._alignments.setdefault(key, jax.jit(_alignment_and_radius(run)))
        with jax.default_matmul_precision("highest"):
            return measure(
                run.params, run.model_state, data.to_float(batch["inputs"]), batch["labels"]
            )


def _alignment_and_radius(run: loading.LoadedRun) -> Callable[..., tuple[Array, Array]]:
    """Returns a function that keeps of the run its architecture and norm alone."""
    module, layers, norm = run.classifier.module, run.classifier.layers, run.classifier.threat.norm
    scale = float(np.mean(run.config.model.input_std))

    def measure(params: Any, model_state: Any, inputs: Array, labels: Array) -> tuple[Array, Array]:
        def apply_fn(taps: Taps, inputs: Array) -> tuple[Array, Features]:
            return loading.apply(module, layers, params, model_state, taps, inputs)

        _, features, grads = taps_lib.feature_gradients(apply_fn, inputs, labels, target="margin")
        feature = features[layers[0]]
        aligned = alignment.alignment(feature, grads[layers[0]], norm)
        return aligned, scale * norms.vector_norm(feature, norm) * aligned

    return measure


def _variables(run: loading.LoadedRun) -> dict[str, Any]:
    return {"params": run.params, **run.model_state}


def _examples(run: loading.LoadedRun) -> dict[str, Any]:
    return {
        "num_examples": len(run.test_set),
        "data": {
            "name": run.config.data.name,
            "split": run.split,
            "hash": hash_examples(run.test_set),
        },
    }
