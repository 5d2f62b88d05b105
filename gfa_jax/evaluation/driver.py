"""What an evaluation measures: attacks, curves, geometry, signs of masked gradients."""

import collections
import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data, losses, norms
from gfa_jax.attacks.base import is_misclassified
from gfa_jax.evaluation import (
    binarization,
    diagnostics,
    geometry,
    intervals,
    probes,
    records,
)
from gfa_jax.evaluation.subject import INPUT, Subject, box_radius
from gfa_jax.threat import ThreatModel
from gfa_jax.training import step
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array, AttackResult, LogitsFn

LEVELS = ("off", "quick", "full")
"""How long to look for signs of masked gradients."""

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce:loss=margin:num_steps=20": ("apgd-ce", {"loss": "margin", "num_steps": 20}),
    "square:num_queries=200": ("square", {"num_queries": 200}),
}
"""The attacks of the accuracy curves, with a gradient and without."""

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
LENGTHS = tuple(np.linspace(-0.5, 0.5, 21).round(3).tolist())
SURFACE_LENGTHS = tuple(np.linspace(-2.0, 2.0, 17).round(3).tolist())
"""In units of epsilon."""

_CURVE_EXAMPLES = 500
_PROBED = {"quick": 500, "full": 1000}
_PLANTED = {"quick": 64, "full": 512}
_MAX_FEATURES = 1024
_SHOWN_EXAMPLES = 8
_CDF_POINTS = 101
_BATCHES_PER_CHUNK = 4
_ROUNDING = 1e-5
_MEMBERS = "members/"

Outcome = dict[str, np.ndarray]
"""What an attack did, by field of ``AttackResult``; ``attacked`` says to which examples, and
``reached`` and ``margin`` what the model says at the end."""


class _Chunk(NamedTuple):
    """Examples whose results are kept together."""

    first: int
    last: int
    inputs: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    data_hash: str

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last + 1)


def hash_examples(test_set: data.Dataset) -> str:
    """Returns the SHA-256 of images, labels and ids."""
    digest = hashlib.sha256()
    for array in (test_set.images, test_set.labels, test_set.ids):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Evaluation:
    """One evaluation: what its parts share."""

    def __init__(
        self,
        subject: Subject,
        threat: ThreatModel,
        kept: records.Records,
        batch_size: int,
        seed: int,
    ) -> None:
        """Prepares an evaluation; nothing runs yet.

        Args:
          subject: the classifier and its examples.
          threat: norm and radius.
          kept: where results of attacks go, and come from.
          batch_size: examples on all devices at once, a multiple of their number.
          seed: of all draws.
        """
        self._subject = subject
        self._threat = threat
        self._kept = kept
        self._batch_size = batch_size
        self._key = jax.device_put(jax.random.key(seed), step.replicated(subject.mesh))
        self._box = box_radius(threat.norm, threat.bounds, subject.test_set.image_shape)
        self._labels = subject.test_set.labels

    def run(
        self,
        built: Mapping[str, attacks.Attack | attacks.Ensemble],
        *,
        sequential: bool = False,
        level: str = "quick",
    ) -> tuple[dict[str, Any], Outcome, Outcome, Outcome]:
        """Makes all measurements.

        Args:
          built: attacks by their spec.
          sequential: whether each attack is made on what those before it left.
          level: one of ``LEVELS``.

        Returns:
          ``(results, outcomes, adversarial, shown)``: JSON-ready results; arrays ``[N]`` of what
          happened to each example; the adversarial image of each broken example with its row, by
          the first attack that found one; a few images to show.
        """
        started = time.monotonic()
        clean_correct, predicted = self._clean()
        outcomes: dict[str, Outcome] = {}
        images: dict[str, np.ndarray] = {}
        rest = np.ones(len(clean_correct), bool)
        worst = clean_correct
        for spec, attack in built.items():
            outcomes[spec], images[spec] = self._attack(spec, attack, rest)
            worst = worst & ~self._broken(attack, outcomes[spec])
            if sequential:
                rest = worst
        broken = {spec: self._broken(built[spec], outcome) for spec, outcome in outcomes.items()}
        robust = {spec: clean_correct & ~value for spec, value in broken.items()}
        if sequential:
            # Of each attack together with those before it.
            for before, after in zip(list(robust)[:-1], list(robust)[1:], strict=True):
                robust[after] = robust[after] & robust[before]
        first_broken = _first_broken(broken, clean_correct)
        closest = [spec for spec, attack in built.items() if attack.keep == "closest"]
        curves = self._curves()
        geometry_results, shown = self._geometry(outcomes, images)
        # Attacks on different examples do not compare.
        comparable = {} if sequential else robust
        judged, probed = self._diagnose(
            built, comparable, outcomes, clean_correct, curves, worst, level
        )
        accuracies = {
            "clean": clean_correct,
            **robust,
            "worst_case": worst,
        }
        results = {
            "clean_accuracy": float(clean_correct.mean()),
            "robust_accuracy": {
                name: float(value.mean()) for name, value in accuracies.items() if name != "clean"
            },
            "intervals": {
                name: list(intervals.wilson(int(value.sum()), len(value)))
                for name, value in accuracies.items()
            },
            "first_broken_by": {
                spec: int(np.sum(first_broken == number)) for number, spec in enumerate(built)
            },
            "minimum_norm": {
                spec: minimum_norm(outcomes[spec], clean_correct, self._threat.norm)
                for spec in closest
            },
            "members": {
                spec: {
                    name.removeprefix(_MEMBERS): int(value.sum())
                    for name, value in outcome.items()
                    if name.startswith(_MEMBERS)
                }
                for spec, outcome in outcomes.items()
                if isinstance(built[spec], attacks.Ensemble)
            },
            "verification": {
                spec: self._verify(built[spec], outcome, images[spec])
                for spec, outcome in outcomes.items()
            },
            "diagnostics": judged,
            **probed,
            "threat": {
                "norm": self._threat.norm,
                "epsilon": float(self._threat.epsilon),
                "bounds": list(self._threat.bounds),
            },
            "num_examples": len(worst),
            "counts": {
                spec: {
                    field: int(outcome[field].sum())
                    for field in ("num_forwards", "num_backwards", "num_zero_gradients")
                }
                for spec, outcome in outcomes.items()
            },
            "curves": curves,
            **geometry_results,
            "seconds": time.monotonic() - started,
            "precision": "float32, matmul precision highest",
        }
        by_example = {
            "ids": self._subject.test_set.ids,
            "labels": self._labels,
            "predicted": predicted,
            "clean_correct": clean_correct,
            "worst_case": worst,
            "first_broken_by": first_broken,
            **{f"robust/{spec}": value for spec, value in robust.items()},
            **{
                f"{field}/{spec}": outcome[field]
                for spec, outcome in outcomes.items()
                for field in ("success", "distance", "margin", "reached", "attacked")
            },
        }
        return results, by_example, _adversarial(first_broken, outcomes, images), shown

    def _chunks(self) -> Iterator[_Chunk]:
        test_set = self._subject.test_set
        size = _BATCHES_PER_CHUNK * self._batch_size
        for first in range(0, len(test_set), size):
            rows = slice(first, first + size)
            some = dataclasses.replace(
                test_set,
                images=test_set.images[rows],
                labels=test_set.labels[rows],
                ids=test_set.ids[rows],
            )
            yield _Chunk(
                first,
                first + len(some) - 1,
                np.asarray(data.to_float(some.images)),
                some.labels,
                some.ids,
                hash_examples(some),
            )

    def _attack(
        self, spec: str, attack: attacks.Attack | attacks.Ensemble, rest: np.ndarray
    ) -> tuple[Outcome, np.ndarray]:
        """Attacks the examples in ``rest [N]``, or reads from the records what is there.

        Returns:
          The outcome, and the images ``[N, H, W, C]`` that the attack ends at.
        """
        progress = Progress(spec, len(rest))
        parts, images = [], []
        try:
            for chunk in self._chunks():
                record = self._kept.load(spec, chunk.first, chunk.last)
                if record is None:
                    record = self._attack_chunk(spec, attack, chunk, rest[chunk.rows], progress)
                    self._kept.save(spec, chunk.first, chunk.last, record)
                expected = {
                    "data_hash": np.array(chunk.data_hash),
                    "attacked": rest[chunk.rows],
                }
                for name, value in expected.items():
                    if not np.array_equal(record[name], value):
                        raise records.RecordsMismatchError(
                            f"the record of {spec!r}, examples {chunk.first} to {chunk.last}, "
                            f"differs in {name}: it belongs to another evaluation. Use another "
                            "--out folder."
                        )
                adv_inputs = chunk.inputs.copy()
                adv_inputs[record["moved"]] = record["adv_inputs"]
                parts.append(record)
                images.append(adv_inputs)
                resist = np.concatenate([~part["success"] for part in parts])
                progress.update(chunk.last + 1, f"{resist.mean():.1%} resist")
        finally:
            progress.close()
        apart = ("data_hash", "moved", "adv_inputs")
        outcome = {
            name: np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if name not in apart
        }
        return outcome, np.concatenate(images)

    def _attack_chunk(
        self,
        spec: str,
        attack: attacks.Attack | attacks.Ensemble,
        chunk: _Chunk,
        rest: np.ndarray,
        progress: Progress,
    ) -> dict[str, np.ndarray]:
        subject = self._subject
        needs_features = any(part.estimator.needs_features for part in attack.parts().values())

        def show(name: str, done: int, todo: int) -> None:
            progress.update(chunk.first, f"{name} {done}/{todo}".strip())

        result = attacks.attack_in_batches(
            attack,
            subject.apply_features if needs_features else subject.apply_logits,
            subject.variables,
            attacks.example_keys(self._key, jnp.asarray(chunk.ids)),
            chunk.inputs,
            chunk.labels,
            batch_size=self._batch_size,
            active=rest,
            sharding=step.split(subject.mesh),
            on_batch=show,
            memory=self._kept.parts(spec, chunk.first, chunk.last),
        )
        moved = np.any((result.adv_inputs != chunk.inputs).reshape(len(rest), -1), axis=1)
        reached, margin = self._judge(np.asarray(result.adv_inputs), chunk.labels)
        fields = {
            name: value
            for name, value in result._asdict().items()
            if name in set(AttackResult._fields) - {"adv_inputs", "members"}
        }
        return {
            "ids": chunk.ids,
            "labels": chunk.labels,
            "data_hash": np.array(chunk.data_hash),
            "attacked": rest,
            "moved": moved,
            "adv_inputs": result.adv_inputs[moved],
            "reached": reached,
            "margin": margin,
            **fields,
            **{f"{_MEMBERS}{name}": value for name, value in result.members.items()},
        }

    @functools.cached_property
    def _judging(self) -> Any:
        @jax.jit
        def judge(variables: Any, batch: dict[str, Array]) -> tuple[Array, Array, Array]:
            logits = self._subject.apply_logits(variables, batch["inputs"])
            wrong = is_misclassified(logits, batch["labels"])
            reached = jnp.argmax(logits, axis=1).astype(jnp.int32)
            return wrong, reached, losses.margin(logits, batch["labels"]).astype(jnp.float32)

        return judge

    def _judge_all(self, inputs: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
        """Returns whether images are misclassified, their predicted classes and margins."""
        parts = []
        for first in range(0, len(inputs), self._batch_size):
            rows = np.arange(first, first + self._batch_size)
            is_real = rows < len(inputs)
            rows = np.where(is_real, rows, 0)
            batch = self._subject.put({"inputs": inputs[rows], "labels": labels[rows]})
            found = jax.device_get(self._judging(self._subject.variables, batch))
            parts.append([field[is_real] for field in found])
        return [np.concatenate(fields) for fields in zip(*parts, strict=True)]

    def _judge(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, reached, margin = self._judge_all(inputs, labels)
        return reached, margin

    def _clean(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the model gets right without an attack, and the classes it predicts."""
        parts = [self._judge_all(chunk.inputs, chunk.labels)[:2] for chunk in self._chunks()]
        wrong, predicted = (np.concatenate(fields) for fields in zip(*parts, strict=True))
        return ~wrong, predicted

    def _broken(
        self, attack: attacks.Attack | attacks.Ensemble, outcome: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Returns what an attack broke, bool ``[N]``: minimum-norm attacks succeed anywhere."""
        near = outcome["distance"] <= float(self._threat.epsilon)
        return outcome["success"] & (near if attack.keep == "closest" else True)

    def _verify(
        self,
        attack: attacks.Attack | attacks.Ensemble,
        outcome: Mapping[str, np.ndarray],
        images: np.ndarray,
    ) -> dict[str, int]:
        """Looks at all successes once more, without the attack's own code, in float64.

        Returns:
          ``num_successes``, and how many of them do not mislead the model, leave the box, or lie
          elsewhere than the attack says: none, if all is well.
        """
        rows = np.flatnonzero(outcome["success"])
        found = {"num_successes": len(rows), "not_misled": 0, "outside": 0, "other_distance": 0}
        if not len(rows):
            return found
        wrong, _, _ = self._judge_all(images[rows], self._labels[rows])
        clean = np.asarray(data.to_float(self._subject.test_set.images[rows]))
        change = (images[rows].astype(np.float64) - clean).reshape(len(rows), -1)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[self._threat.norm]
        size = np.linalg.norm(change, ord=order, axis=1)
        lower, upper = self._threat.bounds
        inside = np.all((images[rows] >= lower) & (images[rows] <= upper), axis=(1, 2, 3))
        if attack.keep != "closest":
            inside &= size <= float(self._threat.epsilon) * (1 + _ROUNDING) + 1e-7
        found["not_misled"] = int(np.sum(~wrong))
        found["outside"] = int(np.sum(~inside))
        found["other_distance"] = int(
            np.sum(~np.isclose(size, outcome["distance"][rows], rtol=1e-4, atol=1e-6))
        )
        return found

    def _curves(self) -> list[dict[str, Any]]:
        """Returns accuracy against epsilon, at radii that include the one that frees the whole box.

        One compilation for each attack serves all radii.
        """
        factors = {factor * float(self._threat.epsilon) for factor in CURVE_FACTORS}
        epsilons = sorted({*factors, self._box / 2, self._box})
        test_set = self._subject.test_set.take(_CURVE_EXAMPLES)
        progress = Progress("accuracy against epsilon", len(CURVES) * len(epsilons))
        curves: list[dict[str, Any]] = []
        try:
            for text, (name, options) in CURVES.items():

                @jax.jit
                def resist(
                    variables: Any,
                    batch: dict[str, Array],
                    epsilon: Array,
                    name: str = name,
                    options: dict[str, Any] = options,
                ) -> Array:
                    threat = dataclasses.replace(self._threat, epsilon=epsilon)
                    attack = attacks.create(name, threat, **options)
                    keys = attacks.example_keys(self._key, batch["ids"])
                    logits_fn = functools.partial(self._subject.apply_logits, variables)
                    inputs = data.to_float(batch["inputs"])
                    return ~attack(logits_fn, keys, inputs, batch["labels"]).success

                points = []
                for epsilon in epsilons:
                    parts = [
                        np.asarray(
                            resist(
                                self._subject.variables,
                                self._subject.put(batch),
                                jnp.float32(epsilon),
                            )
                        )[batch["mask"]]
                        for batch in data.eval_batches(test_set, self._batch_size)
                    ]
                    accuracy = float(np.concatenate(parts).mean())
                    points.append({"epsilon": epsilon, "accuracy": accuracy})
                    progress.update(len(curves) * len(epsilons) + len(points))
                curves.append({"attack": text, "num_examples": len(test_set), "points": points})
        finally:
            progress.close()
        return curves

    def _diagnose(
        self,
        built: Mapping[str, attacks.Attack | attacks.Ensemble],
        robust: Mapping[str, np.ndarray],
        outcomes: Mapping[str, Outcome],
        clean_correct: np.ndarray,
        curves: list[dict[str, Any]],
        worst: np.ndarray,
        level: str,
    ) -> tuple[list[diagnostics.Diagnostic], dict[str, Any]]:
        """Returns the judged diagnostics, and what was probed for them."""
        probed: dict[str, Any] = {}
        if level != "off":
            probed["probes"] = self._probe(level, worst)
            probed["binarization"] = self._plant(built, level)
        zero, total = (
            sum(int(outcome[field].sum()) for outcome in outcomes.values())
            for field in ("num_zero_gradients", "num_backwards")
        )
        judged = diagnostics.diagnose(
            robust,
            curves={
                curve["attack"]: [
                    (point["epsilon"], point["accuracy"]) for point in curve["points"]
                ]
                for curve in curves
            },
            curve_examples=curves[0]["num_examples"],
            box=self._box,
            epsilon=float(self._threat.epsilon),
            zero_gradient_share=zero / max(total, 1),
            num_classes=self._subject.test_set.num_classes,
            minimum_norms={
                spec: (outcome["success"], outcome["distance"], clean_correct)
                for spec, outcome in outcomes.items()
                if built[spec].keep == "closest" and outcome["attacked"].all()
            },
            **probed,
        )
        return judged, probed

    def _probe(self, level: str, worst: np.ndarray) -> dict[str, Any]:
        subject, size = self._subject, min(len(worst), _PROBED[level])
        inputs = np.asarray(data.to_float(subject.test_set.images[:size]))
        progress = Progress("signs of masked gradients", 1)
        try:
            return probes.measure(
                jax.tree_util.Partial(subject.apply_logits, subject.variables),
                attacks.example_keys(self._key, jnp.asarray(subject.test_set.ids[:size])),
                inputs,
                self._labels[:size],
                self._threat,
                level=level,
                survived=worst[:size],
                batch_size=self._batch_size,
                sharding=step.split(subject.mesh),
            )
        finally:
            progress.close()

    def _plant(
        self, built: Mapping[str, attacks.Attack | attacks.Ensemble], level: str
    ) -> dict[str, Any] | None:
        """Makes the binarisation test of the first gradient attack inside the ball."""
        subject = self._subject
        parts = ((spec, part) for spec, attack in built.items() for part in attack.parts().values())
        suited = [
            (spec, part)
            for spec, part in parts
            if part.keep == "best"
            and not part.estimator.needs_features
            and spec.split(":")[0] not in ("fgsm", "square")
        ]
        if not suited:
            return None
        spec, attack = suited[0]
        size = min(len(subject.test_set), _PLANTED[level])

        def features_fn(variables: Any, inputs: Array) -> Array:
            if subject.layers == (INPUT,):
                return subject.apply_logits(variables, inputs)
            # In the order of the forward pass: the last is what the head sees.
            feature = [*subject.apply_features(variables, {}, inputs)[1].values()][-1]
            if feature.ndim == 4 and feature[0].size > _MAX_FEATURES:
                feature = feature.mean(axis=(1, 2))
            return feature.reshape(len(feature), -1)

        @jax.jit
        def plant(variables: Any, inputs: Array, keys: Array) -> binarization.BinarizationResult:
            return binarization.binarization_test(
                functools.partial(features_fn, variables), attack, keys, inputs
            )

        keys = attacks.example_keys(self._key, jnp.asarray(subject.test_set.ids[:size]))
        inputs = data.to_float(subject.test_set.images[:size])
        found = binarization.summary(jax.device_get(plant(subject.variables, inputs, keys)))
        return {**found, "attack": spec}

    def _geometry(
        self, outcomes: Mapping[str, Outcome], images: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], Outcome]:
        """Returns what the geometry of the first batch is, and a few of its examples to show.

        The geometry is alignment, radial degree, the radial and tangential shares of every attack's
        perturbations, and the loss along directions.
        """
        subject = self._subject
        shown_spec = max(outcomes, key=lambda spec: outcomes[spec]["success"].mean())
        layer = subject.layers[0]
        batch = next(iter(data.eval_batches(subject.test_set, self._batch_size)))
        mask = batch["mask"]
        size = int(mask.sum())

        def padded(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[:size], np.repeat(values[:1], len(mask) - size, axis=0)])

        @jax.jit
        def measure(variables: Any, batch: dict[str, Any], key: Array) -> dict[str, Any]:
            inputs, labels = data.to_float(batch["inputs"]), batch["labels"]
            apply_fn = functools.partial(subject.apply_features, variables)
            return {
                "layers": geometry.layer_geometry(apply_fn, inputs, labels, subject.layer_norms),
                "shares": {
                    spec: geometry.tangential_shares(apply_fn, inputs, adv_inputs)
                    for spec, adv_inputs in batch["adversarial"].items()
                },
                "directions": geometry.loss_along_directions(
                    apply_fn,
                    key,
                    inputs,
                    labels,
                    layer=layer,
                    lengths=jnp.asarray(LENGTHS, jnp.float32),
                ),
                "clean_predictions": jnp.argmax(apply_fn({}, inputs)[0], axis=1),
                "surface": self._surface(
                    lambda x: apply_fn({}, x)[0],
                    key,
                    inputs,
                    labels,
                    batch["adversarial"][shown_spec],
                ),
            }

        given = {
            "inputs": batch["inputs"],
            "labels": batch["labels"],
            "adversarial": {spec: padded(values) for spec, values in images.items()},
        }
        measured = jax.device_get(measure(subject.variables, subject.put(given), self._key))
        right = mask & (measured["clean_predictions"] == batch["labels"])
        attacked = {spec: right & padded(outcome["success"]) for spec, outcome in outcomes.items()}

        def share(spec: str, name: str) -> float | None:
            chosen = measured["shares"][spec][name][attacked[spec]]
            return float(chosen.mean()) if chosen.size else None

        layers = {
            name: {
                "alignment_mean": float(values["alignment"][mask].mean()),
                "radial_degree_median": _median(values["radial_degree"][mask]),
                "tangential_share_mean": share(shown_spec, name),
                "tangential_shares": {spec: share(spec, name) for spec in outcomes},
            }
            for name, values in sorted(
                measured["layers"].items(), key=lambda item: item[0] != layer
            )
        }
        results = {
            "geometry": {"num_examples": size, "attack": shown_spec},
            "layers": layers,
            "directions": {
                "layer": layer,
                "lengths": list(LENGTHS),
                "median_log_odds": {
                    name: [_median(values) for values in curve[:, mask]]
                    for name, curve in measured["directions"].items()
                },
            },
        }
        seen = attacked[shown_spec]
        if seen.any():
            results["loss_surface"] = {
                "lengths": list(SURFACE_LENGTHS),
                "unit": "epsilon",
                "axes": [f"along {shown_spec}", "random direction"],
                "num_examples": int(seen.sum()),
                "median_log_odds": [
                    [_median(values) for values in row] for row in measured["surface"][..., seen]
                ],
            }
        rows = slice(0, min(_SHOWN_EXAMPLES, size))
        shown = {
            "clean": np.asarray(data.to_float(batch["inputs"]))[rows],
            "adversarial": images[shown_spec][rows],
            "success": outcomes[shown_spec]["success"][rows],
            "predictions": outcomes[shown_spec]["reached"][rows],
            "clean_predictions": measured["clean_predictions"][rows],
            "labels": batch["labels"][rows],
        }
        return results, shown

    def _surface(
        self, logits_fn: LogitsFn, key: Array, inputs: Array, labels: Array, adv_inputs: Array
    ) -> Array:
        """Returns the log-odds over the plane of an attack and of a random direction.

        Both have the threat norm epsilon; the plane of an example that the attack failed on means
        nothing.
        """
        change = adv_inputs - inputs
        length = norms.vector_norm(change, self._threat.norm)
        along = change / norms.expand(jnp.where(length > 0, length, 1), change)
        noise = jax.random.normal(key, inputs.shape, inputs.dtype)
        across = self._threat.steepest_step(inputs, noise)
        return geometry.loss_surface(
            logits_fn,
            inputs,
            labels,
            float(self._threat.epsilon) * along,
            float(self._threat.epsilon) * across,
            jnp.asarray(SURFACE_LENGTHS, jnp.float32),
            bounds=self._threat.bounds,
        )


def _first_broken(broken: Mapping[str, np.ndarray], clean_correct: np.ndarray) -> np.ndarray:
    """Returns the number of the first attack that broke each example, int32 ``[N]``.

    It is -1 where none did, and -2 where the model was wrong without an attack.
    """
    first = np.full(len(clean_correct), -1, np.int32)
    for number, value in enumerate(broken.values()):
        first[(first == -1) & value] = number
    first[~clean_correct] = -2
    return first


def _adversarial(
    first_broken: np.ndarray, outcomes: Mapping[str, Outcome], images: Mapping[str, np.ndarray]
) -> Outcome:
    """Returns the broken examples: their rows, images, distances, margins, classes and attacks."""
    rows = np.flatnonzero(first_broken >= 0)
    specs = list(outcomes)
    by_field: dict[str, list[Any]] = collections.defaultdict(list)
    for row in rows:
        spec = specs[first_broken[row]]
        by_field["images"].append(images[spec][row])
        for field in ("distance", "margin", "reached"):
            by_field[field].append(outcomes[spec][field][row])
    empty = {"images": next(iter(images.values()))[:0]}
    return {
        "rows": rows,
        "attack": first_broken[rows],
        "attacks": np.array(specs),
        **empty,
        **{field: np.stack(values) for field, values in by_field.items()},
    }


def minimum_norm(
    outcome: Mapping[str, np.ndarray], clean_correct: np.ndarray, norm: str
) -> dict[str, Any]:
    """Returns what a minimum-norm attack found for the inputs that are right without it.

    Failures count as infinite: the median is ``None`` where it is, and the last share of the CDF
    stays below 1.

    Args:
      outcome: ``success``, ``distance`` and ``attacked``, each ``[N]``.
      clean_correct: bool ``[N]``.
      norm: of the distances.
    """
    chosen = clean_correct & outcome["attacked"]
    success, distance = outcome["success"][chosen], outcome["distance"][chosen]
    median = float(np.median(np.where(success, distance, np.inf))) if success.size else np.inf
    found = np.sort(distance[success])
    shares = np.arange(1, len(found) + 1) / max(success.size, 1)
    kept = np.unique(np.linspace(0, len(found) - 1, _CDF_POINTS).round().astype(int))
    cdf = [[float(found[i]), float(shares[i])] for i in kept] if len(found) else []
    return {
        "norm": norm,
        "num_examples": int(success.size),
        "success_rate": float(success.mean()) if success.size else None,
        "median": median if np.isfinite(median) else None,
        "mean_of_successes": float(found.mean()) if len(found) else None,
        "cdf": cdf,
    }


def _median(values: np.ndarray) -> float | None:
    """Returns the median of the finite values; ``None`` without any, as in a dead network."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None
