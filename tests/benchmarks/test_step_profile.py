"""Tests of the profile: own times of nested events, names of operations, and a real step."""

import pytest

from benchmarks import step_profile as profile
from gfa_jax.benchmark import programs


def event(name, start, duration, thread=1):
    return {"name": name, "ts": start, "dur": duration, "pid": 0, "tid": thread, "ph": "X"}


def test_own_times_leave_out_what_is_inside():
    events = [
        event("outer", 0, 10),
        event("inner", 2, 3),
        event("innermost", 3, 1),
        event("inner", 6, 2),
        event("later", 12, 4),
        event("inner", 1, 5, thread=2),
    ]
    times = profile.own_times(events)
    assert times == {"outer": 5, "inner": 2 + 2 + 5, "innermost": 1, "later": 4}


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(train_step)/jvp(jvp(CNN))/block_1/conv/dot_general", ("block_1", "forward")),
        ("jit(train_step)/transpose(jvp(CNN))/head/dot", ("head", "backward")),
        ("jit(s)/transpose(jvp(transpose(jvp(CNN))))/block_0/add", ("block_0", "second backward")),
        ("jit(train_step)/add", ("rest", "forward")),
    ],
)
def test_parts_by_the_name_of_an_operation(path, part):
    assert profile.part_of(path) == part


def test_names_are_those_of_the_compiled_program():
    text = '  %add.3 = f32[2]{0} add(%a, %b), metadata={op_type="add" op_name="jit(f)/add" id=1}\n'
    assert profile.names_of(text) == {"add.3": "jit(f)/add"}


def test_every_layer_of_a_step_takes_time(monkeypatch, capsys):
    task = programs.Task("cnn4", batch_size=8, image_shape=(8, 8, 1))
    monkeypatch.setattr(programs, "Task", lambda *args, **options: task)
    profile.run(profile.Flags(model="cnn4", batch_size=8, steps="gfa", runs=2))
    lines = capsys.readouterr().out.splitlines()
    layers = {line.split("|")[1].strip(): line for line in lines if line.startswith("| block_")}
    assert set(layers) == {f"block_{number}" for number in range(4)}
    for line in layers.values():
        forward, backward, _ = (float(cell.strip(" %")) for cell in line.split("|")[2:5])
        assert forward + backward > 0
    shares = [
        float(cell.strip(" %"))
        for line in lines
        if line.startswith("| ") and "%" in line
        for cell in line.split("|")[2:5]
    ]
    assert sum(shares) == pytest.approx(100, abs=2)
