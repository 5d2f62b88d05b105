"""The benchmark beside PyTorch on a tiny network, and what it refuses."""

import json

import pytest

pytest.importorskip("torch", reason="compares with PyTorch: make test-parity")

from benchmarks import step_study

pytestmark = pytest.mark.parity
TINY = {"model": "cnn4", "image_size": 8, "batch_size": 8, "rounds": 2, "samples": 1}


def test_every_step_is_there_in_three_forms(tmp_path):
    flags = step_study.Flags(
        out=str(tmp_path), steps="standard,gfa,fgsm_at", sample_seconds=1e-3, **TINY
    )
    page = step_study.run(flags)
    assert page == (tmp_path / "results.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    for step in ("standard", "gfa", "fgsm_at"):
        for library in ("gfa_jax", "PyTorch contiguous", "PyTorch channels_last"):
            assert f"| {step} | {library} |" in page
            assert len(results["seconds"][f"{step}, {library}"]) == 2
        # The faster of PyTorch's layouts is what the others stand beside.
        rows = [line for line in page.splitlines() if line.startswith(f"| {step} | PyTorch")]
        assert any("| 1.00 (1.00-1.00) |" in row for row in rows)


def test_losses_that_differ_are_no_comparison(tmp_path, monkeypatch):
    standard = step_study.torch_steps.standard
    monkeypatch.setattr(step_study.torch_steps, "standard", lambda *args: 1.1 * standard(*args))
    flags = step_study.Flags(out=str(tmp_path / "out"), steps="standard", **TINY)
    with pytest.raises(ValueError, match="steps='standard': the losses differ"):
        step_study.run(flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "trades"}, "steps='trades' has no PyTorch form"),
        ({"rounds": 0}, "rounds=0"),
        ({"model": "vit_tiny"}, "only a CNN"),
        ({"model": "cnn5"}, "model='cnn5' is not one of"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_flags_are_refused(tmp_path, changes, message):
    flags = TINY | {"out": str(tmp_path / "out"), "steps": "standard"} | changes
    with pytest.raises(ValueError, match=message):
        step_study.run(step_study.Flags(**flags))
    assert not (tmp_path / "out").exists()
