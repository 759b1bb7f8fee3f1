"""From a checked recipe to its images: the splits, and what training draws from beside them."""

import torch

from wcitrain.data import ImageSet, MixedSet, Splits, StreamSet, load_extra, load_splits, pseudo_label
from wcitrain.models import load_exported
from wcitrain.recipe import Recipe


def open_splits(recipe: Recipe) -> Splits:
    """Return training, validation and test images.

    Raises:
        ValueError: A setting does not fit the data; the recipe key is named.
    """
    return load_splits(**recipe.data.model_dump(exclude={"crop_padding", "flip"}))


def images_of(splits: Splits, split: str) -> ImageSet | StreamSet:
    """Return the images of ``"train"``, ``"val"`` or ``"test"``; test images are not opened before.

    Raises:
        ValueError: Another name.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split: got {split!r}; expected train, val or test. Choose one of them.")
    return getattr(splits, split)


def open_training_set(
    recipe: Recipe, splits: Splits, device: torch.device, *, is_talking: bool = True
) -> ImageSet | StreamSet | MixedSet:
    """Return what training draws its batches from: training images, the recipe's extra ones among them.

    Raises:
        ValueError: The extra images do not fit, or streams that cannot be mixed; the recipe key is named.
    """
    train, extra, noise = splits.train, recipe.extra, recipe.label_noise
    size = splits.image_size
    recipe.augment.check((splits.in_chans, *(size if isinstance(size, tuple) else (size, size))))
    if isinstance(train, StreamSet) and noise.share and not noise.resample:
        text = "got false with images that are read front to back and have no places; expected true."
        raise ValueError(f"label_noise.resample: {text} Change it, or use another data source.")
    if extra.path is None:
        return train
    if isinstance(train, StreamSet):
        text = f"got {extra.path} with {recipe.data.name}, which is read front to back; expected null."
        raise ValueError(f"extra.path: {text} Remove extra, or use another data source.")
    images = load_extra(
        extra.path,
        like=splits,
        labels=extra.labels,
        max_images=extra.max_images,
        seed=recipe.data.split_seed,
        **recipe.data.model_dump(include={"image_size", "in_memory", "num_workers"}),
    )
    if extra.labeler is not None:
        labelled = pseudo_label(images, load_exported(extra.labeler).to(device), device=device)
        images = labelled.images
        if is_talking:
            text = f"{len(images)} extra images: mean confidence {labelled.mean_confidence:.2f}"
            print(f"pseudo-labels of {text}, {labelled.counts.tolist()} images a class", flush=True)
    return MixedSet(train, images, extra.fraction)
