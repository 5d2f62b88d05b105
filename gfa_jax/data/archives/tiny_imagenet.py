"""Tiny-ImageNet: 200 classes of ImageNet at 64x64, which tfds does not have."""

from __future__ import annotations

import pathlib
import posixpath
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gfa_jax.data.archives import base

FILE = "tiny-imagenet-200.zip"

_URL = f"http://cs231n.stanford.edu/{FILE}"
_NUM_BYTES = 248_100_043
_SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"

_FOLDER = "tiny-imagenet-200"
_SIZE = 64


def make_builder(tfds: Any) -> Any:
    """Returns a builder class `tiny_imagenet` for tfds, which does not have one.

    Features are `id` (the file's name without `.JPEG`), `image` `uint8 [64, 64, 3]` and `label`;
    splits are `train` and `validation`, as those of ImageNet. The archive's `test` has no labels.
    """
    version = tfds.core.Version("1.0.0")
    info = tfds.core.download.checksums.UrlInfo(size=_NUM_BYTES, checksum=_SHA256, filename=FILE)

    class TinyImagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Tiny-ImageNet."""

        name = "tiny_imagenet"
        VERSION = version
        RELEASE_NOTES = {"1.0.0": "Images as published, labels in the order of WordNet ids."}  # noqa: RUF012
        url_infos = {_URL: info}  # noqa: RUF012

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="200 classes of ImageNet with 500 training images each, at 64x64.",
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(
                            shape=(_SIZE, _SIZE, 3), encoding_format="jpeg"
                        ),
                        "label": tfds.features.ClassLabel(num_classes=200),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="http://cs231n.stanford.edu/reports/2015/pdfs/yle_project.pdf",
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            raise NotImplementedError

        def _generate_examples(self) -> Any:
            raise NotImplementedError

    return TinyImagenet


def parse(paths: Mapping[str, pathlib.Path]) -> base.Contents:
    """Parses the archive.

    `train/WNID/images/WNID_N.JPEG` is the training split, `val/images/val_N.JPEG` the validation
    split, with classes in `val/val_annotations.txt`. Classes are in the order of their WordNet ids,
    which is that of the folders' names and so of torchvision's `ImageFolder`, not that of
    `wnids.txt`. JPEG bytes are stored as they are, some of them grey, once they are seen to decode.

    Source: the archive, of the course CS231n at Stanford, has no description; its layout is that of
    ImageNet's, with `val_annotations.txt` lines of file, WordNet id and box, separated by tabs.
    """
    path = paths[FILE]
    with _damage(path), zipfile.ZipFile(path) as archive:
        classes = sorted(set(archive.read(f"{_FOLDER}/wnids.txt").decode().split()))
        text = archive.read(f"{_FOLDER}/val/val_annotations.txt").decode()
        annotations = dict(line.split("\t")[:2] for line in text.splitlines() if line)
        files = [info for info in archive.infolist() if info.filename.endswith(".JPEG")]
    if len(classes) != 200:
        raise ValueError(
            f"wnids.txt in {path} must hold 200 different classes, it holds {len(classes)}"
        )

    members: dict[str, list[tuple[zipfile.ZipInfo, str]]] = {"train": [], "validation": []}
    for info in files:
        match info.filename.split("/"):
            case [folder, "train", label, "images", _] if folder == _FOLDER:
                members["train"].append((info, label))
            case [folder, "val", "images", name] if folder == _FOLDER:
                if name not in annotations:
                    raise ValueError(f"val_annotations.txt in {path} has no line for {name}")
                members["validation"].append((info, annotations[name]))
    for split, pairs in members.items():
        if not pairs:
            raise ValueError(f"{path} lacks images of {split}: it is cut short or another archive")
        unknown = {label for _, label in pairs} - set(classes)
        if unknown:
            raise ValueError(
                f"{path} has classes that wnids.txt lacks: {', '.join(sorted(unknown))}"
            )
    if len(members["validation"]) != len(annotations):
        raise ValueError(
            f"{path} lacks images of validation: val_annotations.txt has {len(annotations)} lines "
            f"for {len(members['validation'])} images"
        )
    return base.Contents(
        splits={split: _records(path, pairs) for split, pairs in members.items()},
        label_names={"label": classes},
    )


def _records(
    path: pathlib.Path, members: Sequence[tuple[zipfile.ZipInfo, str]]
) -> Iterator[tuple[str, base.Record]]:
    with _damage(path), zipfile.ZipFile(path) as archive:
        for info, label in members:
            key = posixpath.basename(info.filename).removesuffix(".JPEG")
            image = _checked(archive.read(info), f"{info.filename} in {path}")
            yield key, {"id": key, "image": image, "label": label}


def _checked(encoded: bytes, what: str) -> bytes:
    image = base.decode_rgb(encoded, what)
    if image.size != (_SIZE, _SIZE):
        raise ValueError(f"{what} must be {_SIZE}x{_SIZE}, got {image.width}x{image.height}")
    return encoded


def _damage(path: pathlib.Path) -> Any:
    # KeyError: a member is missing; ValueError: text that is not UTF-8, or lines without a tab.
    message = f"{path} is not the archive of Tiny-ImageNet, or is damaged"
    return base.report_damage(message, KeyError, ValueError)
