"""The evaluation driver: attacks a trained run, measures its geometry, and writes a report."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gfa_jax
from gfa_jax import _validate, attacks, cli, data, files, norms
from gfa_jax import config as config_lib
from gfa_jax.attacks.base import is_misclassified
from gfa_jax.attacks.estimators import Estimator
from gfa_jax.evaluation import diagnostics, geometry, loading, records, report
from gfa_jax.threat import ThreatModel
from gfa_jax.training import loop, step
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array, Batch, Features, Taps

CURVE_ATTACK = "pgd-margin"
CURVE_STEPS = 20
CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
LENGTHS = tuple(np.linspace(-0.5, 0.5, 21).round(3).tolist())
_CURVE_EXAMPLES = 500
_SHOWN_EXAMPLES = 8
_MEMBERS = "members/"


@dataclasses.dataclass(frozen=True)
class EvalFlags:
    """Flags of ``eval.py``."""

    workdir: str
    """Folder of the run, as given to train.py."""
    attacks: str = "fgsm,pgd,apgd-ce,apgd-t,square:num_queries=1000"
    """Comma-separated attacks; options after colons: pgd-margin:num_steps=100:num_restarts=5."""
    norm: str | None = None
    """linf, l2 or l1; by default that of the run's threat model."""
    epsilon: float | None = None
    """Radius for images in [0, 1], such as 8/255; by default that of the run's threat model."""
    num_examples: int | None = None
    """The first so many test examples; all by default."""
    batch_size: int = 200
    """Examples attacked at once, over all devices."""
    checkpoint: str = "latest"
    """latest, best (on the validation split) or a step."""
    seed: int = 0
    """Of the attacks' random starts."""
    data_dir: str | None = None
    """Where the data lies, if not where the run was trained on it."""
    out: str | None = None
    """Folder of the results; WORKDIR/eval by default."""


def parse_attack(spec: str) -> tuple[str, dict[str, Any]]:
    """Parses ``name[:option=value[:option=value]]``.

    Raises:
      ValueError: for an unknown attack or option, or a part that is not ``option=value``.
    """
    name, *parts = spec.strip().split(":")
    known = attacks.options_of(name)
    options: dict[str, Any] = {}
    for part in parts:
        option, separator, text = part.partition("=")
        if not separator:
            raise ValueError(
                f"attacks={spec!r}: {part!r} is not option=value, such as num_steps=100."
            )
        _validate.known_options(f"attack {name!r}", {option: text}, known)
        options[option] = _parse_value(spec, option, known[option].default, text)
    return name, options


def _parse_value(spec: str, option: str, default: object, text: str) -> Any:
    """Parses an option's text as the kind of its default.

    ``None`` stands for a number, and a tuple for names joined by ``+``.
    """
    if isinstance(default, Estimator):
        raise ValueError(f"attacks={spec!r}: {option} cannot be given as text.")
    if isinstance(default, str | tuple):
        return text
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int) or (default is None and text.isdecimal()):
            return int(text)
        return cli.parse_number(text)
    except (KeyError, ValueError) as error:
        kind = {bool: "true or false", int: "an integer"}.get(type(default), "a number")
        raise ValueError(f"attacks={spec!r}: {option}={text} must be {kind}.") from error


def evaluate(flags: EvalFlags) -> dict[str, Any]:
    """Evaluates a run and writes the results, the records and a report.

    The files are ``results.json``, ``records/``, ``examples.npz`` and ``report.html``. An
    evaluation that was stopped goes on with the attacks and chunks that are missing.

    Args:
      flags: see ``EvalFlags``.

    Returns:
      The content of ``results.json``.

    Raises:
      ValueError: for flags out of range, unknown attacks or options, or an output folder of another
        evaluation.
      FileNotFoundError: for a missing run, checkpoint or data set.
    """
    _validate.positive_integer(batch_size=flags.batch_size)
    if flags.norm is not None:
        _validate.one_of(norms.DUALS, norm=flags.norm)
    if flags.num_examples is not None:
        _validate.positive_integer(num_examples=flags.num_examples)
    specs = [spec.strip() for spec in flags.attacks.split(",") if spec.strip()]
    if not specs:
        raise ValueError(
            f"attacks={flags.attacks!r} names no attack; known are {sorted(attacks.REGISTRY)}."
        )
    parsed = {spec: parse_attack(spec) for spec in specs}
    workdir = pathlib.Path(flags.workdir)
    run = loading.load_run(
        workdir,
        which=flags.checkpoint,
        num_examples=flags.num_examples,
        data_dir=flags.data_dir,
    )
    if flags.norm not in (None, run.config.threat.norm) and flags.epsilon is None:
        raise ValueError(
            f"norm={flags.norm!r} needs an epsilon of its own: {run.config.threat.epsilon} is the "
            f"run's radius in {run.config.threat.norm}."
        )
    threat = ThreatModel(
        norm=flags.norm or run.config.threat.norm,
        epsilon=run.config.threat.epsilon if flags.epsilon is None else flags.epsilon,
    )
    built = {
        spec: attacks.create(name, threat, **options) for spec, (name, options) in parsed.items()
    }
    for spec, attack in built.items():
        if any(member.estimator.is_random for member in attack.parts().values()):
            raise ValueError(
                f"attacks={spec!r} attacks randomised models, which runs of train.py are not."
            )
    out = pathlib.Path(flags.out) if flags.out else workdir / "eval"
    num_devices = jax.device_count()
    batch_size = -(-min(flags.batch_size, len(run.test_set)) // num_devices) * num_devices
    header = {
        "weights_hash": run.weights_hash,
        "config_hash": hashlib.sha256(
            json.dumps(config_lib.to_dict(run.config), sort_keys=True).encode()
        ).hexdigest(),
        "norm": threat.norm,
        "epsilon": float(threat.epsilon),
        "seed": flags.seed,
        "batch_size": batch_size,
        "num_examples": len(run.test_set),
        "data_hash": loading.hash_tree((run.test_set.images, run.test_set.labels)),
        "gfa_jax": gfa_jax.__version__,
        "jax": f"{jax.__version__} ({jax.default_backend()})",
    }
    kept = records.Records(out / "records", header)
    # Attacks and their verdicts use full float32 products: TF32 or bfloat16 flips borderline
    # examples.
    with jax.default_matmul_precision("highest"):
        evaluation = _Evaluation(run, threat, kept, batch_size, flags.seed)
        results = evaluation.run(built)
    results["versions"] = loop.versions()
    results["name"] = workdir.resolve().name
    results["data"]["hash"] = header["data_hash"]
    results["config"] = config_lib.to_dict(run.config)
    examples = results.pop("examples")
    files.write_json(out / "results.json", results)
    report.save_examples(out / "examples.npz", examples)
    report.write_report([(results, examples)], out / "report.html")
    return results


class _Evaluation:
    """One evaluation: what its parts share."""

    def __init__(
        self,
        run: loading.LoadedRun,
        threat: ThreatModel,
        kept: records.Records,
        batch_size: int,
        seed: int,
    ) -> None:
        self.run_ = run
        self.threat = threat
        self.kept = kept
        self.batch_size = batch_size
        self.key = jax.device_put(jax.random.key(seed), step.replicated(run.mesh))
        self.box = _box_radius(threat, run.recipe.image_shape)

        # One function each for all chunks: compiled programs are kept by it.
        def apply_features(variables: Any, taps: Taps, inputs: Array) -> tuple[Array, Features]:
            params, model_state = variables
            return run.apply(params, model_state, taps, inputs)

        def apply_logits(variables: Any, inputs: Array) -> Array:
            return apply_features(variables, {}, inputs)[0]

        self._apply_features, self._apply_logits = apply_features, apply_logits

    def run(self, built: Mapping[str, attacks.Attack | attacks.Ensemble]) -> dict[str, Any]:
        """Returns the results, with the shown examples under ``examples``."""
        started = time.monotonic()
        outcomes = {spec: self._attack(spec, attack) for spec, attack in built.items()}
        clean_correct = self._clean_correct()
        # Minimum-norm attacks succeed at any distance.
        closest = [spec for spec, attack in built.items() if attack.keep == "closest"]
        broken = {
            spec: outcome["success"]
            & ((outcome["distance"] <= self.threat.epsilon) | (spec not in closest))
            for spec, outcome in outcomes.items()
        }
        robust = {spec: clean_correct & ~value for spec, value in broken.items()}
        worst = functools.reduce(np.logical_and, robust.values())
        curve = self._curve()
        zero, total = (
            sum(int(o[field].sum()) for o in outcomes.values())
            for field in ("num_zero_gradients", "num_backwards")
        )
        robust_accuracy = {spec: float(value.mean()) for spec, value in robust.items()}
        geometry_results, examples = self._geometry(built)
        return {
            "clean_accuracy": float(clean_correct.mean()),
            "robust_accuracy": {**robust_accuracy, "worst_case": float(worst.mean())},
            "minimum_norm": {
                spec: _minimum_norm(outcomes[spec], clean_correct) for spec in closest
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
            "diagnostics": diagnostics.diagnose(
                robust,
                curve=[(point["epsilon"], point["accuracy"]) for point in curve],
                curve_examples=min(len(worst), _CURVE_EXAMPLES),
                box=self.box,
                zero_gradient_share=zero / max(total, 1),
            ),
            "threat": {
                "norm": self.threat.norm,
                "epsilon": float(self.threat.epsilon),
                "bounds": list(self.threat.bounds),
            },
            "num_examples": len(worst),
            "data": {"name": self.run_.config.data.name, "split": "test"},
            "counts": {
                spec: {
                    field: int(outcome[field].sum())
                    for field in ("num_forwards", "num_backwards", "num_zero_gradients")
                }
                for spec, outcome in outcomes.items()
            },
            "curve": {
                "attack": f"{CURVE_ATTACK}:num_steps={CURVE_STEPS}",
                "num_examples": min(len(worst), _CURVE_EXAMPLES),
                "points": curve,
            },
            **geometry_results,
            "seconds": time.monotonic() - started,
            "precision": "float32, matmul precision highest",
            "checkpoint_step": self.run_.step,
            "weights_hash": self.run_.weights_hash,
            "examples": examples,
        }

    def _batches(
        self, num_examples: int | None = None
    ) -> list[tuple[int, int, dict[str, np.ndarray]]]:
        """Returns ``(first, last, batch)`` for each chunk; the last batch is padded."""
        test_set = (
            self.run_.test_set if num_examples is None else self.run_.test_set.take(num_examples)
        )
        chunks = []
        for index, batch in enumerate(data.eval_batches(test_set, self.batch_size)):
            first = index * self.batch_size
            chunks.append((first, first + int(batch["mask"].sum()) - 1, batch))
        return chunks

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return jax.device_put(dict(batch), step.split(self.run_.mesh))

    def _attack(
        self, spec: str, attack: attacks.Attack | attacks.Ensemble
    ) -> dict[str, np.ndarray]:
        """Returns the per-example results of one attack, from the records where they are there."""
        variables = (self.run_.params, self.run_.model_state)
        needs_features = any(part.estimator.needs_features for part in attack.parts().values())
        chunks = self._batches()
        progress = Progress(spec, len(chunks))
        parts = []
        try:
            for number, (first, last, batch) in enumerate(chunks, start=1):
                record = self.kept.load(spec, first, last)
                if record is None:
                    size = last - first + 1
                    result = attacks.attack_in_batches(
                        attack,
                        self._apply_features if needs_features else self._apply_logits,
                        variables,
                        attacks.example_keys(self.key, jnp.asarray(batch["ids"][:size])),
                        np.asarray(data.to_float(batch["inputs"][:size])),
                        batch["labels"][:size],
                        batch_size=self.batch_size,
                        sharding=step.split(self.run_.mesh),
                    )
                    fields = {
                        name: value
                        for name, value in result._asdict().items()
                        if name not in ("adv_inputs", "members")
                    } | {f"{_MEMBERS}{name}": value for name, value in result.members.items()}
                    record = {
                        "ids": batch["ids"][:size],
                        "labels": batch["labels"][:size],
                        **fields,
                    }
                    self.kept.save(spec, first, last, record)
                parts.append(record)
                progress.update(
                    number,
                    f"{np.mean(np.concatenate([~part['success'] for part in parts])):.1%} resist",
                )
        finally:
            progress.close()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _clean_correct(self) -> np.ndarray:
        @jax.jit
        def correct(params: Any, model_state: Any, batch: Batch) -> Array:
            logits, _ = self.run_.apply(params, model_state, {}, data.to_float(batch["inputs"]))
            return ~is_misclassified(logits, batch["labels"])

        parts = [
            np.asarray(correct(self.run_.params, self.run_.model_state, self._put(batch)))[
                : last - first + 1
            ]
            for first, last, batch in self._batches()
        ]
        return np.concatenate(parts)

    def _curve(self) -> list[dict[str, float]]:
        """Returns accuracy against epsilon, at radii that include the one that frees the whole box.

        One compilation serves all radii.
        """

        @jax.jit
        def resist(
            params: Any, model_state: Any, batch: Batch, key: Array, epsilon: Array
        ) -> Array:
            threat = dataclasses.replace(self.threat, epsilon=epsilon)
            attack = attacks.create(CURVE_ATTACK, threat, num_steps=CURVE_STEPS)
            keys = attacks.example_keys(key, batch["ids"])
            logits_fn = lambda inputs: self.run_.apply(params, model_state, {}, inputs)[0]  # noqa: E731
            return ~attack(logits_fn, keys, data.to_float(batch["inputs"]), batch["labels"]).success

        epsilons = sorted(
            {*(factor * float(self.threat.epsilon) for factor in CURVE_FACTORS), self.box}
        )
        progress = Progress("accuracy against epsilon", len(epsilons))
        points = []
        try:
            for number, epsilon in enumerate(epsilons, start=1):
                parts = [
                    np.asarray(
                        resist(
                            self.run_.params,
                            self.run_.model_state,
                            self._put(batch),
                            self.key,
                            jnp.float32(epsilon),
                        )
                    )[: last - first + 1]
                    for first, last, batch in self._batches(_CURVE_EXAMPLES)
                ]
                points.append({"epsilon": epsilon, "accuracy": float(np.concatenate(parts).mean())})
                progress.update(number)
        finally:
            progress.close()
        return points

    def _geometry(
        self, built: Mapping[str, attacks.Attack | attacks.Ensemble]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns what the geometry of the first batch is, and a few of its examples to show.

        The geometry is alignment, radial degree, tangential shares and direction curves.
        """
        run = self.run_
        shown_spec = next((spec for spec in built if spec.startswith("pgd-margin")), "pgd-margin")
        shown_attack = built.get(shown_spec) or attacks.create("pgd-margin", self.threat)

        @jax.jit
        def measure(params: Any, model_state: Any, batch: Batch, key: Array) -> dict[str, Any]:
            inputs, labels = data.to_float(batch["inputs"]), batch["labels"]
            apply_fn = functools.partial(run.apply, params, model_state)
            result = shown_attack(
                lambda x: apply_fn({}, x)[0],
                attacks.example_keys(key, batch["ids"]),
                inputs,
                labels,
            )
            return {
                "layers": geometry.layer_geometry(apply_fn, inputs, labels, run.recipe.layer_norms),
                "shares": geometry.tangential_shares(apply_fn, inputs, result.adv_inputs),
                "directions": geometry.loss_along_directions(
                    apply_fn,
                    key,
                    inputs,
                    labels,
                    layer=run.recipe.layers[0],
                    lengths=jnp.asarray(LENGTHS, jnp.float32),
                ),
                "clean": inputs,
                "adversarial": result.adv_inputs,
                "success": result.success,
                "predictions": jnp.argmax(apply_fn({}, result.adv_inputs)[0], axis=1),
                "clean_predictions": jnp.argmax(apply_fn({}, inputs)[0], axis=1),
            }

        _, _, batch = self._batches()[0]
        mask = batch["mask"]
        measured = jax.device_get(measure(run.params, run.model_state, self._put(batch), self.key))
        attacked = mask & measured["success"] & (measured["clean_predictions"] == batch["labels"])
        layers = {
            name: {
                "alignment_mean": float(values["alignment"][mask].mean()),
                "radial_degree_median": _median(values["radial_degree"][mask]),
                "tangential_share_mean": float(measured["shares"][name][attacked].mean())
                if attacked.any()
                else None,
            }
            for name, values in sorted(
                measured["layers"].items(), key=lambda layer: layer[0] != run.recipe.layers[0]
            )
        }
        results = {
            "geometry": {"num_examples": int(mask.sum()), "attack": shown_spec},
            "layers": layers,
            "directions": {
                "layer": run.recipe.layers[0],
                "lengths": list(LENGTHS),
                "median_log_odds": {
                    name: [_median(values) for values in curve[:, mask]]
                    for name, curve in measured["directions"].items()
                },
            },
        }
        shown = slice(0, min(_SHOWN_EXAMPLES, int(mask.sum())))
        names = ("clean", "adversarial", "success", "predictions", "clean_predictions")
        examples = {name: measured[name][shown] for name in names} | {
            "labels": batch["labels"][shown]
        }
        return results, examples


def _minimum_norm(outcome: Mapping[str, np.ndarray], clean_correct: np.ndarray) -> dict[str, Any]:
    """Returns what a minimum-norm attack found for the inputs that are right without it.

    The median counts failures as infinite, and is ``None`` where it is.
    """
    success, distance = outcome["success"][clean_correct], outcome["distance"][clean_correct]
    median = float(np.median(np.where(success, distance, np.inf))) if success.size else np.inf
    return {
        "success_rate": float(success.mean()) if success.size else None,
        "median": median if np.isfinite(median) else None,
        "mean_of_successes": float(distance[success].mean()) if success.any() else None,
    }


def _median(values: np.ndarray) -> float | None:
    """Returns the median of the finite values; ``None`` without any, as in a dead network."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _box_radius(threat: ThreatModel, image_shape: Sequence[int]) -> float:
    """Returns the epsilon whose ball around any image holds the whole box."""
    corner = np.full((1, *image_shape), threat.bounds[1] - threat.bounds[0], np.float32)
    return float(norms.vector_norm(jnp.asarray(corner), threat.norm)[0])
