"""Images in [0, 1]: sources by name, splits, and batches as a function of (seed, epoch, position) alone."""

from wcitrain.data.augment import Augmentation, LabelNoise, Mixing
from wcitrain.data.checking import check_images, identity, parts_of, record
from wcitrain.data.extra import Extra, MixedSet, load_extra, pseudo_label
from wcitrain.data.sets import Batch, Images, ImageSet, Pairs, Reading
from wcitrain.data.sources import Data
from wcitrain.data.splits import Splits, load_splits, match_classes
from wcitrain.data.stream import StreamSet
