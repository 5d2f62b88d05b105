"""The attack benchmark: what is measured, in which order, and where results go."""

import dataclasses
import datetime
import os
import pathlib
import platform
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import measure, networks, peers, table
from gfa_jax import ThreatModel, cli, files
from gfa_jax.benchmark.environment import cpu_name

EPSILONS = {
    "digits": {"linf": 0.15, "l2": 0.6, "l1": 2.0},
    "tfds:cifar10": {"linf": 8 / 255, "l2": 0.5, "l1": 12.0},
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    out: str = "runs/benchmark-attacks"
    """Folder of results.json, results.md and the trained weights."""
    data: str = "digits"
    """Data set: digits, or another that gfa_jax.data knows, such as tfds:cifar10."""
    data_dir: str | None = None
    """Folder of prepared data sets."""
    model: str = "small"
    """small, or a model of gfa_jax.models without BatchNorm."""
    epochs: int = 30
    """Epochs of adversarial training, once for each OUT."""
    attacks: str = ""
    """Names joined by commas; all by default."""
    norms: str = "linf,l2,l1"
    """Norms joined by commas."""
    peers: str = ",".join(peers.PEERS)
    """Peers joined by commas; one that is not installed is left out, with its reason."""
    num_images: int = 500
    """Images to attack, in one batch."""
    num_slow: int = 50
    """Images for a peer's attacks that take minutes."""
    rounds: int = 3
    """Times that each is measured; the libraries take turns."""
    steps: int = 100
    """Gradient steps of all attacks but fgsm (deepfool: 50 at most)."""
    queries: int = 5000
    """Queries of Square."""
    searches: int = 9
    """Constants that EAD and C&W try."""
    threads: int | None = None
    """CPU threads of JAX and of PyTorch; as many as there are cores by default."""
    seed: int = 0
    """Of the training and the attacks."""


_SETTINGS = (
    *("data", "model", "epochs", "num_images", "num_slow"),
    *("steps", "queries", "searches", "threads", "seed"),
)
"""Flags that one folder of results has in common."""


class Results:
    """What was measured so far, on disk after every run."""

    def __init__(self, out: pathlib.Path, settings: dict[str, Any], environment: dict[str, Any]):
        """Reads the results of an earlier call.

        Raises:
          ValueError: for results of other settings, versions or devices.
        """
        self.json, self.markdown = out / "results.json", out / "results.md"
        self.content = {
            "settings": settings,
            "environment": environment,
            "notes": {},
            "measurements": [],
            "skipped": {},
        }
        if self.json.exists():
            old = files.read_json(self.json)
            for part in ("settings", "environment"):
                for key, value in self.content[part].items():
                    if key not in ("started", "versions") and old[part].get(key) != value:
                        raise ValueError(
                            f"{self.json} has {key}={old[part].get(key)!r}, this call {value!r}: "
                            "use another --out."
                        )
            versions = old["environment"]["versions"]
            for name, version in environment["versions"].items():
                if versions.setdefault(name, version) != version:
                    raise ValueError(
                        f"{self.json} was measured with {name} {versions[name]}, which is now "
                        f"{version}: use another --out."
                    )
            # What was missing may be there now.
            self.content = old | {"skipped": {}}

    def has(self, **where: Any) -> bool:
        """Returns whether a run was measured."""
        return any(
            all(one[key] == value for key, value in where.items())
            for one in self.content["measurements"]
        )

    def add(self, **measurement: Any) -> None:
        """Adds a run and writes everything."""
        self.content["measurements"].append(measurement)
        self.write()

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons by what is not measured."""
        return self.content["skipped"]

    def skip(self, what: str, reason: str) -> None:
        """Notes why something is not measured."""
        self.skipped[what] = reason

    def write(self) -> None:
        """Writes both files."""
        files.write_json(self.json, self.content)
        files.write_bytes(self.markdown, table.render(self.content).encode())


def run(flags: Flags) -> None:
    """Measures what is not measured yet, and prints the table.

    Raises:
      ValueError: for flags that do not fit.
      ImportError: without PyTorch.
    """
    # On a GPU, JAX would otherwise take the memory that PyTorch needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    num_threads = limit_threads(flags.threads)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"PyTorch is missing ({error}): make install-parity.") from error
    torch.set_num_threads(num_threads)
    # No reduced precision on a GPU, on either side.
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()

    if flags.data not in EPSILONS:
        raise ValueError(f"data={flags.data!r} has no radii here; valid: {', '.join(EPSILONS)}.")
    epsilons = EPSILONS[flags.data]
    rows = chosen_rows(flags)
    out = pathlib.Path(flags.out)
    network, test = make_network(flags, out, ThreatModel("linf", epsilons["linf"]))
    model = networks.to_torch(network).to("cuda" if on_gpu else "cpu")
    correct = np.asarray(jax.jit(network.logits_fn)(test.images)).argmax(1) == test.labels

    libraries, missing = [measure.Ours(network)], {}
    for name in cli.split_names(flags.peers):
        try:
            libraries.append(measure.Torch(peers.load(name), model))
        except ImportError as error:
            missing[name] = str(error)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    versions |= {"torch": torch.__version__, "numpy": np.__version__}
    versions |= {one.name: one.version for one in libraries[1:]}
    environment = {
        "device": jax.devices()[0].device_kind if on_gpu else cpu_name(),
        "threads": num_threads,
        "precision": "float32",
        "clean_accuracy": float(correct.mean()),
        "versions": versions,
        "started": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    settings = {name: getattr(flags, name) for name in _SETTINGS} | {"epsilons": epsilons}
    results = Results(out, settings, environment)
    for name, reason in missing.items():
        results.skip(name, reason)
    results.content["notes"][measure.OURS] = dict(measure.OUR_NOTES)
    for library in libraries[1:]:
        results.content["notes"][library.name] = dict(library.peer.notes)

    plan = [
        (number, attack, norm, library)
        for number in range(flags.rounds)
        for attack, norm in rows
        # Nobody always runs first.
        for library in (libraries if number % 2 == 0 else libraries[::-1])
    ]
    unsupported: set[str] = set()
    for position, (number, attack, norm, library) in enumerate(plan, start=1):
        what = f"{attack} {norm} {library.name}"
        where = {"attack": attack, "norm": norm, "library": library.name, "round": number}
        reason = library.supports(attack, norm)
        if reason or what in unsupported or what in results.skipped or results.has(**where):
            continue
        slow = isinstance(library, measure.Torch) and attack in library.peer.slow
        images = test.take(min(flags.num_slow, flags.num_images) if slow else flags.num_images)
        task = make_task(
            flags, attack, norm, epsilons[norm], num_classes=network.module.num_classes
        )
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        say(f"[{position}/{len(plan)}] {what}, round {number + 1}: ", end="")
        try:
            found = library.run(attack, task, images)
        except peers.UnsupportedError:
            say("the library has no such attack")
            unsupported.add(what)
            continue
        except Exception as error:  # a peer's failure must not end the benchmark
            if library.name == measure.OURS:
                raise
            say(f"failed, {type(error).__name__}: {error}")
            results.skip(what, f"{type(error).__name__}: {error}")
            continue
        size = len(images.labels)
        quality = measure.quality(attack, task, images, correct[:size], found)
        say(f"{found.seconds:.2f} s")
        results.add(
            **where,
            num_images=size,
            seconds=found.seconds,
            compile_seconds=found.compile_seconds,
            network_seconds=found.network_seconds,
            load=load,
            **quality,
        )
    results.write()
    print(results.markdown.read_text())
    say(f"written: {results.markdown}, {results.json}")


def say(text: str, end: str = "\n") -> None:
    """Prints progress on standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


def chosen_rows(flags: Flags) -> list[tuple[str, str]]:
    """Returns the attacks and norms to measure.

    Raises:
      ValueError: for an unknown attack, norm or peer, or where no attack is left.
    """
    names, norms = (
        cli.split_names(flags.attacks) or list(measure.NORMS),
        cli.split_names(flags.norms),
    )
    known = {"attacks": (names, measure.NORMS), "norms": (norms, ("linf", "l2", "l1"))}
    known["peers"] = (cli.split_names(flags.peers), peers.PEERS)
    for flag, (given, valid) in known.items():
        for name in given:
            if name not in valid:
                raise ValueError(f"{flag}={name!r} is unknown; valid: {', '.join(valid)}.")
    rows = [(name, norm) for norm in norms for name in names if norm in measure.NORMS[name]]
    if not rows:
        raise ValueError(f"attacks={flags.attacks!r} have no form in norms={flags.norms!r}.")
    return rows


def make_network(
    flags: Flags, out: pathlib.Path, threat: ThreatModel
) -> tuple[networks.Network, networks.Split]:
    """Trains the network, or reads the weights of an earlier call, and loads the images."""
    train, test = networks.load(flags.num_images, data_dir=flags.data_dir, name=flags.data)
    module = networks.create(flags.model, train)
    path = out / f"{flags.model}-{flags.epochs}-epochs-seed-{flags.seed}.npz"
    if path.exists():
        return networks.Network(module, networks.restore(path)), test
    say(f"training {flags.model} on {flags.data} for {flags.epochs} epochs")
    network = networks.train(module, train, threat, num_epochs=flags.epochs, seed=flags.seed)
    networks.save(path, network.params)
    return network, test


def make_task(
    flags: Flags, attack: str, norm: str, epsilon: float, *, num_classes: int
) -> peers.Task:
    """Returns what all libraries are asked for."""
    return peers.Task(
        norm,
        epsilon,
        num_steps=min(flags.steps, 50) if attack == "deepfool" else flags.steps,
        step_size=2.5 * epsilon / flags.steps,
        num_targets=min(9, num_classes - 1),
        num_queries=flags.queries,
        num_searches=flags.searches,
        num_classes=num_classes,
        seed=flags.seed,
    )


def limit_threads(num_threads: int | None) -> int:
    """Confines the process to so many cores, and returns their number.

    JAX sizes its pool by the cores that the process may use, when it is first called.

    Raises:
      ValueError: for more threads than cores, or where the system cannot confine a process.
    """
    if not hasattr(os, "sched_setaffinity"):
        if num_threads is not None:
            raise ValueError(f"threads={num_threads}: only Linux can confine a process.")
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if num_threads is None:
        return len(cores)
    if not 1 <= num_threads <= len(cores):
        raise ValueError(f"threads={num_threads} must lie in 1 to {len(cores)}.")
    os.sched_setaffinity(0, cores[:num_threads])
    return num_threads
