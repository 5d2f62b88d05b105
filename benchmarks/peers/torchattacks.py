"""torchattacks."""

from collections.abc import Callable
from typing import Any

import torchattacks

from benchmarks.peers import Task, pick

NAME = "torchattacks"
PACKAGE = "torchattacks"
SLOW = ("deepfool",)
_APGD = "torchattacks: an early revision of APGD."
NOTES = {
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": _APGD,
    "apgd-t l2": f"{_APGD} All images of a batch share the step size of the first.",
    "square": "torchattacks: the schedule is stretched to the number of queries, and one window is "
    "shared by the batch.",
    "deepfool": "torchattacks: one image after another; it overshoots each step instead of the "
    "sum, and does not check the last one.",
    "ead-en": "torchattacks: a search goes on from the end point of the one before; images whose "
    "true logit is negative get no gradient.",
    "ead-l1": "torchattacks: as for ead-en.",
    "cw": "torchattacks: one constant c = 1 and no search for it.",
    "autoattack": "torchattacks: 10 steps for each gradient attack instead of 100.",
}

_NORMS = {"linf": "Linf", "l2": "L2"}


def _fgsm(model: Any, task: Task) -> Any:
    return pick(task, {"linf": torchattacks.FGSM})(model, eps=task.epsilon)


def _pgd(model: Any, task: Task) -> Any:
    attack = pick(task, {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2})
    return attack(model, eps=task.epsilon, alpha=task.step_size, steps=task.num_steps)


def _apgd(loss: str) -> Callable[[Any, Task], Any]:
    def make(model: Any, task: Task) -> Any:
        return torchattacks.APGD(
            model,
            norm=pick(task, _NORMS),
            eps=task.epsilon,
            steps=task.num_steps,
            seed=task.seed,
            loss=loss,
        )

    return make


def _apgd_t(model: Any, task: Task) -> Any:
    return torchattacks.APGDT(
        model,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        steps=task.num_steps,
        seed=task.seed,
        n_classes=task.num_targets + 1,
    )


def _fab(multi_targeted: bool) -> Callable[[Any, Task], Any]:
    def make(model: Any, task: Task) -> Any:
        return torchattacks.FAB(
            model,
            norm=pick(task, _NORMS),
            eps=task.epsilon,
            steps=task.num_steps,
            seed=task.seed,
            multi_targeted=multi_targeted,
            n_classes=task.num_targets + 1,
        )

    return make


def _square(model: Any, task: Task) -> Any:
    return torchattacks.Square(
        model,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        n_queries=task.num_queries,
        seed=task.seed,
    )


def _deepfool(model: Any, task: Task) -> Any:
    return pick(task, {"l2": torchattacks.DeepFool})(model, steps=task.num_steps)


def _ead(name: str) -> Callable[[Any, Task], Any]:
    def make(model: Any, task: Task) -> Any:
        attack = pick(task, {"l1": getattr(torchattacks, name)})
        return attack(model, max_iterations=task.num_steps, binary_search_steps=task.num_searches)

    return make


def _cw(model: Any, task: Task) -> Any:
    return pick(task, {"l2": torchattacks.CW})(model, steps=task.num_steps)


def _autoattack(model: Any, task: Task) -> Any:
    return torchattacks.AutoAttack(
        model,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        n_classes=task.num_classes,
        seed=task.seed,
    )


def _run(make: Callable[[Any, Task], Any]) -> Callable[..., Any]:
    def run(model: Any, images: Any, labels: Any, task: Task) -> Any:
        return make(model, task)(images, labels)

    return run


ATTACKS = {
    "fgsm": _run(_fgsm),
    "pgd": _run(_pgd),
    "apgd-ce": _run(_apgd("ce")),
    "apgd-dlr": _run(_apgd("dlr")),
    "apgd-t": _run(_apgd_t),
    "fab": _run(_fab(multi_targeted=False)),
    "fab-t": _run(_fab(multi_targeted=True)),
    "square": _run(_square),
    "deepfool": _run(_deepfool),
    "ead-en": _run(_ead("EADEN")),
    "ead-l1": _run(_ead("EADL1")),
    "cw": _run(_cw),
    "autoattack": _run(_autoattack),
}
