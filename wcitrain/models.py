"""Backbones: any timm model, with its input normalisation inside, so that every attack lives in [0, 1].

Importing this module registers PreActResNet-18 in its CIFAR form with timm, as ``preact_resnet18``.
"""

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

from wcitrain.params import logits_of
from wcitrain.preserve import kept_random_state, undisturbed
from wcitrain.weights import in_order, load_into, read_weights

HUB_SECONDS = 3  # for an answer


class Classifier(nn.Module):
    """A backbone behind its input normalisation: ``backbone((x − mean) / std)`` for images in [0, 1].

    Args:
        backbone: Maps normalised images [B, C, H, W] to logits [B, num_classes].
        mean, std: Per channel, in [0, 1] units; std > 0.
        rotation_head: Add a second head, four logits from the backbone's last features, which needs timm's
            ``forward_features`` and ``forward_head``: the quarter turns of the image. Not exported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], *, rotation_head: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        width: Any = getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", 0)
        self.rotation_head = nn.Linear(width, 4) if rotation_head else None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, head: Literal["classes", "rotation"] = "classes") -> Tensor:
        """Return logits [B, num_classes] for images [B, C, H, W] in [0, 1], or [B, 4] of the rotation head.

        Both heads are reached through ``forward``, so that DDP and ``torch.compile`` have one entry point.
        ValueError for the rotation head of a model without one.
        """
        x = (x - self.mean) / self.std
        if head == "classes":
            return self.backbone(x)
        if self.rotation_head is None:
            rule = "'classes' without a second head. create_model(..., rotation_head=True) adds one."
            raise ValueError(f"Classifier: got head={head!r}; expected {rule}")
        backbone = cast(Any, self.backbone)
        return self.rotation_head(backbone.forward_head(backbone.forward_features(x), pre_logits=True))


def create_model(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    match: Literal["name", "order"] = "name",
    stem: Literal["default", "cifar"] = "default",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rotation_head: bool = False,
    **kwargs: Any,
) -> Classifier:
    """Build a timm model (or ``preact_resnet18``) and put its normalisation inside.

    Args:
        name, pretrained, kwargs: For timm, e.g. ``layers=[1, 1, 1, 1]``.
        checkpoint_path, match: Weights that fit as they are, see ``read_weights`` and ``in_order``.
        stem: ``"cifar"`` replaces a timm ResNet's stem by one 3x3 convolution of stride 1, without pooling.
        mean, std, rotation_head: See ``Classifier``; by default timm's, averaged if it has other channels.

    Raises:
        ValueError: A name or arguments that timm refuses, a stem the model does not have, or a normalisation
            that does not fit ``in_chans``.
    """
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    try:
        with _hub_or_cache() if pretrained else nullcontext():
            backbone = timm.create_model(name, pretrained=pretrained, **sizes, **kwargs)
        if stem == "cifar":
            _use_cifar_stem(backbone, name, in_chans)
        elif stem != "default":
            raise ValueError(f"model.stem: got {stem!r}; expected default or cifar. Choose one of them.")
        if checkpoint_path and checkpoint_path.endswith(".npz"):  # of JAX: the model's own names are others
            timm.models.load_checkpoint(backbone, checkpoint_path)
    except (TypeError, ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
        settings = f"pretrained={pretrained}, checkpoint_path={checkpoint_path!r}, kwargs={kwargs}"
        local = "a file of weights (--checkpoint FILE, model.checkpoint_path) or local-dir:FOLDER of timm's"
        advice = f". Where no hub answers, give {local}." if pretrained else ""
        text = f"could not build {name!r} with {settings}: {str(error).rstrip('. ')}{advice}"
        raise ValueError(f"model: timm {text}") from error
    config = getattr(backbone, "pretrained_cfg", None) or {}
    given = {"mean": mean, "std": std}
    constants = [by_channel(key, given[key], config.get(key, (0.5,)), in_chans) for key in given]
    model = Classifier(backbone, *constants, rotation_head=rotation_head)
    if checkpoint_path and not checkpoint_path.endswith(".npz"):
        weights = read_weights(checkpoint_path)
        weights = in_order(backbone, weights, checkpoint_path) if match == "order" else weights
        load_weights(model, weights, checkpoint_path)
    return model


@contextmanager
def _hub_or_cache() -> Iterator[None]:
    """Leave only the cache where the hub, or the proxy before it, does not answer: retries take a minute."""
    from huggingface_hub import constants

    url = urlsplit(getproxies().get("https") or constants.ENDPOINT)
    kept = constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = kept


def by_channel(
    key: str, given: Sequence[float] | None, default: Sequence[float], in_chans: int
) -> list[float]:
    """Return a constant for each channel: as given, or the default, averaged where it has other channels."""
    values = default if given is None else given
    if given is not None and len(values) not in (1, in_chans):
        rule = f"{in_chans}, one a channel, or a single one."
        raise ValueError(f"model.{key}: got {len(values)} values; expected {rule}")
    if key == "std" and min(values) <= 0:
        raise ValueError(f"model.std: got {list(values)}; expected positive numbers. They divide the image.")
    return list(values) if len(values) == in_chans else [sum(values) / len(values)] * in_chans


def _use_cifar_stem(backbone: nn.Module, name: str, in_chans: int) -> None:
    """Keep small images at full resolution: conv 3x3, stride 1, and no max pooling."""
    if not isinstance(backbone, ResNet):
        raise ValueError(f"model.stem: got 'cifar' with {name!r}; expected a timm ResNet. Set it to default.")
    width = cast(nn.BatchNorm2d, backbone.bn1).num_features
    conv = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.add_module("conv1", conv)
    backbone.add_module("maxpool", nn.Identity())


def load_exported(folder: str | Path) -> Classifier:
    """Return the model exported under ``model/last`` or ``model/best``; ValueError for another folder."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        keys = ("num_classes", "in_chans", "mean", "std", "kwargs")
        settings = {key: json.loads(metadata[key]) for key in keys}
        settings |= settings.pop("kwargs") | {"stem": metadata["stem"], "name": metadata["architecture"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = "an export such as runs/NAME-s0/model/last."
        raise ValueError(f"{folder}: got {error!r}; expected {rule}") from error
    with kept_random_state(torch.device("cpu")):  # initial weights are drawn, and replaced
        return create_model(checkpoint_path=str(folder / "model.safetensors"), **settings).eval()


def load_weights(model: Classifier, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights of the classifier or its backbone, and refuse any that do not fit, normalisation too."""
    is_whole = model.rotation_head is not None and any("rotation_head." in name for name in weights)
    constants = {"mean": model.mean, "std": model.std}
    load_into(model if is_whole else model.backbone, weights, source, constants)


def try_forward(model: Classifier, in_chans: int, image_size: int | tuple[int, int]) -> None:
    """Let a black image through on the CPU: a model that does not fit is refused before files are written."""
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    try:
        with torch.no_grad(), undisturbed(model, training=False):
            logits_of(model(torch.zeros(1, in_chans, height, width)))
    except Exception as error:
        advice = "Set data.image_size, or the model's own size such as model.kwargs.img_size."
        text = f"model.name: the model fails on images of {height}x{width} pixels: {error}"
        raise ValueError(f"{text} {advice}") from error


class _PreActBlock(nn.Module):
    """Identity-mapping residual block: BN, ReLU, conv, BN, ReLU, conv; shortcut from the first ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        is_same = stride == 1 and width_in == width
        self.shortcut = None if is_same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet(nn.Module):
    """Pre-activation residual network for small images (He et al., arXiv 1603.05027).

    The CIFAR form that robust training uses: a 3x3 stem, four stages of two blocks each (strides 1, 2, 2, 2),
    a last BN-ReLU, global average pooling, linear head. ``width``: channels of the first stage, doubled at
    each later one; 64 is PreActResNet-18, 11.2 M parameters. Heads as timm's models have them.
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
        """Return the head."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes] for normalised images [B, in_chans, H, W] of any size."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature maps [B, num_features, H/8, W/8]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return F.relu(self.bn(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for feature maps; with ``pre_logits``, their averages [B, num_features]."""
        return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18 for 32x32 images, ``timm.create_model("preact_resnet18")``; no pretrained weights."""
    if pretrained:
        raise ValueError("preact_resnet18: got pretrained=True; expected False: no weights are published.")
    of_weights = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # that timm adds
    model = PreActResNet(**{key: value for key, value in kwargs.items() if key not in of_weights})
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # of CIFAR-10's 50,000 training images
    model.pretrained_cfg = {"mean": mean, "std": std, "input_size": (3, 32, 32)}  # type: ignore[assignment]
    return model
