"""Tests of gfa_jax.data.resizing against a triangle filter in NumPy and PyTorch's conventions."""

import io
import threading

import numpy as np
import pytest

from gfa_jax.data import resizing

Image = pytest.importorskip("PIL.Image")


def triangle_weights(old, new):
    """Rows of weights of an antialiased bilinear filter, `[new, old]`."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[None] + 0.5 - centres) / support)
    return weights / weights.sum(1, keepdims=True)


def reference(pixels, size):
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    new_height, new_width = int(size * height / shorter), int(size * width / shorter)
    values = np.einsum("ah,hwc->awc", triangle_weights(height, new_height), pixels.astype(float))
    values = np.einsum("bw,awc->abc", triangle_weights(width, new_width), values)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(40, 30), (30, 47), (25, 25), (9, 200), (500, 375), (16, 16)])
@pytest.mark.parametrize("size", [8, 16, 21])
def test_resize_is_the_triangle_filter_and_the_central_square(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    result = np.asarray(resizing.resize(Image.fromarray(pixels), size))
    assert result.shape == (size, size, 3)
    # Pillow rounds after each of its two passes.
    np.testing.assert_allclose(result, reference(pixels, size), atol=1.6)


def test_what_has_the_size_is_cut_and_not_filtered():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 21, 3), np.uint8)
    result = np.asarray(resizing.resize(Image.fromarray(pixels), 16))
    # round(2.5) is 2, as in torchvision.
    np.testing.assert_array_equal(result, pixels[:, 2:18])


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (9, 5), (value,) * 3).save(stream, format="png")
    return stream.getvalue()


def test_records_come_in_order_and_keep_their_other_features(monkeypatch):
    release = threading.Event()
    resize = resizing.resize

    def slow_first(image, size):
        if image.getpixel((0, 0))[0] == 0:
            assert release.wait(10)
        else:
            release.set()
        return resize(image, size)

    monkeypatch.setattr(resizing, "resize", slow_first)
    monkeypatch.setattr(resizing.os, "cpu_count", lambda: 2)
    records = [(f"k{value}", {"image": png(value), "label": value}) for value in range(50)]
    taken = []
    source = (taken.append(pair) or pair for pair in records)
    results = resizing.resized_records(source, 4, "a split")
    first = next(results)
    # Archives are larger than memory.
    assert len(taken) <= 10
    for value, (key, record) in enumerate([first, *results]):
        with Image.open(io.BytesIO(record["image"])) as image:
            assert image.format == "PNG"
            assert image.size == (4, 4)
            assert image.getpixel((3, 3)) == (value,) * 3
        assert (key, record["label"]) == (f"k{value}", value)
    # What came in is not changed.
    assert records[7][1]["image"] == png(7)


def test_damaged_image_is_named():
    records = [("good", {"image": png(1)}), ("bad", {"image": png(1)[:-30]})]
    with pytest.raises(ValueError, match="bad in a split is not an image, or is damaged"):
        list(resizing.resized_records(records, 4, "a split"))
