"""What is looked at before training: can files be read, are copies between splits, which images are these."""

import filecmp
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from wcitrain.data.pixels import ArraySource, opened_image
from wcitrain.data.sets import Images, ImageSet
from wcitrain.data.splits import Splits
from wcitrain.digest import digest
from wcitrain.text import name_some

ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b";"}  # the last bytes of a whole file
PART = 4096  # bytes of a file's beginning and end


def parts_of(splits: Splits, extra: ImageSet | None = None) -> dict[str, Images]:
    """Return the images of a run by their name; those of the test split are not decoded."""
    parts = {split: splits.part(split) for split in ("train", "val", "test")}
    return parts if extra is None else parts | {"extra": extra}


def identity(images: Images) -> str:
    """Return a text that tells which images these are: their number, and a digest of names and classes.

    Whatever their order. Names count from the folder they share, so that data may be moved; in arrays pixels
    stand in for them, and inside tables the places.
    """
    if not isinstance(images, ImageSet):
        return f"{len(images)} images, read front to back"
    source, rows = images.source, images.positions.tolist()
    names: list[object] = rows
    if isinstance(source, ArraySource):
        names = [digest([source.pixels[row].tobytes()]) for row in rows]
    elif not isinstance(source.place, str):
        inside = len(os.path.commonpath(source.place)) if len(source.place) > 1 else 0
        names = [source.place[row][inside:] for row in rows]
    labels = source.labels[images.positions].tolist()  # -1: without a label
    classes = [source.class_names[label] if label >= 0 else "" for label in labels]
    return f"{len(rows)} images, digest {digest(sorted(zip(map(str, names), classes, strict=True)))}"


def record(parts: Mapping[str, Images], class_names: Sequence[str]) -> dict[str, Any]:
    """Return what a run keeps of its data: class names, and for each part which images, at which places."""
    sets = {name: images for name, images in parts.items() if isinstance(images, ImageSet)}
    places = {name: f"in order {digest([images.positions])}" for name, images in sets.items()}
    images = {name: identity(images) for name, images in parts.items()}
    return {"class_names": list(class_names), "images": images, "places": places}


def check_images(parts: Mapping[str, Images], *, decode: bool = False) -> list[str]:
    """Open every image file once and return what there is to say of exact copies, a line for two splits.

    A file's header, size and end are read, and it is decoded where its end looks cut. ``decode`` decodes all
    images, those in archives, tables and streams too. Copies are of files, byte for byte, or of arrays.

    Raises:
        ValueError: The first image that cannot be read or has another size, by name.
    """
    known: dict[object, dict[str, str]] = {}  # split and place of the first image with a content
    lines = []
    for name, images in parts.items():
        if not isinstance(images, ImageSet):
            for _ in images.batches(100) if decode else ():
                pass  # an error while reading names it
            continue
        copies: dict[str, list[str]] = {}
        with ThreadPoolExecutor(max(1, images.num_workers)) as pool:
            contents = pool.map(partial(_content, images, decode), range(len(images)))
            for position, content in zip(images.positions.tolist(), contents, strict=True):
                if content is None:
                    continue
                where = images.source.locate(position)
                others = known.setdefault(content, {})
                for other, place in others.items():
                    is_file = os.path.isfile(where) and os.path.isfile(place)
                    if other != name and (not is_file or filecmp.cmp(where, place, shallow=False)):
                        copies.setdefault(other, []).append(f"{where} = {place}")
                others.setdefault(name, where)
        for other, pairs in copies.items():
            text = f"{len(pairs)} of {len(images)} {name} images are exact copies of {other} images"
            lines.append(f"{text}: {name_some(pairs, 3)}")
    return lines


def _content(images: ImageSet, decode: bool, row: int) -> object:
    """Look at one image; return what is equal for copies, None where that is not known cheaply."""
    source, position = images.source, int(images.positions[row])
    if decode and images.pixels is None:
        images[row]
    if isinstance(source, ArraySource):
        return digest([source.pixels[position].tobytes()])
    path = source.file(position)
    if path is None:
        return None
    with opened_image(path, path) as image, open(path, "rb") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(PART)
        file.seek(max(0, size - PART))
        tail = file.read()
        if images.image_size is None:
            images.refuse_shape((images.shape[0], image.height, image.width), position)
        if images.pixels is None and not tail.endswith(ENDS.get(str(image.format), b"no such end")):
            image.load()
    return size, digest([head, tail])
