"""The recipe's section ``data``: which images are read and how they are split."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from wcitrain.method import Count, PositiveCount, Text, method, refuse, setting, show


def _check_auto(value: Any) -> Any:
    """Refuse the 0 and 1 that would pass for truth values."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError("true, false or 'auto'. Choose one of them")
    return value


@method
class Data:
    """Which images are read and how they are split.

    ``digits`` are 1,797 gray 8x8 images that come with scikit-learn, 797 of them for testing; ``cifar10``,
    ``cifar100`` and ``svhn`` are torchvision's; ``folder`` reads ``root/<split>/<class>/<image>``; ``timm``
    opens ``name``, such as "hfds/<user>/<set>". Names that begin with wds/, tfds/ or hfids/ are read front to
    back (`StreamSet`).
    """

    source: Literal["digits", "cifar10", "cifar100", "svhn", "folder", "timm"] = setting(
        "digits", "Where images come from; digits needs no files."
    )
    root: Text | None = setting(None, "Folder with the data; every source but digits needs it.")
    name: Text | None = setting(None, "Data set name for timm.data.create_dataset; only with source timm.")
    train_split: Text = setting("train", "Name of the training split.")
    test_split: Text = setting("test", "Name of the test split.")
    val_split: Text | None = setting(None, "Name of a validation split; null cuts one from training images.")
    download: bool = setting(False, "Fetch the data set when it is not under root.")
    num_classes: PositiveCount | None = setting(None, "Number of classes; null takes it from the data.")
    image_size: PositiveCount | None = setting(None, "Side of the square images are resized to, in pixels.")
    max_train: PositiveCount | None = setting(None, "Training images kept, balanced over classes; null: all.")
    max_test: PositiveCount | None = setting(None, "Test images kept, balanced over classes; null: all.")
    val_size: PositiveCount = setting(200, "Validation images cut from the training images, in class shares.")
    split_seed: Count = setting(0, "Seed of the subsets and of the validation cut.")
    in_memory: Annotated[Literal[True, False, "auto"], BeforeValidator(_check_auto)] = setting(
        "auto", "Keep decoded images in memory; auto does so up to 2 GB."
    )
    crop_padding: Count = setting(0, "Zero padding before the random crop, in pixels; 0 does not crop.")
    flip: bool = setting(False, "Flip training images left to right at random.")
    num_workers: Count = setting(2, "Workers that decode images.")

    def __post_init__(self) -> None:
        source, names = self.source, (self.train_split, self.val_split, self.test_split)
        splits = [name for name in names if name is not None]
        if source == "digits" and (self.root or self.download):
            key = "root" if self.root else "download"
            text = f"got {show(getattr(self, key))} with source digits, which are embedded"
            refuse(key, f"{text}; expected the default. Remove it, or set data.source.")
        if source != "digits" and self.root is None and self._hub not in ("hfds", "hfids", "tfds"):
            refuse("root", f"got null with source {source}; expected a folder. Set data.root.")
        if source == "timm" and self.name is None:
            refuse("name", "got null with source timm; expected a data set name. Set data.name.")
        if source != "timm" and self.name is not None:
            text = f"got {show(self.name)} with source {source}; expected null."
            refuse("name", f"{text} Remove it, or set data.source to timm.")
        if len(set(splits)) < len(splits):
            refuse("test_split", f"got splits {', '.join(splits)}; expected different ones. Rename one.")
        if source not in ("folder", "timm") and splits != ["train", "test"]:
            text = f"got splits {', '.join(splits)}; expected none, as {source} has splits of its own."
            refuse("train_split", f"{text} Remove train_split, val_split and test_split.")
        if self.val_split is None and self.max_train is not None and self.val_size >= self.max_train:
            text = f"got {self.val_size}; expected fewer than max_train = {self.max_train}."
            refuse("val_size", f"{text} Lower it or keep more.")
        if self.is_streamed:
            text = f"with {self.name}, which is read front to back; expected"
            for key in ("val_split", "image_size", "num_classes"):
                if getattr(self, key) is None:
                    refuse(key, f"got null {text} a value. Set it.")
            for key, value in {"max_train": None, "max_test": None, "in_memory": "auto"}.items():
                if getattr(self, key) not in (value, False):
                    refuse(key, f"got {show(getattr(self, key))} {text} {show(value)}. Remove it.")

    @property
    def _hub(self) -> str:
        """How timm's name begins: what it is looked up with."""
        return (self.name or "").split("/")[0].lower() if self.source == "timm" else ""

    @property
    def is_streamed(self) -> bool:
        """Whether images can only be read front to back."""
        return self._hub in ("wds", "tfds", "hfids")
