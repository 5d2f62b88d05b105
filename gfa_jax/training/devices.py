"""Data sheets of accelerators, and how long their networks take for collectives.

Peaks, links and memories are the makers' figures: docs.cloud.google.com/tpu/docs (v5e, v6e), and
NVIDIA's data sheets of H100 SXM, A100 SXM, DGX H100 and DGX A100. Latencies are those that NCCL
plans with on GPUs; on TPUs they are an assumption, named where it is made.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from gfa_jax.training.collectives import Transfer


class Seconds(NamedTuple):
    """How long collectives take.

    Attributes:
      bandwidth: seconds in which bytes travel; other work may go on meanwhile.
      latency: seconds that they take beside, however few bytes they have.
    """

    bandwidth: float
    latency: float


class Network(Protocol):
    """What joins devices; a group is ``size`` of them, every ``stride``-th from one on."""

    @property
    def launch(self) -> float:
        """Seconds before a collective's first byte."""

    def has(self, num_devices: int) -> bool:
        """Whether one can have so many devices."""

    def gather(self, num_bytes: float, size: int, stride: int) -> Seconds:
        """Returns how long an all-gather of results of so many bytes takes, or what it mirrors."""

    def exchange(self, num_bytes: float, size: int, stride: int) -> float:
        """Returns seconds of bandwidth for so many bytes from each device to any others."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts whose devices are joined by a switch, and a network card for each device beyond.

    *Bandwidth.* Among ``n`` devices of a host a ring sends ``(n - 1) / n`` of the bytes. Beyond it
    the collective is hierarchical: each device gathers its share of the bytes from other hosts,
    and the rest within its own.

    *Latency.* That of NCCL's trees with protocol LL (src/graph/tuning.cc): a chain through the
    host, then ``log2`` of the hosts.

    Attributes:
      link: bytes per second that a device sends within its host, in one direction.
      network: bytes per second that it sends beyond.
      per_host: devices of a host.
      launch: seconds; NCCL's 6.8 us.
      hop: seconds of a hop within a host; NCCL's 0.6 us.
      network_hop: seconds of a hop between hosts; NCCL's 5 us.
    """

    link: float
    network: float
    per_host: int = 8
    launch: float = 6.8e-6
    hop: float = 0.6e-6
    network_hop: float = 5e-6

    def has(self, num_devices: int) -> bool:
        """Any number: a switched network grows."""
        return num_devices > 0

    def gather(self, num_bytes: float, size: int, stride: int) -> Seconds:
        """See ``Network``."""
        inside, hosts = self._split(size, stride)
        return Seconds(
            (inside - 1) / inside * num_bytes / self.link
            + (hosts - 1) / hosts * num_bytes / inside / self.network,
            (inside - 1) * self.hop + math.ceil(math.log2(hosts)) * self.network_hop,
        )

    def exchange(self, num_bytes: float, size: int, stride: int) -> float:
        """See ``Network``; at the speed of the slowest way."""
        _, hosts = self._split(size, stride)
        return num_bytes / (self.network if hosts > 1 else self.link)

    def _split(self, size: int, stride: int) -> tuple[int, int]:
        inside = min(size, max(1, self.per_host // stride))
        return inside, math.ceil(size / inside)


@dataclasses.dataclass(frozen=True)
class Torus:
    """A two-dimensional grid, as square as it can be, whose long axes close to rings.

    *Bandwidth.* Both axes carry half of the bytes at once. A closed axis sends in two directions;
    on an open one every byte reaches the end over one link: half the speed. Groups that lie between
    each other (``stride``) share the links.

    *Latency.* As many hops as both axes are long, half as many where they are closed.

    Attributes:
      link: bytes per second that a device sends over its four links together, in one direction.
      side: length from which an axis is closed.
      hop: seconds; an assumption, of the size that jax-ml.github.io/scaling-book uses.
      launch: seconds; none is known, and a compiled program starts its collectives itself.
    """

    link: float
    side: int = 16
    hop: float = 1e-6
    launch: float = 0.0

    def has(self, num_devices: int) -> bool:
        """The slices that Google rents: 1x1, 2x2, 2x4, 4x4, up to 16x16."""
        return num_devices in (1, 4, 8, 16, 32, 64, 128, 256)

    def gather(self, num_bytes: float, size: int, stride: int) -> Seconds:
        """See ``Network``."""
        axes = self._axes(size * stride)
        speed = sum(self.link / (2 if self._closed(axis) else 4) for axis in axes if axis > 1)
        return Seconds(
            (size - 1) / size * num_bytes / (speed / math.sqrt(stride)), self._hops(axes) * self.hop
        )

    def exchange(self, num_bytes: float, size: int, stride: int) -> float:
        """See ``Network``; each byte takes half of the longest way, and all links are busy."""
        return num_bytes * max(1.0, self._hops(self._axes(size * stride)) / 2) / self.link

    def _closed(self, axis: int) -> bool:
        return axis >= self.side

    def _hops(self, axes: tuple[int, int]) -> float:
        return sum(axis / 2 if self._closed(axis) else axis - 1 for axis in axes)

    def _axes(self, num_devices: int) -> tuple[int, int]:
        short = math.isqrt(num_devices)
        while num_devices % short:
            short -= 1
        return short, num_devices // short


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and the network of many of them.

    Attributes:
      peak: dense floating-point operations per second of float32 products, by ``config.precision``.
      half_peak: of bfloat16 products.
      memory: bytes.
      network: what joins devices.
    """

    peak: Mapping[str, float]
    half_peak: float
    memory: float
    network: Network

    def peak_of(self, precision: str, dtype: str) -> float:
        """Returns operations per second for a ``config.precision`` and ``config.model.dtype``."""
        return self.half_peak if dtype == "bfloat16" else self.peak[precision]

    def seconds(self, transfers: Iterable[Transfer]) -> Seconds:
        """Returns how long collectives take one after another.

        A reduce-scatter mirrors an all-gather of what it sums; an all-reduce is both.
        """
        bandwidth, latency = 0.0, 0.0
        for kind, size, stride, num_times, num_bytes in transfers:
            if size == 1:
                continue
            whole = num_bytes * size if kind == "reduce-scatter" else num_bytes
            one_way = self.network.gather(whole, size, stride)
            ways = 2 if kind == "all-reduce" else 1
            latency += num_times * (self.network.launch + ways * one_way.latency)
            if kind in ("all-to-all", "collective-permute"):
                bandwidth += self.network.exchange(num_bytes, size, stride)
            else:
                bandwidth += ways * one_way.bandwidth
        return Seconds(bandwidth, latency)


def _tpu(bfloat16: float, link: float, memory: float) -> Device:
    # Float32 products are one, three or six products of bfloat16.
    peak = {"default": bfloat16, "high": bfloat16 / 3, "highest": bfloat16 / 6}
    return Device(peak, bfloat16, memory, Torus(link))


DEVICES: Mapping[str, Device] = {
    # 400 and 800 GB/s over all links in both directions.
    "TPU v5e": _tpu(197e12, 200e9, 16e9),
    "TPU v6e": _tpu(918e12, 400e9, 32e9),
    # TF32 by default, without sparsity; NVLink's 900 and 600 GB/s count both directions; a network
    # card of 400 and 200 Gb/s for each device.
    "H100 SXM": Device(
        {"default": 494e12, "high": 494e12, "highest": 67e12}, 989e12, 80e9, Hosts(450e9, 50e9)
    ),
    "A100 SXM": Device(
        {"default": 156e12, "high": 156e12, "highest": 19.5e12}, 312e12, 80e9, Hosts(300e9, 25e9)
    ),
}
"""The devices that plans are made for."""

_KINDS = {
    "TPU v5 lite": "TPU v5e",
    "TPU v5e": "TPU v5e",
    "TPU v6 lite": "TPU v6e",
    "TPU v6e": "TPU v6e",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA A100-SXM4-40GB": "A100 SXM",
    "NVIDIA A100-SXM4-80GB": "A100 SXM",
}


def of_kind(kind: str) -> Device | None:
    """Returns the data sheet for a ``jax.Device.device_kind``, or ``None`` without one."""
    return DEVICES.get(_KINDS.get(kind, ""))
