"""Stops failed training with a plain message, before it wastes time or good checkpoints."""

import math
from collections.abc import Mapping

from gfa_jax import failures


class TrainingFailedError(failures.MetByAllError):
    """Training cannot go on usefully; the message says why and what to change."""


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises TrainingFailedError where the loss or a norm is not finite.

    Args:
      step: the step that produced the metrics.
      metrics: scalars by name.
    """
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    if broken:
        raise TrainingFailedError(
            f"step {step}: {', '.join(broken)} not finite. What was saved before is intact. Lower "
            "optimizer.learning_rate or gfa.weight, or clip gradients (optimizer.clip_norm)."
        )


class CollapseGuard:
    """Recognises the two ways in which the alignment term destroys a network.

    *Dump class*: one class's logit falls with the feature's length while the others stay equal;
    alignment is high, accuracy at chance and cross-entropy at log C. *Dead network*: every unit is
    zero. Both are judged on averages over a window, after the start of training.
    """

    def __init__(self, num_classes: int, *, window: int = 100, grace_steps: int = 300) -> None:
        """Sets the window.

        Args:
          num_classes: C.
          window: steps that the verdict averages over.
          grace_steps: steps at the start that are never judged.
        """
        self._num_classes = num_classes
        self._window = window
        self._grace_steps = grace_steps
        self._recent: list[tuple[float, float, float, float]] = []

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises TrainingFailedError on collapse; ignores objectives without alignment.

        Args:
          step: the step that produced the metrics.
          metrics: with ``accuracy``, ``cross_entropy``, ``zero_gradients`` and ``alignment/...``.
        """
        alignments = [value for name, value in metrics.items() if name.startswith("alignment/")]
        if not alignments:
            return
        row = (
            metrics["accuracy"],
            metrics["cross_entropy"],
            metrics["zero_gradients"],
            sum(alignments) / len(alignments),
        )
        self._recent = [*self._recent, row][-self._window :]
        if step < self._grace_steps or len(self._recent) < self._window:
            return
        accuracy, cross_entropy, zeros, aligned = (
            sum(column) / len(column) for column in zip(*self._recent, strict=True)
        )
        chance = 1 / self._num_classes
        if zeros > 0.99:
            raise TrainingFailedError(
                f"step {step}: the network is dead ({zeros:.0%} of features or gradients are "
                "exactly zero). Lower gfa.weight or lengthen gfa.warmup_fraction; "
                "target='sampled_margin' is the target that kills least."
            )
        if (
            accuracy < 1.5 * chance
            and cross_entropy > 0.95 * math.log(self._num_classes)
            and aligned > 0.2
        ):
            raise TrainingFailedError(
                f"step {step}: alignment collapse. Accuracy {accuracy:.1%} is at chance, "
                f"cross-entropy {cross_entropy:.3f} at log C = {math.log(self._num_classes):.3f}, "
                f"while the alignment is {aligned:.2f}: one class became the dump for all. Lower "
                "gfa.weight or lengthen gfa.warmup_fraction; target='sampled_margin' with "
                "form='log' in a network without biases and normalisation collapses least."
            )
