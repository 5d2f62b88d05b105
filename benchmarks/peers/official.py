"""AutoAttack, the code of its authors, as packaged by pyautoattack."""

import functools
from typing import Any

from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

from benchmarks.peers import Task, pick

NAME = "AutoAttack (official)"
PACKAGE = "pyautoattack"
SLOW = ()
NOTES = {
    "square": "official: all images of a batch share one window at each query, which never reaches "
    "the last row and column.",
}

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def apgd(model: Any, task: Task, loss: str, *, device: Any = None) -> APGDAttack:
    """Returns the attack object, one run from one random start."""
    return APGDAttack(
        model,
        n_iter=task.num_steps,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        seed=task.seed,
        loss=loss,
        device=device,
        # What AutoAttack does for l_1.
        use_largereps=task.norm == "l1",
    )


def apgd_t(model: Any, task: Task, *, device: Any = None) -> APGDAttack_targeted:
    """Returns the attack object."""
    return APGDAttack_targeted(
        model,
        n_iter=task.num_steps,
        norm=pick(task, _NORMS),
        eps=task.epsilon,
        seed=task.seed,
        n_target_classes=task.num_targets,
        device=device,
        use_largereps=task.norm == "l1",
    )


def fab(model: Any, task: Task, *, targeted: bool, device: Any = None) -> FABAttack_PT:
    """Returns the attack object."""
    return FABAttack_PT(
        model,
        norm=pick(task, _NORMS),
        n_iter=task.num_steps,
        eps=task.epsilon,
        seed=task.seed,
        targeted=targeted,
        n_target_classes=task.num_targets,
        device=device,
    )


def square(model: Any, task: Task, *, device: Any = None) -> SquareAttack:
    """Returns the attack object."""
    return SquareAttack(
        model,
        norm=pick(task, _NORMS),
        n_queries=task.num_queries,
        eps=task.epsilon,
        seed=task.seed,
        resc_schedule=False,
        device=device,
    )


def autoattack(model: Any, images: Any, labels: Any, task: Task) -> Any:
    """Runs the standard version; only its numbers of steps and queries follow the task."""
    device = images.device
    ensemble = AutoAttack(
        model, norm=pick(task, _NORMS), eps=task.epsilon, seed=task.seed, device=device
    )
    for name, attack in (
        ("apgd", apgd(model, task, "ce", device=device)),
        ("apgd_targeted", apgd_t(model, task, device=device)),
        ("fab", fab(model, task, targeted=True, device=device)),
        ("square", square(model, task, device=device)),
    ):
        setattr(ensemble, name, attack)
    ensemble._set_version("standard")  # restarts and targets
    ensemble.square.n_queries = task.num_queries
    adv_images, _ = ensemble.run_standard_evaluation(images, labels, batch_size=len(images))
    return adv_images


def _perturb(make: Any, model: Any, images: Any, labels: Any, task: Task) -> Any:
    return make(model, task, device=images.device).perturb(images, labels)


ATTACKS = {
    "apgd-ce": functools.partial(_perturb, functools.partial(apgd, loss="ce")),
    "apgd-dlr": functools.partial(_perturb, functools.partial(apgd, loss="dlr")),
    "apgd-t": functools.partial(_perturb, apgd_t),
    "fab": functools.partial(_perturb, functools.partial(fab, targeted=False)),
    "fab-t": functools.partial(_perturb, functools.partial(fab, targeted=True)),
    "square": functools.partial(_perturb, square),
    "autoattack": autoattack,
}
