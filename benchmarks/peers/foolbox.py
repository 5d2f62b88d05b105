"""Foolbox."""

from collections.abc import Callable
from typing import Any

import foolbox
from foolbox import attacks

from benchmarks.peers import Task, pick

NAME = "Foolbox"
PACKAGE = "foolbox"
SLOW = ()
_BLACK = "Images that come back black, its sign of failure, are counted as failures."
NOTES = {
    "pgd l1": "Foolbox: a dense normalised step, projected on ball and box one after another.",
    "deepfool": "Foolbox: towards the predicted class's ten nearest classes.",
    "ead-en": f"Foolbox: the step's momentum counts from one step later. {_BLACK}",
    "ead-l1": f"Foolbox: the step's momentum counts from one step later. {_BLACK}",
    "cw": f"Foolbox. {_BLACK}",
}


def _fgsm(task: Task) -> Any:
    kinds = {"linf": attacks.LinfFastGradientAttack, "l2": attacks.L2FastGradientAttack}
    return pick(task, kinds)(random_start=False)


def _pgd(task: Task) -> Any:
    kinds = {
        "linf": attacks.LinfProjectedGradientDescentAttack,
        "l2": attacks.L2ProjectedGradientDescentAttack,
        "l1": attacks.L1ProjectedGradientDescentAttack,
    }
    return pick(task, kinds)(steps=task.num_steps, abs_stepsize=task.step_size, random_start=True)


def _deepfool(task: Task) -> Any:
    kinds = {"l2": attacks.L2DeepFoolAttack, "linf": attacks.LinfDeepFoolAttack}
    return pick(task, kinds)(steps=task.num_steps)


def _ead(rule: str) -> Callable[[Task], Any]:
    def make(task: Task) -> Any:
        return pick(task, {"l1": attacks.EADAttack})(
            binary_search_steps=task.num_searches,
            steps=task.num_steps,
            regularization=1e-3,  # the authors' value; Foolbox's own is ten times as large
            decision_rule=rule,
        )

    return make


def _cw(task: Task) -> Any:
    return pick(task, {"l2": attacks.L2CarliniWagnerAttack})(
        binary_search_steps=task.num_searches,
        steps=task.num_steps,
        initial_const=task.cw_constant,
    )


def _run(make: Callable[[Task], Any], *, in_ball: bool) -> Callable[..., Any]:
    def run(model: Any, images: Any, labels: Any, task: Task) -> Any:
        # Searches give a black image where they fail, which the model may well get wrong.
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        epsilons = task.epsilon if in_ball else None
        _, adv_images, _ = make(task)(wrapped, images, labels, epsilons=epsilons)
        failed = (adv_images == 0).flatten(1).all(1)[:, None, None, None]
        return images.where(failed, adv_images)

    return run


ATTACKS = {
    "fgsm": _run(_fgsm, in_ball=True),
    "pgd": _run(_pgd, in_ball=True),
    "deepfool": _run(_deepfool, in_ball=False),
    "ead-en": _run(_ead("EN"), in_ball=False),
    "ead-l1": _run(_ead("L1"), in_ball=False),
    "cw": _run(_cw, in_ball=False),
}
