"""Images in [0, 1]: sources by name, splits, and batches as a function of (seed, epoch, position) alone."""

from wcitrain.data.augment import Augmentation
from wcitrain.data.extra import PseudoLabels, load_extra, pseudo_label
from wcitrain.data.loader import Batch, ImageSet
from wcitrain.data.mixed import MixedSet
from wcitrain.data.mixing import Mixing
from wcitrain.data.noise import noisy_labels
from wcitrain.data.splits import SOURCES, Splits, load_splits
from wcitrain.data.stream import StreamSet

__all__ = [
    "SOURCES",
    "Augmentation",
    "Batch",
    "ImageSet",
    "MixedSet",
    "Mixing",
    "PseudoLabels",
    "Splits",
    "StreamSet",
    "load_extra",
    "load_splits",
    "noisy_labels",
    "pseudo_label",
]
