"""An evaluation from attacks to results: what is attacked, recorded, and measured besides."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data, distributed
from gfa_jax.evaluation import intervals, masking, records, references
from gfa_jax.evaluation.close_up import close_up
from gfa_jax.evaluation.curves import accuracy_curves
from gfa_jax.evaluation.outcomes import (
    MEMBERS,
    Outcome,
    adversarial_images,
    broken,
    first_broken,
    minimum_norm,
    verify,
)
from gfa_jax.evaluation.subject import Subject, hash_examples
from gfa_jax.threat import ThreatModel
from gfa_jax.training import layout
from gfa_jax.training.progress import Progress
from gfa_jax.types import AttackResult

_BATCHES_PER_CHUNK = 4
_OF_EACH_EXAMPLE = (
    *("success", "distance", "margin", "reached", "attacked"),
    *("num_forwards", "num_backwards"),
)
"""What ``outcomes.npz`` says of every attack on every example."""


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
        self._key = jax.device_put(jax.random.key(seed), layout.replicated(subject.mesh))

    def run(
        self,
        built: Mapping[str, attacks.Attack | attacks.Ensemble],
        *,
        sequential: bool = False,
        level: str = "quick",
        others: Sequence[references.Reference] = (),
    ) -> tuple[dict[str, Any], Outcome, Outcome, Outcome]:
        """Makes all measurements.

        Args:
          built: attacks by their spec.
          sequential: whether each attack is made on what those before it left.
          level: one of ``masking.LEVELS``.
          others: evaluations of other models, whose adversarial images are one more attack each.

        Returns:
          ``(results, outcomes, adversarial, shown)``: JSON-ready results; arrays ``[N]`` of what
          happened to each example; the adversarial image of each broken example with its row, by
          the first attack that found one; a few images to show.
        """
        started = time.monotonic()
        epsilon = float(self._threat.epsilon)
        setting = (self._subject, self._threat, self._key, self._batch_size)
        clean_correct, predicted = self._clean()
        outcomes: dict[str, Outcome] = {}
        images: dict[str, np.ndarray] = {}
        rest = np.ones(len(clean_correct), bool)
        worst = clean_correct
        found: dict[str, np.ndarray] = {}
        closest = [spec for spec, attack in built.items() if attack.keep == "closest"]
        by_spec = {other.spec: other for other in others}
        for spec in (*built, *by_spec):
            outcomes[spec], images[spec] = (
                self._attack(spec, built[spec], rest)
                if spec in built
                else references.transfer(
                    by_spec[spec], self._subject, self._threat, self._batch_size, rest
                )
            )
            found[spec] = broken(outcomes[spec], epsilon, any_distance=spec in closest)
            worst = worst & ~found[spec]
            if sequential:
                rest = worst
        robust = {spec: clean_correct & ~value for spec, value in found.items()}
        if sequential:
            # Of each attack together with those before it.
            for before, after in zip(list(robust)[:-1], list(robust)[1:], strict=True):
                robust[after] = robust[after] & robust[before]
        first = first_broken(found, clean_correct)
        curves = accuracy_curves(*setting)
        geometry_results, shown = close_up(*setting, outcomes, images)
        # Attacks on different examples do not compare.
        comparable = {} if sequential else robust
        judged, probed = masking.diagnose(
            *setting, built, comparable, outcomes, clean_correct, curves, worst, level, others
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
                spec: int(np.sum(first == number)) for number, spec in enumerate(outcomes)
            },
            "minimum_norm": {
                spec: minimum_norm(outcomes[spec], clean_correct, self._threat.norm)
                for spec in closest
            },
            "members": {
                spec: {
                    name.removeprefix(MEMBERS): int(value.sum())
                    for name, value in outcome.items()
                    if name.startswith(MEMBERS)
                }
                for spec, outcome in outcomes.items()
                if isinstance(built.get(spec), attacks.Ensemble)
            },
            "verification": {
                spec: verify(
                    self._subject,
                    self._threat,
                    self._batch_size,
                    outcome,
                    images[spec],
                    any_distance=spec in closest,
                )
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
            "labels": self._subject.test_set.labels,
            "predicted": predicted,
            "clean_correct": clean_correct,
            "worst_case": worst,
            "first_broken_by": first,
            **{f"robust/{spec}": value for spec, value in robust.items()},
            **{
                f"{field}/{spec}": outcome[field]
                for spec, outcome in outcomes.items()
                for field in _OF_EACH_EXAMPLE
            },
        }
        return results, by_example, adversarial_images(first, outcomes, images), shown

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

        Several processes share the chunks, and read each other's records.

        Returns:
          The outcome, and the images ``[N, H, W, C]`` that the attack ends at.
        """
        chunks = list(self._chunks())
        own = chunks[jax.process_index() :: jax.process_count()]
        progress = Progress(spec, sum(len(chunk.ids) for chunk in own))
        resist = np.zeros(0, bool)
        try:
            for chunk in own:
                record = self._kept.load(spec, chunk.first, chunk.last)
                if record is None:
                    record = self._attack_chunk(
                        spec, attack, chunk, rest[chunk.rows], len(resist), progress
                    )
                    self._kept.save(spec, chunk.first, chunk.last, record)
                _check_record(record, spec, chunk, rest[chunk.rows])
                resist = np.concatenate([resist, ~record["success"]])
                progress.update(len(resist), f"{resist.mean():.1%} resist")
        finally:
            progress.close()
        distributed.wait_for_all(spec)
        parts, images = [], []
        for chunk in chunks:
            record = self._kept.wait_for(spec, chunk.first, chunk.last)
            _check_record(record, spec, chunk, rest[chunk.rows])
            adv_inputs = chunk.inputs.copy()
            adv_inputs[record["moved"]] = record["adv_inputs"]
            parts.append(record)
            images.append(adv_inputs)
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
        done_before: int,
        progress: Progress,
    ) -> dict[str, np.ndarray]:
        subject = self._subject
        needs_features = any(part.estimator.needs_features for part in attack.parts().values())

        def show(name: str, done: int, todo: int) -> None:
            progress.update(done_before, f"{name} {done}/{todo}".strip())

        result = attacks.attack_in_batches(
            attack,
            subject.apply_features if needs_features else subject.apply_logits,
            subject.variables,
            attacks.example_keys(self._key, jnp.asarray(chunk.ids)),
            chunk.inputs,
            chunk.labels,
            batch_size=self._batch_size,
            active=rest,
            sharding=layout.split(subject.mesh),
            on_batch=show,
            memory=self._kept.parts(spec, chunk.first, chunk.last),
        )
        moved = np.any((result.adv_inputs != chunk.inputs).reshape(len(rest), -1), axis=1)
        _, reached, margin = subject.judge(
            np.asarray(result.adv_inputs), chunk.labels, self._batch_size
        )
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
            **{f"{MEMBERS}{name}": value for name, value in result.members.items()},
        }

    def _clean(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the model gets right without an attack, and the classes it predicts."""
        parts = [
            self._subject.judge(chunk.inputs, chunk.labels, self._batch_size)[:2]
            for chunk in self._chunks()
        ]
        wrong, predicted = (np.concatenate(fields) for fields in zip(*parts, strict=True))
        return ~wrong, predicted


def _check_record(
    record: Mapping[str, np.ndarray], spec: str, chunk: _Chunk, rest: np.ndarray
) -> None:
    """Refuses a record of other examples."""
    expected = {"data_hash": np.array(chunk.data_hash), "attacked": rest}
    for name, value in expected.items():
        if not np.array_equal(record[name], value):
            raise records.RecordsMismatchError(
                f"the record of {spec!r}, examples {chunk.first} to {chunk.last}, differs in "
                f"{name}: it belongs to another evaluation. Use another --out folder."
            )
