"""Data sheets of accelerators, and how long their networks take for a collective.

Peaks, links and memories are the makers' figures: cloud.google.com/tpu/docs (v5e, v6e), NVIDIA's
data sheets of H100 SXM and A100 SXM. Latencies are assumptions of ours, of the size that such
systems show.
"""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and the network of a pod of them.

    Attributes:
      peak: dense floating-point operations per second of float32 products, by ``config.precision``.
      half_peak: of bfloat16 products.
      link: bytes per second that it sends to its neighbours, in one direction.
      memory: bytes.
      neighbours: devices that ``link`` joins: of a host with NVLink, or a whole TPU slice.
      network: bytes per second that it sends beyond them; 0 where there is nothing beyond.
      latency: seconds of one hop of a collective.
      torus: length of an axis with wrap-around links; 0 where the network is no torus.
    """

    peak: Mapping[str, float]
    half_peak: float
    link: float
    memory: float
    neighbours: int
    network: float = 0.0
    latency: float = 5e-6
    torus: int = 0

    def peak_of(self, precision: str, dtype: str) -> float:
        """Returns operations per second for a ``config.precision`` and ``config.model.dtype``."""
        return self.half_peak if dtype == "bfloat16" else self.peak[precision]

    def all_reduce_seconds(self, num_bytes: float, num_times: int, num_devices: int) -> float:
        """Returns how long all-reduces of so many bytes in all take on so many devices.

        *Bandwidth.* A ring of n devices sends every byte ``2 (n - 1) / n`` times. Beyond the
        neighbours the reduction is hierarchical: a reduce-scatter among them, an all-reduce of each
        one's share between groups, an all-gather among them. A torus axis shorter than the one with
        wrap-around links is a line, on which each byte travels in one direction: half the speed.

        *Latency.* Each all-reduce takes ``2 ceil(log2 n)`` hops; on a torus as many as its two
        axes, back and forth, are long.

        Args:
          num_bytes: of the results on one device.
          num_times: collectives that these bytes come in.
          num_devices: that take part.
        """
        if num_devices == 1:
            return 0.0
        inside = min(num_devices, self.neighbours)
        speed = self.link
        hops = 2 * math.ceil(math.log2(num_devices))
        if self.torus:
            axis = math.sqrt(num_devices)
            speed = self.link if axis >= self.torus else self.link / 2
            hops = math.ceil(2 * axis)
        seconds = 2 * (inside - 1) / inside * num_bytes / speed
        groups = num_devices / inside
        if groups > 1:
            seconds += 2 * (groups - 1) / groups * num_bytes / inside / self.network
        return seconds + num_times * hops * self.latency

    @property
    def most(self) -> float:
        """The largest pod: a TPU slice; without limit where there is a network beyond."""
        return math.inf if self.network else self.neighbours


def _tpu(bfloat16: float, link: float, memory: float) -> Device:
    # Float32 products are one, three or six products of bfloat16.
    peak = {"default": bfloat16, "high": bfloat16 / 3, "highest": bfloat16 / 6}
    return Device(peak, bfloat16, link, memory, neighbours=256, latency=1e-6, torus=16)


DEVICES: Mapping[str, Device] = {
    "TPU v5e": _tpu(197e12, 200e9, 16e9),
    "TPU v6e": _tpu(918e12, 448e9, 32e9),
    # TF32 by default, without sparsity; 400 and 200 Gb/s of network for each device.
    "H100 SXM": Device(
        {"default": 494e12, "high": 494e12, "highest": 67e12},
        half_peak=989e12,
        link=450e9,
        memory=80e9,
        neighbours=8,
        network=50e9,
    ),
    "A100 SXM": Device(
        {"default": 156e12, "high": 156e12, "highest": 19.5e12},
        half_peak=312e12,
        link=300e9,
        memory=80e9,
        neighbours=8,
        network=25e9,
    ),
}
"""The devices that plans are made for."""
