"""Runs one attack of one library on given images, and says how long it took and what it found."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, peers
from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import compaction
from gfa_jax.types import Array

OURS = "gfa_jax"

NORMS = {
    "fgsm": ("linf", "l2"),
    "pgd": ("linf", "l2", "l1"),
    "apgd-ce": ("linf", "l2", "l1"),
    "apgd-dlr": ("linf", "l2", "l1"),
    "apgd-t": ("linf", "l2", "l1"),
    "fab": ("linf", "l2", "l1"),
    "fab-t": ("linf", "l2", "l1"),
    "square": ("linf", "l2", "l1"),
    "autoattack": ("linf", "l2", "l1"),
    "deepfool": ("linf", "l2"),
    "cw": ("l2",),
    "ead-en": ("l1",),
    "ead-l1": ("l1",),
}
"""The norms that each attack is measured in."""

MINIMUM_NORM = ("deepfool", "cw", "ead-en", "ead-l1")
"""Attacks that are compared by the median norm of what they find."""

_SLACK = 1e-4
"""How far beyond epsilon, as a share of it, a perturbation still counts: float32 rounding."""

_BETA = 1e-3
"""EAD's weight of the l_1 norm, in all libraries."""

_CHUNK_SIZE = 64
_CHUNKED = ("square", "autoattack", "deepfool", "ead-en", "ead-l1")
OUR_NOTES = {
    "ead-en": "gfa_jax: abort=example.",
    "ead-l1": "gfa_jax: abort=example, variant=art.",
}
"""Options that are not the defaults, by attack."""


class Found(NamedTuple):
    """One run of an attack.

    Attributes:
      seconds: of the run and of judging what it found, without compilation.
      compile_seconds: tracing and compiling before it, 0 where there was none.
      adv_images: ``[N, H, W, C]``.
      misled: bool ``[N]``, whether the model that was attacked is misled there.
      network_seconds: what the network's passes of the attack take by themselves, where known.
    """

    seconds: float
    compile_seconds: float
    adv_images: np.ndarray
    misled: np.ndarray
    network_seconds: float | None = None


class Contender(Protocol):
    """A library under measurement."""

    name: str
    version: str

    def supports(self, attack: str, norm: str) -> str:
        """Returns why it cannot run the attack, or nothing."""
        ...

    def run(self, attack: str, task: peers.Task, split: networks.Split) -> Found:
        """Attacks the images once."""
        ...


class _CompileTimer:
    """Sums up what JAX spends on tracing and compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration


@dataclasses.dataclass
class Ours:
    """The attacks of this library, by the driver that drops broken examples."""

    network: networks.Network
    name: str = OURS
    version: str = jax.__version__

    def __post_init__(self) -> None:
        """Starts to listen for compilations."""
        self._timer = _CompileTimer()
        self._compiled: dict[tuple[Any, ...], tuple[Callable[[], Any], float]] = {}
        self._passes: dict[int, Passes] = {}
        self._apply = self.network.apply  # one object, so that programs are found again

    def supports(self, attack: str, norm: str) -> str:
        """Returns why it cannot run the attack, or nothing."""
        return "" if attack in attacks.REGISTRY else "not in the registry"

    def run(self, attack: str, task: peers.Task, split: networks.Split) -> Found:
        """Attacks the images; before the first time also once more, to compile all programs."""
        where = (attack, task, len(split.labels))
        if where not in self._compiled:
            self._compiled[where] = self._prepare(attack, task, split)
        run, compile_seconds = self._compiled[where]
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        batch = _CHUNK_SIZE if attack in _CHUNKED else len(split.labels)
        if batch not in self._passes:
            self._passes[batch] = Passes(self.network, split.take(batch).images)
        forward, gradient = self._passes[batch].seconds()
        # A gradient is counted as a forward pass and a backward pass.
        forwards, backwards = np.sum(result.num_forwards), np.sum(result.num_backwards)
        alone = float(forwards * forward + backwards * (gradient - forward))
        success = np.asarray(result.success)
        return Found(seconds, compile_seconds, result.adv_inputs, success, alone)

    def _prepare(
        self, name: str, task: peers.Task, split: networks.Split
    ) -> tuple[Callable[[], Any], float]:
        attack = attacks.create(name, ThreatModel(task.norm, task.epsilon), **options(name, task))
        size = len(split.labels)
        run = functools.partial(
            compaction.attack_in_batches,
            attack,
            self._apply,
            self.network.params,
            attacks.example_keys(jax.random.key(task.seed), jnp.arange(size)),
            split.images,
            split.labels,
            batch_size=size,
        )
        before = self._timer.seconds
        run()
        return run, self._timer.seconds - before


class Passes:
    """The network by itself: forward passes and gradients in compiled loops.

    What remains of an attack's time is the attack's own. Passes over examples that are done already
    are not counted there, so that this is what an attack without any work of its own would take.

    Args:
      network: the classifier.
      images: ``[B, H, W, C]``, as many as an attack has at once.
    """

    def __init__(self, network: networks.Network, images: np.ndarray):
        """Compiles both loops."""
        self.images = images
        self.num_passes = max(4, 2000 // len(images))
        labels = jnp.zeros(len(images), jnp.int32)

        def forward(number: Array, points: Array) -> Array:
            # Each pass depends on the one before it, so that none can be left out.
            logits = network.apply(network.params, points)
            return points + 1e-6 * logits[:, :1, None, None]

        def gradient(number: Array, points: Array) -> Array:
            def loss(inputs: Array) -> Array:
                return losses.cross_entropy(network.apply(network.params, inputs), labels).sum()

            return points + 1e-6 * jax.grad(loss)(points)

        def compiled(step: Callable[[Array, Array], Array]) -> Callable[[np.ndarray], Array]:
            loop = jax.jit(lambda points: jax.lax.fori_loop(0, self.num_passes, step, points))
            program: Callable[[np.ndarray], Array] = loop.lower(images).compile()
            return program

        self.forward_loop, self.gradient_loop = compiled(forward), compiled(gradient)

    def seconds(self) -> tuple[float, float]:
        """Returns what an image takes in a forward pass, and in a gradient: the fastest of five."""
        fastest = []
        for loop in (self.forward_loop, self.gradient_loop):
            durations = []
            for _ in range(5):
                started = time.perf_counter()
                loop(self.images).block_until_ready()
                durations.append(time.perf_counter() - started)
            fastest.append(min(durations) / (self.num_passes * len(self.images)))
        return fastest[0], fastest[1]


def options(name: str, task: peers.Task) -> dict[str, Any]:
    """Returns the task's fields under the names of the attack's own options."""
    fields: dict[str, Any] = {
        "num_steps": task.num_steps,
        "step_size": task.step_size,
        "num_targets": task.num_targets,
        "num_queries": task.num_queries,
        "num_searches": task.num_searches,
    }
    if name == "fgsm":
        del fields["step_size"]  # it always goes as far as it may
    if name in _CHUNKED:
        # Images that are done leave the batch: the official Square and the peers' DeepFools do so
        # too, and their EAD stops early.
        fields["chunk_size"] = _CHUNK_SIZE
    if name == "cw":
        fields["initial_constant"] = task.cw_constant
    if name.startswith("ead"):
        fields["abort"] = "example"
    if name == "ead-l1":
        fields["variant"] = "art"
    return {key: value for key, value in fields.items() if key in attacks.options_of(name)}


@dataclasses.dataclass
class Torch:
    """A peer's attacks on the same network in PyTorch."""

    peer: peers.Peer
    model: Any

    def __post_init__(self) -> None:
        """Copies what tables need."""
        self.name, self.version = self.peer.name, self.peer.version
        self._warm: set[int] = set()

    def supports(self, attack: str, norm: str) -> str:
        """Returns why it cannot run the attack, or nothing."""
        return "" if attack in self.peer.attacks else "has no such attack"

    def run(self, attack: str, task: peers.Task, split: networks.Split) -> Found:
        """Attacks the images, after a gradient of the model on as many."""
        import torch

        device = next(self.model.parameters()).device
        # In PyTorch's own layout, which some peers count on.
        images = np.ascontiguousarray(split.images.transpose(0, 3, 1, 2))
        images = torch.tensor(images, device=device)
        labels = torch.tensor(split.labels, device=device).long()
        if len(images) not in self._warm:
            inputs = images.clone().requires_grad_(True)
            for _ in range(3):
                torch.autograd.grad(self.model(inputs).sum(), inputs)
            self._warm.add(len(images))
        synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
        synchronize()
        started = time.perf_counter()
        adv_images = self.peer.attacks[attack](self.model, images.clone(), labels.clone(), task)
        # Which images mislead the model is part of our result, and few peers say it.
        with torch.no_grad():
            misled = (self.model(adv_images).argmax(1) != labels).cpu().numpy()
        synchronize()
        seconds = time.perf_counter() - started
        found = adv_images.detach().cpu().numpy().transpose(0, 2, 3, 1)
        return Found(seconds, 0.0, found, misled)


def quality(
    attack: str, task: peers.Task, split: networks.Split, correct: np.ndarray, found: Found
) -> dict[str, float]:
    """Returns what an attack achieved.

    For attacks inside a ball, and for FAB, ``robust_accuracy``: the share of all images where the
    model is right and stays right within epsilon. Otherwise, over the images that are classified
    correctly, ``success_rate`` and ``median_norm``, failures counted as infinite (left out where
    the median is); for ``ead-en`` it is what that attack makes small, ``|d|_2^2 + beta |d|_1``.

    Args:
      attack: its name.
      task: what it was asked for.
      split: the clean images and labels.
      correct: bool ``[N]``, whether the model is right without an attack.
      found: what it found.
    """
    change = (found.adv_images - split.images).reshape(len(split.labels), -1)
    sizes = {
        "linf": np.abs(change).max(axis=1),
        "l2": np.linalg.norm(change, axis=1),
        "l1": np.abs(change).sum(axis=1),
    }
    if attack not in MINIMUM_NORM:
        inside = sizes[task.norm] <= task.epsilon * (1 + _SLACK)
        return {"robust_accuracy": float(np.mean(correct & ~(found.misled & inside)))}
    size = sizes[task.norm]
    if attack == "ead-en":
        size = sizes["l2"] ** 2 + _BETA * sizes["l1"]
    misled = found.misled[correct]
    median = float(np.median(np.where(misled, size[correct], np.inf)))
    known = {"median_norm": median} if np.isfinite(median) else {}
    return {"success_rate": float(misled.mean()), **known}
