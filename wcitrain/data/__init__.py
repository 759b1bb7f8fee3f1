"""Images in [0, 1]: sources by name, splits, and batches that are a function of (seed, epoch, position) alone."""

from wcitrain.data.loader import Batch, ImageSet
from wcitrain.data.splits import SOURCES, Splits, load_splits
from wcitrain.data.stream import StreamSet

__all__ = ["SOURCES", "Batch", "ImageSet", "Splits", "StreamSet", "load_splits"]
