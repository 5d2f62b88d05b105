"""Training on pairs of clean and adversarial examples: TRADES, MART, logit pairing; and N-FGSM."""

import dataclasses

import jax
import jax.numpy as jnp

from gfa_jax import _validate, attacks, losses, norms
from gfa_jax.objectives import composition
from gfa_jax.objectives.classification import (
    Penalty,
    classification_metrics,
    cross_entropy,
    is_known,
    regularized,
    wide,
)
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackFn, Aux, Batch, Metrics, ModelFn, Objective, Params

START_STD = 0.001
"""The attacks of TRADES and MART start this far, in standard deviations, from the clean input."""

STATISTICS = ("clean", "adversarial")
"""Whose pass gives the BatchNorm statistics of the step, in objectives with one pass of each."""


def trades(
    attack: AttackFn | None,
    beta: float | Array,
    *,
    start_std: float | Array | None = START_STD,
    attack_train_mode: bool = False,
    statistics: str = "clean",
) -> Objective:
    """TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 3).

    ``loss = mean CE(f(x), y) + beta mean KL(p(x) || p(x'))`` with ``p = softmax f`` and ``x'`` from
    maximising the same divergence. The gradient flows through both sides of the divergence.
    ``beta`` is ``1 / lambda`` of the paper. The authors' recipe for l_inf with epsilon .031 is
    ``trades(attacks.pgd(threat, loss="kl", num_steps=10, step_size=0.007, keep="last"), 6.0)``.

    Metrics: those of ``cross_entropy()`` on clean inputs, ``adversarial_accuracy``,
    ``divergence_penalty`` and ``divergence_weight``.

    Args:
      attack: see above; ``None`` inside ``paired``, where the batch holds adversarial examples and
        the two options of the attack do not count.
      beta: >= 0; may be traced. A Python 0 gives exactly ``cross_entropy()``, without an attack.
      start_std: the attack starts at the clean input plus normal noise of this standard deviation,
        projected onto ball and box (the authors' code projects after the first step only).
        ``None``: where the attack says.
      attack_train_mode: the model's mode during the attack: BatchNorm with running statistics by
        default, as in the authors' code, or with the batch's. The loss itself takes one pass in
        training mode on clean and one on adversarial inputs, each with the statistics of its own
        inputs.
      statistics: whose pass updates the running statistics, ``clean`` or ``adversarial``; the
        authors' code lets both.

    Raises:
      ValueError: for a beta or a standard deviation out of range, or unknown statistics.
    """
    _validate.non_negative(beta=beta)
    _validate.one_of(STATISTICS, statistics=statistics)

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        del key
        clean, adv = _both(model, params, batch)
        value = jnp.mean(losses.kl(adv[0], clean[0]))
        metrics = _adversarial_accuracy(adv[0], batch)
        return Penalty(value, metrics, clean[0], (clean if statistics == "clean" else adv)[1])

    if is_known(beta, 0):
        return cross_entropy()
    return _with_attack(
        attack, regularized(penalty_fn, beta, 1.0, name="divergence"), start_std, attack_train_mode
    )


def mart(
    attack: AttackFn | None,
    beta: float | Array,
    *,
    start_std: float | Array | None = START_STD,
    attack_train_mode: bool = False,
    statistics: str = "clean",
) -> Objective:
    """MART, misclassification-aware adversarial training (Wang et al., ICLR 2020, eq. 11-12).

    ``loss = mean [BCE(p(x'), y) + beta KL(p(x) || p(x')) (1 - p_y(x))]`` with the boosted
    cross-entropy ``BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)``. All of it is differentiated,
    the factor ``1 - p_y(x)`` included, as in the authors' code. That code adds small constants
    under its logarithms, which caps the second term of BCE at 9.2; here it is computed from the
    logits, exact and without a cap. ``beta`` is the paper's lambda.

    Metrics: those of ``cross_entropy()`` on clean inputs, ``adversarial_accuracy``,
    ``boosted_cross_entropy``, ``divergence_penalty`` (weighted by ``1 - p_y``) and
    ``divergence_weight``.

    Args:
      attack: it maximises the cross-entropy, such as ``attacks.pgd(threat, num_steps=10,
        step_size=0.007, keep="last")``; ``None`` inside ``paired``.
      beta: >= 0 (5 or 6 in the authors' code); may be traced.
      start_std: as in ``trades``.
      attack_train_mode: as in ``trades``: evaluation mode by default, as in the authors' code.
      statistics: as in ``trades``.

    Raises:
      ValueError: for a beta or a standard deviation out of range, or unknown statistics.
    """
    _validate.non_negative(beta=beta)
    _validate.one_of(STATISTICS, statistics=statistics)

    def objective(model: ModelFn, params: Params, batch: Batch, key: Array) -> tuple[Array, Aux]:
        del key
        labels = batch["labels"]
        clean, adv = _both(model, params, batch)
        boosted = jnp.mean(_boosted_cross_entropy(adv[0], labels))
        # 1 - p_y, without the cancellation near p_y = 1.
        doubt = -jnp.expm1(-losses.cross_entropy(clean[0], labels))
        value = jnp.mean(losses.kl(adv[0], clean[0]) * doubt)
        loss = boosted + beta * value
        metrics = {
            **classification_metrics(clean[0], labels, loss),
            **_adversarial_accuracy(adv[0], batch),
            "boosted_cross_entropy": boosted,
            "divergence_penalty": value,
            "divergence_weight": jnp.asarray(beta, jnp.float32),
        }
        return loss, Aux(metrics, (clean if statistics == "clean" else adv)[1])

    return _with_attack(attack, objective, start_std, attack_train_mode)


def _boosted_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns ``-log p_y - log(1 - max_{k != y} p_k)`` ``[B]``."""
    logits = wide(logits)
    classes = jnp.arange(logits.shape[1])[None, :]
    others = jnp.where(classes == labels[:, None], -jnp.inf, logits)
    without_rival = jnp.where(classes == jnp.argmax(others, axis=1)[:, None], -jnp.inf, logits)
    log_rest = jax.nn.logsumexp(without_rival, axis=1) - jax.nn.logsumexp(logits, axis=1)
    return losses.cross_entropy(logits, labels) - log_rest


def logit_pairing(
    attack: AttackFn | None,
    weight: float | Array,
    *,
    adversarial_share: float | Array = 0.5,
    start_std: float | Array | None = None,
    attack_train_mode: bool = False,
    statistics: str = "clean",
) -> Objective:
    """Adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373, section 4).

    ``loss = (1 - s) mean CE(f(x), y) + s mean CE(f(x'), y) + weight mean |f(x) - f(x')|_2^2``,
    mixed adversarial training plus the distance of the logits. (A mean of squares over the C
    classes in place of the sum needs C times this weight.) Broken by stronger attacks than the
    paper's (Engstrom et al. 2018, arXiv 1807.10272): here to compare with.

    Metrics: those of ``cross_entropy()`` on clean inputs, ``adversarial_cross_entropy``,
    ``adversarial_accuracy``, ``logit_pairing_penalty`` and ``logit_pairing_weight``.

    Args:
      attack: such as ``attacks.pgd(threat, keep="last")``; ``None`` inside ``paired``.
      weight: >= 0; may be traced.
      adversarial_share: s in [0, 1]; may be traced.
      start_std: as in ``trades``; by default the attack starts where it says.
      attack_train_mode: as in ``trades``: evaluation mode by default.
      statistics: as in ``trades``.

    Raises:
      ValueError: for arguments out of range, or unknown statistics.
    """
    _validate.non_negative(weight=weight)
    _validate.fraction(adversarial_share=adversarial_share)
    _validate.one_of(STATISTICS, statistics=statistics)

    def objective(model: ModelFn, params: Params, batch: Batch, key: Array) -> tuple[Array, Aux]:
        del key
        labels = batch["labels"]
        clean, adv = _both(model, params, batch)
        clean_ce, adv_ce = (
            jnp.mean(losses.cross_entropy(logits, labels)) for logits, _ in (clean, adv)
        )
        difference = wide(clean[0]) - wide(adv[0])
        value = jnp.mean(norms.dot(difference, difference))
        loss = (1 - adversarial_share) * clean_ce + adversarial_share * adv_ce + weight * value
        metrics = {
            **classification_metrics(clean[0], labels, loss),
            **_adversarial_accuracy(adv[0], batch),
            "adversarial_cross_entropy": adv_ce,
            "logit_pairing_penalty": value,
            "logit_pairing_weight": jnp.asarray(weight, jnp.float32),
        }
        return loss, Aux(metrics, (clean if statistics == "clean" else adv)[1])

    return _with_attack(attack, objective, start_std, attack_train_mode)


def logit_squeezing(
    weight: float | Array, *, cross_entropy_weight: float | Array = 1.0
) -> Objective:
    """Clean logit squeezing (Kannan et al. 2018, arXiv 1803.06373, section 4).

    ``loss = mean CE + weight mean |f(x)|_2^2``. In the paper inputs carry normal noise:
    ``noisy(normal_noise(0.5), logit_squeezing(0.5))``. It flattens the loss, which hides gradients
    more than it defends (Mosbach et al. 2018, arXiv 1810.12042): here to compare with.

    Metrics: those of ``cross_entropy()``, ``logit_squeezing_penalty``, ``logit_squeezing_weight``.
    The BatchNorm statistics are those of the one pass, in training mode.

    Args:
      weight: >= 0; may be traced. A Python 0 gives exactly ``cross_entropy()``.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for a negative weight.
    """

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        del key
        (logits, _), model_state = model(params, {}, batch["inputs"], train=True)
        squared = norms.dot(wide(logits), wide(logits))
        return Penalty(jnp.mean(squared), {}, logits, model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="logit_squeezing")


def n_fgsm(
    threat: ThreatModel,
    objective: Objective | None = None,
    *,
    noise_scale: float | Array = 2.0,
    step_size: float | Array | None = None,
    attack_train_mode: bool = False,
) -> Objective:
    """N-FGSM (de Jorge et al. 2022, arXiv 2202.01181, Algorithm 1).

    Uniform noise in ``[-k epsilon, k epsilon]``, then one FGSM step from the noisy input; the whole
    perturbation is not clipped to epsilon, only to the box. It is the composition
    ``noisy(uniform_noise(k * epsilon), adversarial(attacks.fgsm(threat), objective))``: FGSM takes
    the noisy inputs for the clean ones.

    Args:
      threat: an l_inf threat model.
      objective: ``cross_entropy()`` by default.
      noise_scale: k >= 0; may be traced.
      step_size: alpha, in input units; epsilon by default. May be traced.
      attack_train_mode: the model's mode during the attack: BatchNorm with running statistics by
        default, or with the batch's, as in the authors' code. The statistics of the attack's pass
        are discarded; those of the step come from the objective, on adversarial inputs.

    Raises:
      ValueError: for another norm, or for arguments out of range.
    """
    _validate.non_negative(noise_scale=noise_scale)
    if threat.norm != "linf":
        raise ValueError(f"norm={threat.norm!r}: N-FGSM is defined for the norm 'linf' alone.")
    step_threat = threat
    if step_size is not None:
        _validate.positive(step_size=step_size)
        step_threat = dataclasses.replace(threat, epsilon=step_size)
    return composition.noisy(
        composition.uniform_noise(noise_scale * threat.epsilon, bounds=threat.bounds),
        composition.adversarial(
            attacks.fgsm(step_threat),
            cross_entropy() if objective is None else objective,
            attack_train_mode=attack_train_mode,
        ),
    )


def _both(
    model: ModelFn, params: Params, batch: Batch
) -> tuple[tuple[Array, object], tuple[Array, object]]:
    """Returns logits and model state of the clean and of the adversarial pass, in training mode."""
    (clean_logits, _), clean_state = model(params, {}, batch["inputs"], train=True)
    adv_inputs = composition.adversarial_inputs(batch)
    (adv_logits, _), adv_state = model(params, {}, adv_inputs, train=True)
    return (clean_logits, clean_state), (adv_logits, adv_state)


def _adversarial_accuracy(logits: Array, batch: Batch) -> Metrics:
    return {"adversarial_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == batch["labels"])}


def _with_attack(
    attack: AttackFn | None,
    objective: Objective,
    start_std: float | Array | None,
    attack_train_mode: bool,
) -> Objective:
    if attack is None:
        return objective
    return composition.paired(
        attack, objective, start_std=start_std, attack_train_mode=attack_train_mode
    )
