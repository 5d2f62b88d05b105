"""Evaluations of trained runs and of any other classifier: what eval.py does."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import gfa_jax
from gfa_jax import _validate, attacks, cli, distributed, files, norms
from gfa_jax.attacks.estimators import Estimator
from gfa_jax.evaluation import driver, loading, masking, memory, records, report, subject
from gfa_jax.evaluation import references as references_lib
from gfa_jax.evaluation.outcomes import Outcome
from gfa_jax.threat import ThreatModel
from gfa_jax.training import run_folder
from gfa_jax.types import Array

MODES = ("standalone", "sequential")
DEFAULT_ATTACKS = "fgsm,pgd,apgd-ce,apgd-t,square:num_queries=1000"


@dataclasses.dataclass(frozen=True)
class EvalFlags(distributed.Cluster):
    """Flags of ``eval.py``."""

    workdir: str
    """Folder of the run, as given to train.py."""
    attacks: str = DEFAULT_ATTACKS
    """Comma-separated attacks; options after colons: pgd-margin:num_steps=100:num_restarts=5."""
    norm: str | None = None
    """linf, l2 or l1; by default that of the run's threat model."""
    epsilon: float | None = None
    """Radius for images in [0, 1], such as 8/255; by default that of the run's threat model."""
    split: str = "test"
    """Examples of the run's data: test, or validation, to choose among recipes by."""
    num_examples: int | None = None
    """The first so many examples; all by default."""
    batch_size: int = 200
    """Examples attacked at once, over all devices."""
    mode: str = "standalone"
    """standalone: every attack on all examples. sequential: each on what those before it left,
    which is faster and says the same of the worst case."""
    diagnostics: str = "quick"
    """off, quick or full: how long to look for signs that the attacks are being fooled."""
    checkpoint: str = "latest"
    """latest, best (on the validation split) or a step."""
    seed: int = 0
    """Of the attacks' random starts."""
    references: str = ""
    """Comma-separated --out folders of other models' evaluations on the same images, best one
    without defence and one trained against PGD: their adversarial images are tried on this model,
    and signs of gradient masking judged beside them."""
    data_dir: str | None = None
    """Where the data lies, if not where the run was trained on it."""
    out: str | None = None
    """Folder of the results; WORKDIR/eval by default, WORKDIR/eval-validation for that split."""


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
        default = known[option].default
        if isinstance(default, Estimator):
            raise ValueError(f"attacks={spec!r}: {option} cannot be given as text.")
        options[option] = cli.parse_value(text, default, f"attacks={spec!r}: {option}")
    return name, options


def evaluate(flags: EvalFlags) -> dict[str, Any]:
    """Evaluates a run and writes the results, the records and a report.

    The files are ``results.json``, ``outcomes.npz`` and ``adversarial.npz`` (what happened to each
    example), ``records/``, ``examples.npz`` and ``report.html``. An evaluation that was stopped
    goes on with what is missing; one of more examples takes over the chunks that are there. Several
    processes share the chunks of every attack; each makes the other measurements, and process 0
    writes.

    Args:
      flags: see ``EvalFlags``.

    Returns:
      The content of ``results.json``.

    Raises:
      ValueError: for flags out of range, unknown attacks or options, or an output folder of another
        evaluation.
      FileNotFoundError: for a missing run, checkpoint or data set.
    """
    if flags.norm is not None:
        _validate.one_of(norms.DUALS, norm=flags.norm)
    if flags.num_examples is not None:
        _validate.positive_integer(num_examples=flags.num_examples)
    folders = cli.split_names(flags.references)
    settings = _settings(
        flags.attacks, flags.batch_size, flags.mode, flags.diagnostics, flags.seed, folders
    )
    workdir = pathlib.Path(flags.workdir)
    run = loading.load_run(
        workdir,
        which=flags.checkpoint,
        split=flags.split,
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
    folder = "eval" if flags.split == "test" else f"eval-{flags.split}"
    out = pathlib.Path(flags.out) if flags.out else workdir / folder
    return _evaluate(subject.from_run(run, workdir.resolve().name), threat, settings, out)


def evaluate_model(
    logits_fn: Callable[..., Array],
    inputs: np.ndarray,
    labels: np.ndarray,
    threat: ThreatModel,
    out: str | pathlib.Path,
    *,
    variables: Any = None,
    name: str = "model",
    attacks: str = DEFAULT_ATTACKS,
    mode: str = "standalone",
    diagnostics: str = "quick",
    batch_size: int = 200,
    seed: int = 0,
    references: Sequence[str | pathlib.Path] = (),
) -> dict[str, Any]:
    """Evaluates any classifier as ``evaluate`` does a run, in the same files.

    Args:
      logits_fn: see ``subject.from_function``.
      inputs: images in [0, 1], float ``[N, H, W, C]``.
      labels: integers ``[N]``.
      threat: norm and radius; the box must be [0, 1].
      out: folder of the results.
      variables: parameters and other arrays, if ``logits_fn`` takes them first.
      name: of the classifier, for tables.
      attacks: as the flag ``attacks`` of ``eval.py``.
      mode: as the flag.
      diagnostics: as the flag.
      batch_size: examples attacked at once, over all devices.
      seed: of the attacks' random starts.
      references: ``out`` folders of other models' evaluations on the same images.

    Raises:
      ValueError: for arguments that do not fit, or an output folder of another evaluation.
    """
    if tuple(threat.bounds) != (0.0, 1.0):
        raise ValueError(f"threat.bounds={threat.bounds} must be (0, 1), as the inputs are.")
    settings = _settings(attacks, batch_size, mode, diagnostics, seed, references)
    model = subject.from_function(logits_fn, inputs, labels, variables=variables, name=name)
    return _evaluate(model, threat, settings, pathlib.Path(out))


class _Settings(NamedTuple):
    """How to evaluate, checked."""

    specs: dict[str, tuple[str, dict[str, Any]]]
    batch_size: int
    mode: str
    diagnostics: str
    seed: int
    references: tuple[str | pathlib.Path, ...]


def _settings(
    specs: str,
    batch_size: int,
    mode: str,
    diagnostics: str,
    seed: int,
    references: Sequence[str | pathlib.Path],
) -> _Settings:
    _validate.positive_integer(batch_size=batch_size)
    _validate.one_of(MODES, mode=mode)
    _validate.one_of(masking.LEVELS, diagnostics=diagnostics)
    names = cli.split_names(specs)
    if not names:
        raise ValueError(
            f"attacks={specs!r} names no attack; known are {sorted(attacks.REGISTRY)}."
        )
    return _Settings(
        {spec: parse_attack(spec) for spec in names},
        batch_size,
        mode,
        diagnostics,
        seed,
        tuple(references),
    )


def _evaluate(
    model: subject.Subject, threat: ThreatModel, settings: _Settings, out: pathlib.Path
) -> dict[str, Any]:
    # Compiled programs are found again by the threat model's value, which an array has not.
    threat = dataclasses.replace(threat, epsilon=float(threat.epsilon))
    built = {
        spec: _built(name, threat, tuple(options.items()))
        for spec, (name, options) in settings.specs.items()
    }
    for spec, attack in built.items():
        if any(member.estimator.is_random for member in attack.parts().values()):
            raise ValueError(
                f"attacks={spec!r} attacks randomised models, which this classifier is not."
            )
    others = references_lib.load(settings.references, model, threat)
    num_devices = model.mesh.size
    batch_size = -(-min(settings.batch_size, len(model.test_set)) // num_devices) * num_devices
    needed = memory.estimate(model, batch_size)
    needed.check(batch_size)
    if distributed.is_primary():
        print(f"{model.name}: {needed.text}", file=sys.stderr)
    header = {
        "weights_hash": model.weights_hash,
        "config_hash": hashlib.sha256(
            json.dumps(model.details.get("config"), sort_keys=True).encode()
        ).hexdigest(),
        "norm": threat.norm,
        "epsilon": float(threat.epsilon),
        "mode": settings.mode,
        "seed": settings.seed,
        "batch_size": batch_size,
        "gfa_jax": gfa_jax.__version__,
        "jax": f"{jax.__version__} ({jax.default_backend()})",
    }
    kept = records.Records(out / "records", header)
    # Attacks and their verdicts use full float32 products: TF32 or bfloat16 flips borderline
    # examples.
    with jax.default_matmul_precision("highest"):
        evaluation = driver.Evaluation(model, threat, kept, batch_size, settings.seed)
        results, outcomes, adversarial, shown = evaluation.run(
            built,
            sequential=settings.mode == "sequential",
            level=settings.diagnostics,
            others=others,
        )
    results |= {
        "name": model.name,
        "versions": run_folder.versions(),
        "mode": settings.mode,
        "weights_hash": model.weights_hash,
        **model.details,
    }
    results["data"] = {**results["data"], "hash": subject.hash_examples(model.test_set)}
    # All processes know the same now.
    distributed.on_primary(lambda: _write(out, results, outcomes, adversarial, shown))
    return results


@functools.lru_cache(maxsize=64)
def _built(
    name: str, threat: ThreatModel, options: tuple[tuple[str, Any], ...]
) -> attacks.Attack | attacks.Ensemble:
    """Returns the same attack for the same settings, by whose identity programs are found again."""
    return attacks.create(name, threat, **dict(options))


def _write(
    out: pathlib.Path,
    results: dict[str, Any],
    outcomes: Outcome,
    adversarial: Outcome,
    shown: Outcome,
) -> None:
    files.write_json(out / "results.json", results)
    report.save_examples(out / "outcomes.npz", outcomes)
    report.save_examples(out / "adversarial.npz", adversarial)
    report.save_examples(out / "examples.npz", shown)
    report.write_report([(results, shown)], out / "report.html")
