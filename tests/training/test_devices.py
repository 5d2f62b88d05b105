"""Times of collectives against closed forms by hand."""

import pytest

from gfa_jax.training.collectives import Transfer
from gfa_jax.training.devices import DEVICES, Device, Hosts, Torus

MB = 10**6
HOSTS = Device(
    {"default": 1e12}, 2e12, 1e9, Hosts(1e9, 1e8, launch=7e-6, hop=1e-6, network_hop=5e-6)
)
TORUS = Device({"default": 1e12}, 2e12, 1e9, Torus(4e9, hop=1e-6))


def bandwidth(device, kind, size, num_bytes, stride=1):
    return device.seconds([Transfer(kind, size, stride, 1, num_bytes)]).bandwidth


def latency(device, kind, size, num_times=1, stride=1):
    return device.seconds([Transfer(kind, size, stride, num_times, 0)]).latency


def test_one_device_sends_nothing():
    for device in (HOSTS, TORUS):
        assert device.seconds([Transfer("all-reduce", 1, 1, 3, 8 * MB)]) == (0, 0)
        assert device.seconds([]) == (0, 0)


def test_a_ring_sends_every_byte_almost_twice():
    assert bandwidth(HOSTS, "all-reduce", 2, 8 * MB) == pytest.approx(8e6 / 1e9)
    assert bandwidth(HOSTS, "all-reduce", 8, 8 * MB) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9)
    # Each of eight neighbours reduces an eighth with those of the other three hosts.
    beyond = 2 * 3 / 4 * 1e6 / 1e8
    expected = 2 * 7 / 8 * 8e6 / 1e9 + beyond
    assert bandwidth(HOSTS, "all-reduce", 32, 8 * MB) == pytest.approx(expected)


@pytest.mark.parametrize("device", [HOSTS, TORUS])
@pytest.mark.parametrize("size", [4, 64, 256])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(device, size):
    """The result of a reduce-scatter is a share of what it reduces."""
    whole = 256 * MB
    halves = [
        bandwidth(device, "reduce-scatter", size, whole // size),
        bandwidth(device, "all-gather", size, whole),
    ]
    assert halves[0] == pytest.approx(halves[1])
    assert bandwidth(device, "all-reduce", size, whole) == pytest.approx(sum(halves))


def test_groups_that_lie_across_hosts_use_the_network_alone():
    # Every eighth of 32 devices: one in each of four hosts.
    assert bandwidth(HOSTS, "all-gather", 4, 8 * MB, stride=8) == pytest.approx(3 / 4 * 8e6 / 1e8)
    # Every fourth: two in each of four hosts, which halve what the network has to carry.
    expected = 1 / 2 * 8e6 / 1e9 + 3 / 4 * 4e6 / 1e8
    assert bandwidth(HOSTS, "all-gather", 8, 8 * MB, stride=4) == pytest.approx(expected)


def test_what_goes_to_other_hosts_passes_the_network_card():
    for kind in ("all-to-all", "collective-permute"):
        assert bandwidth(HOSTS, kind, 8, 8 * MB) == pytest.approx(8e6 / 1e9)
        assert bandwidth(HOSTS, kind, 16, 8 * MB) == pytest.approx(8e6 / 1e8)


def test_latency_grows_with_hops_and_collectives():
    assert latency(HOSTS, "all-reduce", 8) == pytest.approx(7e-6 + 2 * 7e-6)
    assert latency(HOSTS, "all-reduce", 32) == pytest.approx(7e-6 + 2 * (7e-6 + 2 * 5e-6))
    assert latency(HOSTS, "all-gather", 32, 3) == pytest.approx(3 * (7e-6 + 7e-6 + 2 * 5e-6))
    assert latency(HOSTS, "all-reduce", 4, stride=8) == pytest.approx(7e-6 + 2 * 2 * 5e-6)


def test_closed_axes_of_a_torus_have_twice_the_speed_and_half_the_hops():
    assert bandwidth(TORUS, "all-reduce", 256, 256 * MB) == pytest.approx(2 * 255e6 / 4e9)
    assert bandwidth(TORUS, "all-reduce", 64, 64 * MB) == pytest.approx(2 * 63e6 / 2e9)
    # 8x16: of the four links' speed, the closed axis has half and the open one a quarter.
    assert bandwidth(TORUS, "all-reduce", 128, 128 * MB) == pytest.approx(2 * 127e6 / 3e9)
    assert bandwidth(TORUS, "all-gather", 2, 2 * MB) == pytest.approx(1e6 / 1e9)
    assert latency(TORUS, "all-reduce", 256) == pytest.approx(2 * (8 + 8) * 1e-6)
    assert latency(TORUS, "all-reduce", 8) == pytest.approx(2 * (1 + 3) * 1e-6)


def test_groups_that_share_links_share_their_speed():
    # Every fourth of 256: blocks of 2x2 have one member of each group.
    apart = bandwidth(TORUS, "all-gather", 64, 64 * MB, stride=4)
    assert apart == pytest.approx(63e6 / (4e9 / 2))
    assert latency(TORUS, "all-gather", 64, stride=4) == pytest.approx(16e-6)


def test_times_grow_with_bytes_and_devices():
    for device in DEVICES.values():
        sizes = (2, 8, 16, 64)
        times = [sum(device.seconds([Transfer("all-reduce", n, 1, 1, MB)])) for n in sizes]
        assert times == sorted(times)
        assert bandwidth(device, "all-reduce", 8, 2 * MB) == pytest.approx(
            2 * bandwidth(device, "all-reduce", 8, MB)
        )


def test_all_reduce_bandwidth_of_a_pod_is_the_makers():
    """Google's 51.2 and 102.4 TB/s: 256 devices, each of which sends a byte twice meanwhile."""
    for name, pod in {"TPU v5e": 51.2e12, "TPU v6e": 102.4e12}.items():
        seconds = bandwidth(DEVICES[name], "all-reduce", 256, 256 * MB)
        assert 256 * 2 * 255e6 / seconds == pytest.approx(pod)


def test_sizes_that_one_can_have():
    assert [count for count in range(600) if Torus(1.0).has(count)] == [
        *(1, 4, 8, 16, 32),
        *(64, 128, 256),
    ]
    assert Hosts(1.0, 1.0).has(512)


def test_bfloat16_has_a_peak_of_its_own():
    v5e = DEVICES["TPU v5e"]
    assert v5e.peak_of("default", "float32") == v5e.peak_of("highest", "bfloat16") == 197e12
    assert v5e.peak_of("highest", "float32") == pytest.approx(197e12 / 6)
    assert DEVICES["H100 SXM"].peak_of("default", "bfloat16") == 989e12
