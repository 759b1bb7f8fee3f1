"""Networks for small images that timm does not have, registered with it.

They need torch and timm alone: an exported model carries this file as ``modeling.py``.
"""

from typing import Any, cast

import timm
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

default_cfgs = {  # mean and std are of CIFAR-10's 50,000 training images
    "preact_resnet18": {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2471, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
    },
    "resnet_cifar_stem": {"first_conv": "conv1", "classifier": "fc"},
}


def use_cifar_stem(backbone: ResNet) -> ResNet:
    """Keep small images at full resolution: one convolution 3x3 of stride 1, and no max pooling."""
    width = cast(nn.BatchNorm2d, backbone.bn1).num_features
    in_chans = next(m.in_channels for m in backbone.conv1.modules() if isinstance(m, nn.Conv2d))
    conv = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.add_module("conv1", conv)
    backbone.add_module("maxpool", nn.Identity())
    return backbone


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
    """PreActResNet-18 for 32x32 images; no weights are published."""
    if pretrained and not kwargs.get("pretrained_cfg"):  # which says where they are
        raise ValueError("preact_resnet18: got pretrained=True; expected False: no weights are published.")
    return build_model_with_cfg(PreActResNet, "preact_resnet18", pretrained, **kwargs)


@register_model
def resnet_cifar_stem(pretrained: bool = False, *, backbone: str = "resnet18", **kwargs: Any) -> ResNet:
    """A ResNet of timm's, by its name there, with ``use_cifar_stem``."""

    def build(**settings: Any) -> ResNet:
        return use_cifar_stem(cast(ResNet, timm.create_model(backbone, **settings)))

    return build_model_with_cfg(build, "resnet_cifar_stem", pretrained, **kwargs)
