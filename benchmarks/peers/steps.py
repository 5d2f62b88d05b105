"""Training steps in PyTorch: the same work as ours, written as a PyTorch user would.

The model is what ``networks.to_torch`` gives: a sequence whose normalisation and activations are
the features that are aligned. ``torch.compile`` cannot differentiate twice, so steps are eager.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

_LOG_SHARPNESS = 20.0
_BETA = 6.0

LossFn = Callable[[Any, Any, Any], Any]
"""``(model, images [B, C, H, W] in [0, 1], labels [B]) -> loss``."""


def standard(model: Any, images: Any, labels: Any) -> Any:
    """Cross-entropy."""
    import torch

    return torch.nn.functional.cross_entropy(model(images), labels)


def gfa(model: Any, images: Any, labels: Any) -> Any:
    """Cross-entropy and the alignment of every feature, by double backward.

    Target ``log_odds``, form ``log``, weight 1; the normalised image is measured in l_inf, the
    gradient there in l_1, the rest in l_2.
    """
    import torch

    features = []
    # The gradient at the normalised image needs a graph that reaches it.
    hidden = images.detach().requires_grad_(True)
    for layer in model:
        hidden = layer(hidden)
        if type(layer).__name__ in ("Normalize", "ReLU"):
            features.append(hidden)
    logits = hidden
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(own, -torch.inf)
    target = torch.logsumexp(others, 1) - logits[own]
    grads = torch.autograd.grad(target.sum(), features, create_graph=True)
    penalties = []
    for number, (feature, grad) in enumerate(zip(features, grads, strict=True)):
        feature, grad = feature.flatten(1), grad.flatten(1)
        if number == 0:
            sizes = feature.abs().amax(1) * grad.abs().sum(1)
        else:
            sizes = feature.norm(dim=1) * grad.norm(dim=1)
        cosine = -(feature * grad).sum(1) / sizes.clamp_min(1e-30)
        softplus = torch.nn.functional.softplus(_LOG_SHARPNESS * cosine) / _LOG_SHARPNESS
        penalties.append(-softplus.log().mean())
    return torch.nn.functional.cross_entropy(logits, labels) + sum(penalties) / len(penalties)


def adversarial(epsilon: float, num_steps: int, step_size: float) -> LossFn:
    """Cross-entropy at PGD's last point, from a random start in the l_inf ball."""
    import torch

    def loss(model: Any, images: Any, labels: Any) -> Any:
        start = images + torch.empty_like(images).uniform_(-epsilon, epsilon)
        moved = start.clamp(0, 1)
        for _ in range(num_steps):
            moved = moved.detach().requires_grad_(True)
            value = torch.nn.functional.cross_entropy(model(moved), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(value, moved)
            moved = moved.detach() + step_size * gradient.sign()
            moved = images + (moved - images).clamp(-epsilon, epsilon)
            moved = moved.clamp(0, 1)
        return standard(model, moved.detach(), labels)

    return loss


def loss_fn(step: str, epsilon: float) -> LossFn:
    """Returns the loss of a step of ``gfa_jax.benchmark.programs.STEPS``.

    Raises:
      ValueError: for a step that is not written here.
    """
    losses = {
        "standard": standard,
        "gfa": gfa,
        "fgsm_at": adversarial(epsilon, 1, 1.25 * epsilon),
        "pgd_at": adversarial(epsilon, 10, 2.5 * epsilon / 10),
    }
    if step not in losses:
        raise ValueError(f"steps={step!r} has no PyTorch form here; valid: {', '.join(losses)}.")
    return losses[step]


def start_step(
    model: Any, step: str, epsilon: float, images: np.ndarray, labels: np.ndarray
) -> Any:
    """Returns a function that takes one optimiser step on a batch, and returns the loss.

    Args:
      model: from ``networks.to_torch``; trained in place.
      step: its name.
      epsilon: radius of attacks.
      images: ``[B, H, W, C]`` in [0, 1].
      labels: int ``[B]``.
    """
    import torch

    device = next(model.parameters()).device
    inputs = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), device=device)
    if next(model.parameters()).is_contiguous(memory_format=torch.channels_last):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.tensor(labels, device=device).long()
    model.requires_grad_(True)
    loss = loss_fn(step, epsilon)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=1e-4
    )

    def start() -> Any:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    return start
