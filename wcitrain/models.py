"""Backbones: any timm model, with its input normalisation inside, so that every attack lives in [0, 1].

Importing this module registers PreActResNet-18 in its CIFAR form with timm, as ``preact_resnet18``.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

from wcitrain.method import nearest
from wcitrain.preserve import kept_random_state, undisturbed


class Classifier(nn.Module):
    """A backbone behind its input normalisation: ``backbone((x − mean) / std)`` for images in [0, 1].

    Args:
        backbone: Maps normalised images [B, C, H, W] to logits [B, num_classes].
        mean, std: Per channel, in [0, 1] units; std > 0.
        rotation_head: Add a second head, four logits from the backbone's last features: the quarter turns of
            the image. The backbone needs timm's ``forward_features`` and ``forward_head``. Not exported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], *, rotation_head: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rotation_head = nn.Linear(_num_head_features(backbone), 4) if rotation_head else None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, head: Literal["classes", "rotation"] = "classes") -> Tensor:
        """Return logits [B, num_classes] for images [B, C, H, W] in [0, 1], or [B, 4] of the rotation head.

        Both heads are reached through ``forward``, so that DDP and ``torch.compile`` have one entry point.
        """
        x = (x - self.mean) / self.std
        if head == "classes":
            return self.backbone(x)
        if head != "rotation" or self.rotation_head is None:
            text = f"got head={head!r}, rotation_head={self.rotation_head}; expected 'classes', or 'rotation'"
            raise ValueError(f"Classifier: {text}. create_model(..., rotation_head=True) adds that head.")
        backbone = cast(Any, self.backbone)
        return self.rotation_head(backbone.forward_head(backbone.forward_features(x), pre_logits=True))


def create_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    stem: Literal["default", "cifar"] = "default",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rotation_head: bool = False,
    **kwargs: Any,
) -> Classifier:
    """Build a timm model (or ``preact_resnet18``) and put its normalisation inside.

    Args:
        name, pretrained, checkpoint_path, kwargs: For timm, e.g. ``layers=[1, 1, 1, 1]``.
        stem: ``"cifar"`` replaces a timm ResNet's stem by one 3x3 convolution of stride 1, without pooling.
        mean, std: Normalisation; by default of ``pretrained_cfg``, averaged if it has other channels.
        rotation_head: See ``Classifier``; for ``objectives.RotationAT``.

    Raises:
        ValueError: Unknown name (the nearest is named), a stem the model does not have, arguments timm
            refuses, a normalisation that does not fit ``in_chans``, or a second head without features.
    """
    known, is_remote = timm.list_models(), ":" in name or "/" in name  # hf-hub:...: timm finds out itself
    if not is_remote and name.partition(".")[0] not in known:
        near = nearest(name, known, cutoff=0.5)
        advice = f"Did you mean {near}?" if near else "timm.list_models() lists them."
        raise ValueError(f"model.name: got {name!r}; expected a timm model. {advice}")
    if stem not in ("default", "cifar"):
        raise ValueError(f"model.stem: got {stem!r}; expected 'default' or 'cifar'. Choose one of the two.")
    if stem == "cifar" and pretrained:
        warnings.warn("model.stem: cifar replaces the pretrained stem by a fresh convolution", stacklevel=2)
    try:
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
        backbone = timm.create_model(name, pretrained=pretrained, **sizes, **kwargs)
        if stem == "cifar":
            _use_cifar_stem(backbone, name, in_chans)
        if checkpoint_path:
            timm.models.load_checkpoint(backbone, checkpoint_path)
    except (TypeError, ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
        settings = f"pretrained={pretrained}, checkpoint_path={checkpoint_path!r}, kwargs={kwargs}"
        raise ValueError(f"model: timm could not build {name!r} with {settings}: {error}") from error
    config = getattr(backbone, "pretrained_cfg", None) or {}
    means = _channels("mean", mean, config, in_chans)
    deviations = _channels("std", std, config, in_chans)
    return Classifier(backbone, means, deviations, rotation_head=rotation_head)


def load_exported(folder: str | Path) -> Classifier:
    """Return the model exported under ``model/last`` or ``model/best``, normalisation and stem included.

    The weights alone also load with ``timm.create_model(..., checkpoint_path=".../model.safetensors")``,
    unless the stem is ``cifar``, which timm does not build.

    Raises:
        ValueError: Not a folder that a run exported.
    """
    folder = Path(folder)
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        keys = ("num_classes", "in_chans", "mean", "std", "kwargs")
        settings = {key: json.loads(metadata[key]) for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{folder}: got {error!r}; expected an export such as runs/NAME-s0/model/last."
        raise ValueError(text) from error
    settings |= settings.pop("kwargs") | {"stem": metadata["stem"]}
    weights = str(folder / "model.safetensors")
    return create_model(metadata["architecture"], checkpoint_path=weights, **settings).eval()


def try_forward(
    model: Classifier, in_chans: int, image_size: int | tuple[int, int], num_classes: int, smallest: int
) -> None:
    """Let one black image through, so that a model that does not fit is refused before anything is written.

    ``model`` is in float32 on the CPU; ``smallest`` counts the images of the smallest pass in train mode.

    Raises:
        ValueError: The model fails on images of that size, gives other than [1, num_classes], or has layers
            that cannot train on one image.
    """
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    image = torch.zeros(1, in_chans, *size)
    try:
        with torch.no_grad(), undisturbed(model, training=False):
            logits = model(image)
    except Exception as error:
        text = f"model.name: the model fails on images of {size[0]}x{size[1]} pixels: {error}"
        advice = "Set data.image_size, or the model's own size such as model.kwargs.img_size."
        raise ValueError(f"{text} {advice}") from error
    if logits.shape != (1, num_classes):
        raise ValueError(f"model: got outputs of shape {tuple(logits.shape)}; expected (1, {num_classes}).")
    if smallest == 1:
        try:
            with torch.no_grad(), undisturbed(model, training=True), kept_random_state(image.device):
                model(image)
        except ValueError as error:
            rule = "larger micro-batches, and evaluation.train_size above 1 with averaging"
            got = f"got passes over a single image, on which this model cannot train ({error})"
            raise ValueError(f"train.batch_size: {got}; expected {rule}. Raise it.") from error


def check_channels_last(model: nn.Module, device: torch.device) -> None:
    """Refuse channels-last storage where training would damage memory.

    On processors with AVX2 and without AVX-512, oneDNN's float32 gradient of the weights of a strided 1x1
    convolution writes past its workspace if there are fewer input channels than a register holds, 8
    (uxlfoundation/oneDNN#6035): wrong gradients, an endless loop or the end of the process. Other processors
    are refused too, so that a recipe means the same everywhere.
    """
    for name, layer in model.named_modules() if device.type == "cpu" else ():
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.stride == (1, 1):
            continue
        if layer.kernel_size == (1, 1) and 1 < layer.in_channels < 8:  # one channel has one layout
            kind = f"a 1x1 convolution with stride {layer.stride} and {layer.in_channels} input channels"
            rule = "at least 8 of them, as its gradient would overwrite other memory. Set it to false."
            raise ValueError(f"train.channels_last: got true on a CPU with {name}, {kind}; expected {rule}")


def _num_head_features(backbone: nn.Module) -> int:
    """Return how many features ``forward_head(..., pre_logits=True)`` returns."""
    if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
        rule = "a model with timm's forward_features and forward_head. Choose another."
        raise ValueError(f"model.rotation_head: got a {type(backbone).__name__}; expected {rule}")
    return int(getattr(backbone, "head_hidden_size", None) or cast(int, backbone.num_features))


def _channels(key: str, given: Sequence[float] | None, config: dict[str, Any], in_chans: int) -> list[float]:
    """Return a constant for each channel: as given, or timm's, averaged where it has other channels."""
    values: Sequence[float] = config.get(key, (0.5,)) if given is None else given
    if len(values) != in_chans:
        if given is not None and len(values) != 1:
            rule = f"{in_chans}, one a channel, or a single one."
            raise ValueError(f"model.{key}: got {len(values)} values; expected {rule}")
        values = [sum(values) / len(values)] * in_chans
    if key == "std" and min(values) <= 0:
        raise ValueError(f"model.std: got {list(values)}; expected positive numbers. They divide the image.")
    return list(values)


def _use_cifar_stem(backbone: nn.Module, name: str, in_chans: int) -> None:
    """Keep small images at full resolution: conv 3x3, stride 1, and no max pooling."""
    if not isinstance(backbone, ResNet):
        advice = "Use stem 'default', or kwargs of that model such as patch_size for transformers."
        raise ValueError(f"model.stem: got 'cifar' with {name!r}; expected a timm ResNet. {advice}")
    width = cast(nn.BatchNorm2d, backbone.bn1).num_features
    conv = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.add_module("conv1", conv)
    backbone.add_module("maxpool", nn.Identity())


class _PreActBlock(nn.Module):
    """Identity-mapping residual block: BN, ReLU, conv, BN, ReLU, conv; shortcut from the first ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        needs_projection = stride != 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if needs_projection else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation residual network for small images (He et al., arXiv 1603.05027).

    The CIFAR form that robust training uses: a 3x3 stem, four stages of two blocks each (strides 1, 2, 2, 2),
    a last BN-ReLU, global average pooling, linear head. ``width``: channels of the first stage, doubled at
    each later one; 64 is PreActResNet-18, 11.2 M parameters.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        stages, width_in = [], width
        for out, stride in zip(widths, (1, 2, 2, 2), strict=True):
            stages.append(nn.Sequential(_PreActBlock(width_in, out, stride), _PreActBlock(out, out, 1)))
            width_in = out
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the head, as timm's models do."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for normalised images [B, in_chans, H, W] of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature maps [B, num_features, H/8, W/8]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return F.relu(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for feature maps; with ``pre_logits``, as timm's, averages [B, num_features]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18 for 32x32 images, ``timm.create_model("preact_resnet18")``; no pretrained weights."""
    if pretrained:
        raise ValueError("preact_resnet18: got pretrained=True; expected False: no weights are published.")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's, of pretrained weights
        kwargs.pop(key, None)
    model = PreActResNet(**kwargs)
    config = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD, "input_size": (3, 32, 32)}
    model.pretrained_cfg = config  # type: ignore[assignment]
    return model


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
