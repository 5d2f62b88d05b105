"""Pictures of what is missing are left out."""

from gfa_jax.study import figures


def test_surfaces_of_dead_networks_are_left_out():
    whole = {"lengths": [-1, 1], "median_log_odds": [[-1.0, 0.5], [2.0, 3.0]]}
    dead = {"lengths": [-1, 1], "median_log_odds": [[-1.0, None], [2.0, 3.0]]}
    series = {
        label: [{"test": {} if surface is None else {"loss_surface": surface}}]
        for label, surface in (("whole", whole), ("dead", dead), ("never broken", None))
    }
    assert figures.surfaces(series)
    del series["whole"]
    assert figures.surfaces(series) is None
