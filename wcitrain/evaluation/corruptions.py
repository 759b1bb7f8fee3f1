"""Common corruptions (Hendrycks & Dietterich, arXiv 1903.12261), read from the files their authors released.

Numbers on corrupted images are comparable on the same images only, so there are no corruptions of our own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wcitrain.data.decoding import Decoder, Source
from wcitrain.data.sets import ImageSet
from wcitrain.data.sources import ArraySource, scan_folder
from wcitrain.evaluation.victim import Victim

SEVERITIES = (1, 2, 3, 4, 5)
COMMON = (  # the benchmark's; its four extra ones, such as speckle_noise, are taken by name
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur"),
    *("zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate"),
    "jpeg_compression",
)
ADVICE = (
    "CIFAR-10-C and CIFAR-100-C are <name>.npy and labels.npy, ImageNet-C is <name>/<severity>/<class>/; "
    "their authors offer them under these names on zenodo.org."
)


@dataclass(frozen=True, eq=False)
class Corruptions:
    """Corrupted versions of M test images, as they were released below ``root``; ``find`` makes one.

    CIFAR-10-C and CIFAR-100-C are ``<name>.npy`` uint8 [5 M, H, W, 3], the test images in order at severities
    1 to 5, and ``labels.npy`` [5 M]. ImageNet-C is ``<name>/<severity>/<class>/<image>``, the files of each
    severity sorted by class, then name.
    """

    root: Path
    names: tuple[str, ...]
    places: Tensor | None = None  # [N], of the evaluated examples among the test images; None: the first N

    @classmethod
    def find(cls, root: str | Path, names: Sequence[str] | str = "all") -> "Corruptions":
        """Return the corruptions ``names`` below ``root``; ``"all"`` is ``COMMON``."""
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        if "all" in names and len(names) > 1:
            raise ValueError(f"corruptions: got {' '.join(names)}; expected all alone, or names.")
        names, root = COMMON if names == ("all",) else names, Path(root)
        arrays = {p.stem for p in root.glob("*.npy") if (root / "labels.npy").is_file()} - {"labels"}
        folders = {p.name for p in root.glob("*/") if all((p / str(s)).is_dir() for s in SEVERITIES)}
        there = ", ".join(sorted(arrays | folders)) or "nothing"
        if missing := [name for name in names if name not in arrays | folders]:
            rule = f"expected some of what {root} has whole: {there}"
            raise ValueError(f"corruptions: got {', '.join(missing)}; {rule}. {ADVICE}")
        return cls(root, names)

    def batches(self, name: str, severity: int, victim: Victim) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the corrupted versions of a victim's images, in [0, 1], and their labels."""
        source, x, y = self._open(name, severity), victim.x, victim.y
        places = torch.arange(len(y)) if self.places is None else self.places
        where = f"corruptions: got {name} of {len(source.labels)} images in {self.root}"
        if int(places.max()) >= len(source.labels) or not torch.equal(source.labels[places], y):
            rule = "expected the whole test set in order, with the labels of the images that are evaluated."
            raise ValueError(f"{where} with other labels; {rule} {ADVICE}")
        images = ImageSet.load(Decoder(source, first=int(places[0])), places)
        if (shape := images.decoder.shape) != x.shape[1:]:
            rule = f"expected {tuple(x.shape[1:])}, that of the images that are evaluated."
            raise ValueError(f"{where} of shape {shape}; {rule} Set data.image_size, or give other files.")
        for corrupted, labels, _ in images.batches(victim.batch_size, device=victim.device):
            yield corrupted, labels

    def _open(self, name: str, severity: int) -> Source:
        """Return the images of one corruption and severity."""
        if not (file := self.root / f"{name}.npy").is_file():
            return scan_folder(self.root / name / str(severity), key="corruptions")
        pixels, labels = np.load(file, mmap_mode="r"), np.load(self.root / "labels.npy")
        if pixels.dtype != np.uint8 or len(pixels) % len(SEVERITIES) or labels.shape != pixels.shape[:1]:
            got = f"{pixels.dtype} {pixels.shape} and labels {labels.shape}"
            rule = "expected uint8 [5 M, H, W, 3] and labels [5 M], five severities in order"
            raise ValueError(f"corruptions: got {got} in {file}; {rule}. {ADVICE}")
        part = slice((severity - 1) * len(pixels) // 5, severity * len(pixels) // 5)
        classes = tuple(map(str, range(int(labels.max()) + 1)))
        title = f"{name}, severity {severity},"
        return ArraySource(torch.from_numpy(labels[part]).long(), classes, pixels[part], title)
