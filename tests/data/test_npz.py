"""Tests of gfa_jax.data.npz on .npz files, whole, damaged and hostile."""

import gzip
import io
import pathlib
import pickle
import warnings
import zipfile

import numpy as np
import pytest

from gfa_jax.data import load, open_lazily


def arrays(dtype=np.uint8, num_train=7, num_test=3, shape=(4, 5, 3)):
    rng = np.random.default_rng(0)

    def images(num):
        values = rng.integers(0, 256, (num, *shape), np.uint8)
        return values if dtype == np.uint8 else (values / 255).astype(dtype)

    return {
        "train_images": images(num_train),
        "train_labels": np.arange(num_train) % 3,
        "test_images": images(num_test),
        "test_labels": np.array([3, 0, 1])[:num_test],
    }


def save(path, **content):
    np.savez(path, **content)
    return f"arrays:{path}"


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_round_trip(dtype, tmp_path):
    content = arrays(dtype)
    name = save(tmp_path / "set.npz", **content)
    for split in ("train", "test"):
        dataset = load(name, split)
        images = content[f"{split}_images"]
        assert dataset.images.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        np.testing.assert_array_equal(
            dataset.images, images[dataset.ids].astype(dataset.images.dtype), strict=True
        )
        np.testing.assert_array_equal(dataset.labels, content[f"{split}_labels"][dataset.ids])
        assert sorted(dataset.ids) == list(range(len(images)))
        # The largest label occurs in the test split only.
        assert dataset.num_classes == 4
        assert dataset.label_names == ("0", "1", "2", "3")
    assert load(name, "test").ids.tolist() == [0, 1, 2]
    validation = load(name, "validation", num_validation=2)
    train = load(name, "train", num_validation=2)
    assert sorted([*train.ids, *validation.ids]) == list(range(7))


def test_lazy_arrays_are_read_from_the_file_once(tmp_path):
    name = save(tmp_path / "set.npz", **arrays(np.float64))
    whole = load(name, "train", num_validation=2)
    lazy = open_lazily(name, "train", num_validation=2)
    (tmp_path / "set.npz").unlink()
    for positions in (np.array([4, 0]), np.array([2])):
        for got, expected in zip(lazy.read(positions), whole.read(positions), strict=True):
            np.testing.assert_array_equal(got, expected, strict=True)


def test_arrays_without_channels_get_one(tmp_path):
    content = arrays(shape=(4, 5))
    dataset = load(save(tmp_path / "set.npz", **content), "test")
    np.testing.assert_array_equal(dataset.images, content["test_images"][..., None], strict=True)


def test_arrays_label_names_set_the_number_of_classes(tmp_path):
    names = np.array(["ant", "bee", "cat", "dog", "emu"])
    dataset = load(save(tmp_path / "set.npz", **arrays(), label_names=names), "test")
    assert dataset.num_classes == 5
    assert dataset.label_names == ("ant", "bee", "cat", "dog", "emu")


@pytest.mark.parametrize("label_dtype", [np.uint8, np.int16, np.uint64])
def test_arrays_take_any_integer_labels(label_dtype, tmp_path):
    content = arrays()
    content["train_labels"] = content["train_labels"].astype(label_dtype)
    assert load(save(tmp_path / "set.npz", **content), "train").labels.dtype == np.int32


def test_arrays_are_found_by_name_and_by_data_dir(tmp_path, monkeypatch):
    save(tmp_path / "set.npz", **arrays())
    np.savez_compressed(tmp_path / "small.npz", **arrays(num_test=2))
    assert len(load("arrays:set.npz", "test", data_dir=str(tmp_path))) == 3
    assert len(load("arrays", "test", data_dir=str(tmp_path / "set.npz"))) == 3
    assert len(load("arrays:small.npz", "test", data_dir=str(tmp_path))) == 2
    monkeypatch.chdir(tmp_path)
    assert len(load("arrays:set.npz", "test")) == 3
    for name, data_dir in (("arrays:sets.npz", None), ("arrays", str(tmp_path))):
        with pytest.raises(FileNotFoundError, match=r"needs an \.npz file"):
            load(name, "test", data_dir=data_dir)


def nan_images():
    images = np.zeros((3, 4, 5, 3), np.float32)
    images[1, 2, 3, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": np.zeros((3, 4), np.uint8)}, r"test_images .* got \(3, 4\)"),
        ({"test_images": np.zeros((3, 4, 5, 3, 1), np.uint8)}, "test_images .* must have shape"),
        ({"test_images": np.zeros((3, 4, 5, 3), np.int32)}, "uint8, float32 or float64, got int32"),
        ({"test_images": np.zeros((3, 4, 5, 3), bool)}, "uint8, float32 or float64, got bool"),
        ({"test_images": np.zeros((0, 4, 5, 3), np.uint8)}, "test_images .* is empty"),
        ({"test_images": np.zeros((3, 8, 5, 3), np.uint8)}, "must have the same image shape"),
        ({"test_images": np.full((3, 4, 5, 3), 1.5)}, r"in \[0, 1\] .* got values from 1.5 to 1.5"),
        ({"test_images": np.full((3, 4, 5, 3), -0.1, np.float32)}, r"in \[0, 1\] .* from -0.1"),
        ({"test_images": np.full((3, 4, 5, 3), np.inf)}, r"finite and in \[0, 1\]"),
        ({"test_images": nan_images()}, r"finite and in \[0, 1\] .* from nan"),
        ({"test_labels": np.zeros(3)}, "test_labels .* must be integers, got float64"),
        ({"test_labels": np.zeros(3, bool)}, "test_labels .* must be integers, got bool"),
        ({"test_labels": np.zeros((3, 1), int)}, r"test_labels .* shape \(3,\).* got \(3, 1\)"),
        ({"test_labels": np.zeros(2, int)}, r"test_labels .* shape \(3,\).* got \(2,\)"),
        (
            {"test_labels": np.array([0, -1, 2])},
            r"test_labels .* \[0, 3\), got values from -1 to 2",
        ),
        ({"test_labels": np.array([0, 1, 2**32 - 1], np.uint32)}, "labels .* reach 4294967295"),
        ({"label_names": np.array(["a", "b", "c"])}, r"test_labels .* \[0, 3\), got .* 0 to 3"),
        ({"label_names": np.array([1, 2, 3, 4])}, "label_names .* must be strings"),
        ({"label_names": np.array([["a", "b"]])}, "label_names .* must be strings"),
    ],
)
def test_arrays_that_break_a_rule(changes, message, tmp_path):
    name = save(tmp_path / "set.npz", **{**arrays(), **changes})
    with pytest.raises(ValueError, match=message) as caught:
        load(name, "test")
    assert "set.npz" in str(caught.value)


def test_arrays_with_a_missing_key_list_what_is_there(tmp_path):
    content = arrays()
    content["x_test"] = content.pop("test_images")
    with pytest.raises(ValueError, match="lacks test_images; it holds test_labels, train_images"):
        load(save(tmp_path / "set.npz", **content), "test")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("key", ["test_images", "train_labels", "label_names"])
def test_pickled_arrays_are_refused_and_not_run(key, tmp_path):
    marker = tmp_path / "ran"
    payload = np.array([Payload(marker)], dtype=object)
    np.savez(tmp_path / "set.npz", **{**arrays(), key: payload})
    with pytest.raises(ValueError, match=f"{key} .* pickled arrays are refused"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")
    assert not marker.exists()
    # The payload would have run.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_pickle_file_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "set.npz").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=r"set\.npz is not an \.npz file"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")
    assert not marker.exists()


def test_every_read_forbids_pickle(tmp_path, monkeypatch):
    allowed = []
    np_load = np.load
    monkeypatch.setattr(
        np, "load", lambda *args, **kw: allowed.append(kw["allow_pickle"]) or np_load(*args, **kw)
    )
    load(save(tmp_path / "set.npz", **arrays(), label_names=np.array(list("abcd"))), "test")
    assert set(allowed) == {False}


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("second", ["test_images", "test_images.npy"])
def test_two_members_for_one_key_are_refused(second, tmp_path):
    save(tmp_path / "set.npz", **arrays())
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        # zipfile warns about the duplicate that it writes.
        warnings.simplefilter("ignore")
        archive.writestr(second, npy_bytes(np.zeros((3, 4, 5, 3), np.uint8)))
    with pytest.raises(ValueError, match="ambiguous"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", npy_bytes(np.zeros((3, 4, 5, 3))), gzip.compress(b"x")],
    ids=["", "text", "npy", "gzip"],
)
def test_a_file_that_is_no_npz(content, tmp_path):
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz is not an \.npz file, or is damaged"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz(saver, tmp_path):
    path = tmp_path / "set.npz"
    saver(path, **arrays())
    content = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(ValueError, match="damaged"):
            load(f"arrays:{path}", "train")
    changed = bytearray(content)
    changed[400] ^= 0xFF
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="damaged"):
        load(f"arrays:{path}", "train")
