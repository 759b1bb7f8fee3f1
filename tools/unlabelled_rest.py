"""Write the training images that a recipe does *not* use as an unlabelled ``.npz``, for its ``extra.path``.

    python tools/unlabelled_rest.py recipes/bases/cifar10_tiny.yaml data/extra/tiny.npz --images 6000

Settings ``key=value`` after the two files override the recipe's. The usual semi-supervised protocol: labels
of the rest are not written, and neither validation nor test images are among them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from wcitrain.data import ImageSet, load_splits
from wcitrain.recipe import load_recipe


def main() -> None:
    """Parse, choose, decode, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("output")
    parser.add_argument("--images", type=int, required=True, help="how many to write")
    parser.add_argument("settings", nargs="*", help="key=value overrides of the recipe")
    options = parser.parse_intermixed_args()
    splits = load_splits(load_recipe(options.recipe, options.settings).data)
    train, val = splits.train, splits.val
    are_sets = isinstance(train, ImageSet) and isinstance(val, ImageSet)
    if not are_sets or train.source is not val.source:
        parser.error("expected a recipe whose validation images are cut from its training images")
    is_free = torch.ones(len(train.source.labels), dtype=torch.bool)
    is_free[train.positions] = is_free[val.positions] = False
    positions = is_free.nonzero().flatten()
    if not 0 < options.images <= len(positions):
        parser.error(f"--images: got {options.images}; expected 1 to {len(positions)}, those that are left")
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    chosen = positions[order[: options.images]]
    images = ImageSet.load(train.source, chosen.sort().values, train.image_size, in_memory=True)
    assert images.pixels is not None
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.output, image=images.pixels.permute(0, 2, 3, 1).squeeze(3).numpy())
    print(f"{options.output}: {len(images)} images {tuple(images.pixels.shape[1:])}, without labels")


if __name__ == "__main__":
    main()
