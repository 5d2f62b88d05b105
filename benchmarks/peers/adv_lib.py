"""adv-lib (``make install-adv-lib``; it imports torchvision and visdom)."""

import functools
import math
from typing import Any

from adv_lib import attacks

from benchmarks.peers import Task, pick

NAME = "adv-lib"
PACKAGE = "adv-lib"
SLOW = ()
_APGD = "adv-lib: a check of progress compares the best loss with itself, and halves more steps."
NOTES = {
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": f"{_APGD} Only the target class counts as success.",
    "deepfool": "adv-lib: it overshoots each step instead of the sum.",
}

_NORMS = {"linf": math.inf, "l2": 2, "l1": 1}


def _pgd(model: Any, images: Any, labels: Any, task: Task, *, loss: str) -> Any:
    return pick(task, {"linf": attacks.pgd_linf})(
        model,
        images,
        labels,
        task.epsilon,
        steps=task.num_steps,
        loss_function=loss,
        absolute_step_size=task.step_size,
    )


def _apgd(model: Any, images: Any, labels: Any, task: Task, *, loss: str) -> Any:
    return attacks.apgd(
        model,
        images,
        labels,
        task.epsilon,
        pick(task, _NORMS),
        n_iter=task.num_steps,
        loss_function=loss,
        use_large_reps=task.norm == "l1",
    )


def _apgd_t(model: Any, images: Any, labels: Any, task: Task) -> Any:
    return attacks.apgd_targeted(
        model,
        images,
        labels,
        task.epsilon,
        pick(task, _NORMS),
        n_iter=task.num_steps,
        num_targets=task.num_targets,
        use_large_reps=task.norm == "l1",
    )


def _fab(model: Any, images: Any, labels: Any, task: Task, *, targeted: bool) -> Any:
    return attacks.fab(
        model,
        images,
        labels,
        pick(task, _NORMS),
        n_iter=task.num_steps,
        ε=task.epsilon,
        restarts=task.num_targets if targeted else 1,
        targeted_restarts=targeted,
    )


def _deepfool(model: Any, images: Any, labels: Any, task: Task) -> Any:
    norm = pick(task, {"linf": math.inf, "l2": 2})
    return attacks.df(model, images, labels, steps=task.num_steps, norm=norm)


def _cw(model: Any, images: Any, labels: Any, task: Task) -> Any:
    return pick(task, {"l2": attacks.carlini_wagner_l2})(
        model,
        images,
        labels,
        binary_search_steps=task.num_searches,
        max_iterations=task.num_steps,
        initial_const=task.cw_constant,
    )


ATTACKS = {
    "pgd": functools.partial(_pgd, loss="ce"),
    "pgd-dlr": functools.partial(_pgd, loss="dlr"),
    "apgd-ce": functools.partial(_apgd, loss="ce"),
    "apgd-dlr": functools.partial(_apgd, loss="dlr"),
    "apgd-t": _apgd_t,
    "fab": functools.partial(_fab, targeted=False),
    "fab-t": functools.partial(_fab, targeted=True),
    "deepfool": _deepfool,
    "cw": _cw,
}
