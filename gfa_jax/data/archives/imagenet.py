"""ImageNet (ILSVRC 2012) and Imagenette: JPEG files of many sizes."""

from __future__ import annotations

import io
import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping

from gfa_jax.data.archives import base
from gfa_jax.data.tfds_source import import_tfds

TRAIN_FILE = "ILSVRC2012_img_train.tar"
VALIDATION_FILE = "ILSVRC2012_img_val.tar"

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def parse(paths: Mapping[str, pathlib.Path]) -> base.Contents:
    """Parses the two archives of ImageNet; images as encoded bytes.

    The training archive holds one archive a class, `WNID.tar`; the class of validation image
    `ILSVRC2012_val_NUMBER.JPEG` is line NUMBER of a list that tfds ships. The test archive has no
    labels and is not read.

    Source: https://image-net.org/download-images; the stock builder of tfds for the features, keys
    and order of classes.
    """
    labels = import_tfds().core.tfds_path("datasets/imagenet2012")
    classes = frozenset((labels / "labels.txt").read_text().split())
    validation_labels = (labels / "validation_labels.txt").read_text().split()
    return base.Contents(
        splits={
            "train": _not_empty(_train(paths[TRAIN_FILE], classes), str(paths[TRAIN_FILE])),
            "validation": _not_empty(
                _validation(paths[VALIDATION_FILE], validation_labels), str(paths[VALIDATION_FILE])
            ),
        }
    )


def _train(path: pathlib.Path, classes: frozenset[str]) -> Iterator[tuple[str, base.Record]]:
    for member, content in base.iterate_tar(path):
        label = member.removesuffix(".tar")
        if label not in classes:
            raise ValueError(
                f"{path} must hold WNID.tar for classes of ImageNet, it holds {member}"
            )
        # An archive of one class has some hundred megabytes.
        with base.report_damage(f"{member} in {path} is not a .tar archive, or is damaged"):
            for name, image in base.iterate_tar_stream(io.BytesIO(content)):
                yield name, {"file_name": name, "image": image, "label": label}


def _validation(path: pathlib.Path, labels: list[str]) -> Iterator[tuple[str, base.Record]]:
    for name, image in base.iterate_tar(path):
        match = _VALIDATION_NAME.fullmatch(name)
        if match is None or not 1 <= int(match[1]) <= len(labels):
            raise ValueError(
                f"{path} must hold ILSVRC2012_val_NUMBER.JPEG with numbers in 1..{len(labels)}, it "
                f"holds {name}"
            )
        yield name, {"file_name": name, "image": image, "label": labels[int(match[1]) - 1]}


def parse_imagenette(paths: Mapping[str, pathlib.Path], *, folder: str) -> base.Contents:
    """Parses an archive of Imagenette; images as encoded bytes.

    Its files are `FOLDER/{train,val}/WNID/NAME.JPEG`.

    Source: https://github.com/fastai/imagenette; the stock builder of tfds for the features, keys
    and order of classes.

    Args:
      paths: the one archive.
      folder: the folder of all members.
    """
    (path,) = paths.values()
    labels = import_tfds().core.tfds_path("image_classification/imagenette_labels.txt")
    classes = frozenset(labels.read_text().split())
    return base.Contents(
        splits={
            split: _not_empty(
                _imagenette(path, f"{folder}/{part}/", classes), f"{folder}/{part} in {path}"
            )
            for split, part in (("train", "train"), ("validation", "val"))
        }
    )


def _imagenette(
    path: pathlib.Path, prefix: str, classes: frozenset[str]
) -> Iterator[tuple[str, base.Record]]:
    # One pass a split: the archive is a stream, and its splits are written one after the other.
    for member, image in base.iterate_tar(path, gzipped=True, prefix=prefix):
        label, _, name = member.removeprefix(prefix).partition("/")
        if not name.endswith(".JPEG") or name != posixpath.basename(name):
            continue
        if label not in classes:
            raise ValueError(f"{path} must hold classes of Imagenette, it holds {member}")
        yield name, {"image": image, "label": label}


def _not_empty(
    records: Iterator[tuple[str, base.Record]], what: str
) -> Iterator[tuple[str, base.Record]]:
    empty = True
    for pair in records:
        empty = False
        yield pair
    if empty:
        raise ValueError(f"{what} holds no images: it is cut short or another archive")
