"""The Adversarial Robustness Toolbox; images go through NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from art.estimators.classification import PyTorchClassifier

from benchmarks.peers import Task, pick

NAME = "ART"
PACKAGE = "adversarial-robustness-toolbox"
SLOW = ("ead-en", "ead-l1", "cw")
_APGD = "ART: success is judged at the last point alone."
NOTES = {
    "pgd l1": "ART: a dense step by the normalised gradient.",
    "apgd-ce": _APGD,
    "apgd-ce l1": f"{_APGD} No sparse steps.",
    "apgd-dlr": _APGD,
    "apgd-dlr l1": f"{_APGD} No sparse steps.",
    "deepfool": "ART: starts from the predicted class, and overshoots once, at the end.",
    "ead-en": "ART: no gradient at all while the image is misclassified.",
    "ead-l1": "ART: as for ead-en.",
    "cw": "ART: a line search instead of Adam.",
}

_NORMS = {"linf": np.inf, "l2": 2, "l1": 1}


def _fgsm(classifier: Any, task: Task, size: int) -> Any:
    return evasion.FastGradientMethod(
        classifier, norm=pick(task, _NORMS), eps=task.epsilon, batch_size=size
    )


def _pgd(classifier: Any, task: Task, size: int) -> Any:
    return evasion.ProjectedGradientDescentPyTorch(
        classifier,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        eps_step=task.step_size,
        max_iter=task.num_steps,
        num_random_init=1,
        batch_size=size,
        verbose=False,
    )


def _apgd(loss: str) -> Callable[..., Any]:
    def make(classifier: Any, task: Task, size: int) -> Any:
        return evasion.AutoProjectedGradientDescent(
            classifier,
            norm=pick(task, _NORMS),
            eps=task.epsilon,
            eps_step=2 * task.epsilon,  # APGD's first step; ART leaves it to the user
            max_iter=task.num_steps,
            nb_random_init=1,
            batch_size=size,
            loss_type=loss,
            verbose=False,
        )

    return make


def _square(classifier: Any, task: Task, size: int) -> Any:
    return evasion.SquareAttack(
        classifier,
        norm=pick(task, {"linf": np.inf, "l2": 2}),
        max_iter=task.num_queries,
        eps=task.epsilon,
        batch_size=size,
        verbose=False,
    )


def _deepfool(classifier: Any, task: Task, size: int) -> Any:
    return pick(task, {"l2": evasion.DeepFool})(
        classifier,
        max_iter=task.num_steps,
        epsilon=0.02,
        nb_grads=task.num_classes,
        batch_size=size,
        verbose=False,
    )


def _ead(rule: str) -> Callable[..., Any]:
    def make(classifier: Any, task: Task, size: int) -> Any:
        return pick(task, {"l1": evasion.ElasticNet})(
            classifier,
            binary_search_steps=task.num_searches,
            max_iter=task.num_steps,
            batch_size=size,
            decision_rule=rule,
            verbose=False,
        )

    return make


def _cw(classifier: Any, task: Task, size: int) -> Any:
    return pick(task, {"l2": evasion.CarliniL2Method})(
        classifier,
        binary_search_steps=task.num_searches,
        max_iter=task.num_steps,
        initial_const=task.cw_constant,
        batch_size=size,
        verbose=False,
    )


def _run(make: Callable[..., Any]) -> Callable[..., Any]:
    def run(model: Any, images: Any, labels: Any, task: Task) -> Any:
        np.random.seed(task.seed)
        classifier = PyTorchClassifier(
            model,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=task.num_classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if images.is_cuda else "cpu",
        )
        attack = make(classifier, task, len(images))
        one_hot = np.eye(task.num_classes, dtype=np.float32)[labels.cpu().numpy()]
        found = attack.generate(x=images.cpu().numpy(), y=one_hot)
        return torch.tensor(found, device=images.device)

    return run


ATTACKS = {
    "fgsm": _run(_fgsm),
    "pgd": _run(_pgd),
    "apgd-ce": _run(_apgd("cross_entropy")),
    "apgd-dlr": _run(_apgd("difference_logits_ratio")),
    "square": _run(_square),
    "deepfool": _run(_deepfool),
    "ead-en": _run(_ead("EN")),
    "ead-l1": _run(_ead("L1")),
    "cw": _run(_cw),
}
