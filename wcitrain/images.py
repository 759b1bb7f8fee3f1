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


def open_training_set(
    recipe: Recipe, splits: Splits, device: torch.device, *, is_talking: bool = True
) -> ImageSet | StreamSet | MixedSet:
    """Return what training draws its batches from: the training images, with the recipe's extra ones among them.

    Raises:
        ValueError: The extra images do not fit, or streams that cannot be mixed; the recipe key is named.
    """
    extra = recipe.extra
    if isinstance(splits.train, StreamSet) and recipe.label_noise.share and not recipe.label_noise.resample:
        raise ValueError(
            "label_noise.resample: got false with images that are read front to back, which have no places of their own; expected "
            "true. Change it, or use another data source."
        )
    if extra.path is None:
        return splits.train
    if isinstance(splits.train, StreamSet):
        raise ValueError(
            f"extra.path: got {extra.path} with {recipe.data.name}, which is read front to back; expected null. Remove extra, "
            "or use another data source."
        )
    images = load_extra(
        extra.path,
        like=splits,
        labels=extra.labels,
        max_images=extra.max_images,
        seed=recipe.data.split_seed,
        image_size=recipe.data.image_size,
        in_memory=recipe.data.in_memory,
        num_workers=recipe.data.num_workers,
    )
    if extra.labeler is not None:
        labelled = pseudo_label(images, load_exported(extra.labeler).to(device), device=device)
        images = labelled.images
        if is_talking:
            print(
                f"pseudo-labels of {len(images)} extra images: mean confidence {labelled.mean_confidence:.2f}, "
                f"{labelled.counts.tolist()} images a class",
                flush=True,
            )
    return MixedSet(splits.train, images, extra.fraction)
