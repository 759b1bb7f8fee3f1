"""Common corruptions (Hendrycks & Dietterich, arXiv 1903.12261), read from the files their authors released.

Numbers on corrupted images are comparable on the same images only, so there are no corruptions of our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wcitrain.data.folders import scan_folder
from wcitrain.data.pixels import ArraySource, Source
from wcitrain.data.sets import ImageSet
from wcitrain.evaluation.attacking import Victim, is_right
from wcitrain.seeding import seed_from

SEVERITIES = (1, 2, 3, 4, 5)
COMMON = (  # the benchmark's; its four extra ones, such as speckle_noise, are taken by name
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur"),
    *("zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate"),
    "jpeg_compression",
)
ADVICE = "CIFAR-10-C is <name>.npy and labels.npy, ImageNet-C <name>/<severity>/<class>/, both on zenodo.org."


@dataclass(frozen=True, eq=False)
class Corruptions:
    """Corrupted versions of M test images, as they were released below ``root``; ``find`` makes one.

    CIFAR-10-C and CIFAR-100-C are ``<name>.npy`` uint8 [5 M, H, W, 3], the test images in order at severities
    1 to 5, and ``labels.npy`` [5 M]. ImageNet-C is ``<name>/<severity>/<class>/<image>``, sorted.
    """

    root: Path
    names: tuple[str, ...]
    places: Tensor | None = None  # [N], of the evaluated examples among the test images; None: the first N
    classes: tuple[str, ...] | None = None  # number the folders of classes; None: sorted

    @classmethod
    def find(cls, root: str | Path, names: Sequence[str] | str = "all") -> "Corruptions":
        """Return the corruptions ``names`` below ``root``; ``"all"`` is ``COMMON``.

        ValueError for one that is not there with all its severities.
        """
        names, root = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names)), Path(root)
        names = COMMON if names == ("all",) else names
        arrays = {p.stem for p in root.glob("*.npy") if (root / "labels.npy").is_file()} - {"labels"}
        folders = {p.name for p in root.glob("*/") if all((p / str(s)).is_dir() for s in SEVERITIES)}
        if missing := [name for name in names if name not in arrays | folders]:
            there = ", ".join(sorted(arrays | folders)) or "nothing"
            rule = f"expected all alone, or some of what {root} has whole: {there}"
            raise ValueError(f"corruptions: got {', '.join(missing)}; {rule}. {ADVICE}")
        return cls(root, names)

    @torch.no_grad()
    def evaluate(self, victim: Victim) -> dict[tuple[str, int], Tensor]:
        """Return truth values [N] of a victim's images by corruption and severity.

        ValueError for files of other images: another number, other labels, or another shape.
        """
        places = torch.arange(len(victim.y)) if self.places is None else self.places
        result, shape = {}, victim.x.shape[1:]
        for name, severity in tqdm(list(product(self.names, SEVERITIES)), desc="corruptions", disable=None):
            source = self._open(name, severity)
            where = f"corruptions: got {name} of {len(source.labels)} images in {self.root}"
            if int(places.max()) >= len(source.labels) or not torch.equal(source.labels[places], victim.y):
                rule = "expected the whole test set in order, with the evaluated images' labels."
                raise ValueError(f"{where} with other labels; {rule} {ADVICE}")
            images = ImageSet.load(source, places, channels=shape[0])
            if images.shape != shape:
                rule = f"expected {tuple(shape)}, that of the images that are evaluated."
                raise ValueError(f"{where} of shape {images.shape}; {rule} Give other files.")
            torch.manual_seed(seed_from(victim.seed, "corruption", name, severity))  # a randomised model
            batches = images.batches(victim.batch_size, device=victim.device)
            result[name, severity] = torch.cat([is_right(victim.model(x), y).cpu() for x, y, _ in batches])
        return result

    def _open(self, name: str, severity: int) -> Source:
        """Return the images of one corruption and severity."""
        if not (file := self.root / f"{name}.npy").is_file():
            return scan_folder(self.root / name / str(severity), self.classes, "corruptions")
        pixels, labels = np.load(file, mmap_mode="r"), np.load(self.root / "labels.npy")
        if pixels.dtype != np.uint8 or len(pixels) % len(SEVERITIES) or labels.shape != pixels.shape[:1]:
            got = f"{pixels.dtype} {pixels.shape} and labels {labels.shape}"
            rule = "expected uint8 [5 M, H, W, 3] and labels [5 M], five severities in order"
            raise ValueError(f"corruptions: got {got} in {file}; {rule}. {ADVICE}")
        part = slice((severity - 1) * len(pixels) // 5, severity * len(pixels) // 5)
        classes, title = tuple(map(str, range(int(labels.max()) + 1))), f"{name}, severity {severity},"
        return ArraySource(torch.from_numpy(labels[part]).long(), classes, title, np.array(pixels[part]))
