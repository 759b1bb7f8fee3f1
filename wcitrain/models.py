"""Backbones: any timm model, with its input normalisation inside, so that every attack lives in [0, 1].

Importing this module registers the networks of ``architectures`` with timm, such as ``preact_resnet18``.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from wcitrain.architectures import use_cifar_stem
from wcitrain.method import nearest
from wcitrain.params import logits_of
from wcitrain.preserve import kept_random_state, undisturbed
from wcitrain.weights import LOCAL, hub_or_cache, load_into, read_weights


class Classifier(nn.Module):
    """A backbone behind its input normalisation: ``backbone(R (x − mean) / std)`` for images in [0, 1].

    R enlarges images where ``resize_inside`` asks for it; attacks stay in their own pixels. Its weights sum
    to one, so that R ((x − m) / s) = (R x − m) / s. Bicubic ones overshoot at edges: values outside of the
    box are not clamped, which would hide gradients there.

    Args:
        backbone: Maps normalised images [B, C, H, W] to logits [B, num_classes].
        mean, std: Per channel, in [0, 1] units; std > 0.
        resize_inside: Side of the squares that images are enlarged to; None: they stay as they are.
        rotation_head: Add a second head, four logits from the backbone's last features, which needs timm's
            ``forward_features`` and ``forward_head``: the quarter turns of the image. Not exported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        rotation_head: bool = False,
        resize_inside: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.resize_inside = backbone, resize_inside
        width: Any = getattr(backbone, "head_hidden_size", None) or getattr(backbone, "num_features", 0)
        self.rotation_head = nn.Linear(width, 4) if rotation_head else None
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, head: Literal["classes", "rotation"] = "classes") -> Tensor:
        """Return logits [B, num_classes] for images [B, C, H, W] in [0, 1], or [B, 4] of the rotation head.

        Both heads are reached through ``forward``, so that DDP and ``torch.compile`` have one entry point.
        ValueError for the rotation head of a model without one, and for images that R would not enlarge.
        """
        x = (x - self.mean) / self.std
        if self.resize_inside is not None:
            x = enlarged(x, self.resize_inside)
        if head == "classes":
            return self.backbone(x)
        if self.rotation_head is None:
            rule = "'classes' without a second head. create_model(..., rotation_head=True) adds one."
            raise ValueError(f"Classifier: got head={head!r}; expected {rule}")
        backbone = cast(Any, self.backbone)
        return self.rotation_head(backbone.forward_head(backbone.forward_features(x), pre_logits=True))


def enlarged(x: Tensor, side: int) -> Tensor:
    """Return images [B, C, H, W] as [B, C, side, side], A x Bᵀ with torch's bicubic weights (Keys, a = −¾).

    By products, as the backward pass of ``F.interpolate`` is not deterministic on CUDA; under autocast in
    the dtype of the images. ValueError unless both sides grow.
    """
    height, width = x.shape[-2:]
    if max(height, width) >= side:
        got = f"got {side} for images of {height}x{width} pixels"
        raise ValueError(f"model.resize_inside: {got}; expected more than their sides. Raise or remove it.")
    ones = (torch.eye(n, device=x.device, dtype=x.dtype)[None] for n in (height, width))  # [1, n, n]
    rows, columns = (F.interpolate(one[None], (side, one.shape[-1]), mode="bicubic")[0, 0] for one in ones)
    with torch.autocast(x.device.type, enabled=False):
        return rows @ x @ columns.T


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
    resize_inside: int | None = None,
    **kwargs: Any,
) -> Classifier:
    """Build a timm model (or ``preact_resnet18``) and put its normalisation inside.

    Args:
        name, pretrained, kwargs: For timm, e.g. ``layers=[1, 1, 1, 1]``.
        checkpoint_path: Weights that fit as they are, see ``read_weights``.
        stem: ``"cifar"`` replaces a timm ResNet's stem by one 3x3 convolution of stride 1, without pooling.
        mean, std: By default timm's, averaged if it has other channels; see ``Classifier``, as for the rest.

    Raises:
        ValueError: A name or arguments that timm refuses, a stem the model does not have, or a normalisation
            that does not fit ``in_chans``.
    """
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    try:
        with hub_or_cache() if pretrained or name.startswith(("hf-hub:", "hf_hub:")) else nullcontext():
            backbone = timm.create_model(name, pretrained=pretrained, **sizes, **kwargs)
        if stem == "cifar":
            if not isinstance(backbone, ResNet):
                rule = "a timm ResNet. Set it to default."
                raise ValueError(f"model.stem: got 'cifar' with {name!r}; expected {rule}")
            use_cifar_stem(backbone)
        elif stem != "default":
            raise ValueError(f"model.stem: got {stem!r}; expected default or cifar. Choose one of them.")
        if checkpoint_path and checkpoint_path.endswith(".npz"):  # of JAX: the model's own names are others
            timm.models.load_checkpoint(backbone, checkpoint_path)
    except (TypeError, ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
        settings = f"pretrained={pretrained}, checkpoint_path={checkpoint_path!r}, kwargs={kwargs}"
        near = None if "pretrained tag" not in str(error) and timm.is_model(name) else _nearest_name(name)
        advice = f". Did you mean {near}?" if near else f". {LOCAL}." if pretrained else ""
        text = f"could not build {name!r} with {settings}: {str(error).rstrip('. ')}{advice}"
        raise ValueError(f"model: timm {text}") from error
    config = getattr(backbone, "pretrained_cfg", None) or {}
    given = {"mean": mean, "std": std}
    constants = [by_channel(key, given[key], config.get(key, (0.5,)), in_chans) for key in given]
    model = Classifier(backbone, *constants, rotation_head=rotation_head, resize_inside=resize_inside)
    if checkpoint_path and not checkpoint_path.endswith(".npz"):
        load_weights(model, read_weights(checkpoint_path), checkpoint_path)
    return model


def _nearest_name(name: str) -> str | None:
    """Return the name closest to one that timm does not know, of its models or of their weights."""
    if ":" in name:
        return None
    is_tagged = "." in name and timm.is_model(name.partition(".")[0])
    known = timm.list_pretrained(f"{name.partition('.')[0]}.*") if is_tagged else timm.list_models()
    return nearest(name, known, 0.3 if is_tagged else 0.6)


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


def load_exported(folder: str | Path) -> Classifier:
    """Return the model exported under ``model/last`` or ``model/best``; ValueError for another folder."""
    folder = Path(folder)
    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        keys = ("num_classes", "in_chans", "mean", "std", "kwargs")
        settings = {key: json.loads(metadata[key]) for key in keys}
        settings |= settings.pop("kwargs") | {"stem": metadata["stem"], "name": metadata["architecture"]}
        settings["resize_inside"] = json.loads(metadata.get("resize_inside", "null"))
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


def try_forward(model: Classifier, in_chans: int, image_size: tuple[int, int]) -> None:
    """Let a black image through on the CPU: a model that does not fit is refused before files are written."""
    height, width = image_size
    try:
        with torch.no_grad(), undisturbed(model, training=False):
            logits_of(model(torch.zeros(1, in_chans, height, width)))
    except Exception as error:
        advice = "Set data.image_size or model.resize_inside, or the model's own, e.g. model.kwargs.img_size."
        text = f"model.name: the model fails on images of {height}x{width} pixels: {error}"
        raise ValueError(f"{text} {advice}") from error


def checkpoint_activations(model: Classifier, name: str) -> None:
    """Let timm's model recompute activations in the backward pass instead of keeping them.

    Losses and gradients, also second ones, are those without: draws are replayed, buffers (BatchNorm) count
    a pass once, and attention is unfused, as it has to be where a penalty differentiates twice.
    ValueError for a model that cannot, and for reentrant checkpoints, which hide gradients.
    """
    backbone = cast(Any, model.backbone)
    try:
        assert not timm.layers.use_reentrant_ckpt()
        backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError, NotImplementedError) as error:
        rule = "a model that has it, and timm 1.0.14 or newer without TIMM_REENTRANT_CKPT. Set it to false."
        raise ValueError(f"train.gradient_checkpointing: got true with {name}; expected {rule}") from error
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if module._buffers:
            module.register_forward_pre_hook(_set_buffers_aside)
            module.register_forward_hook(_put_buffers_back, always_call=True)  # a recomputation may end early


def _set_buffers_aside(module: nn.Module, _: object) -> None:
    """Give a module that a backward pass recomputes copies of its buffers to write into."""
    if torch._C._current_graph_task_id() >= 0:  # -1 outside of backward passes
        own = vars(module)["own_buffers"] = dict(module._buffers)
        module._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})


def _put_buffers_back(module: nn.Module, *_: object) -> None:
    module._buffers.update(vars(module).pop("own_buffers", {}))
