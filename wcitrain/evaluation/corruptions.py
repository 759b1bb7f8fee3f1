"""Common corruptions of images in [0, 1], in five severities (Hendrycks & Dietterich, arXiv 1903.12261).

Legend: B images x [B, C, H, W], s severity 1..5, c constants of a severity, u random numbers of an example.

The constants are those of CIFAR-10-C, made for images of 32 by 32 pixels; on larger images they are mild. The
images are *not* the released CIFAR-10-C files: these functions compute in float without rounding to 8 bits
(JPEG alone rounds), draw other random numbers, and filter with torch (OpenCV, scikit-image, ImageMagick and
Pillow there), so compare with published numbers on the released files only. Glass blur, elastic transform,
snow, frost and spatter are left out; ``gaussian_blur`` and ``saturate`` are two of the authors' extra ones.

Random numbers are functions of (seed, corruption, place of the example), not of severity or batch: severities
differ by their constants alone (except shot noise, whose counts are drawn anew).
"""

import math
from collections.abc import Callable, Sequence
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from wcitrain.seeding import generator_from

SEVERITIES = (1, 2, 3, 4, 5)

# One call per example, stacked [B, ...] on the images' device.
Draw = Callable[[Callable[[torch.Generator], Tensor]], Tensor]


def gaussian_noise(x: Tensor, s: int, draw: Draw) -> Tensor:
    """x + c N(0, I)."""
    c = (0.04, 0.06, 0.08, 0.09, 0.10)[s - 1]
    return x + c * draw(lambda g: torch.randn(x.shape[1:], generator=g))


def shot_noise(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Poisson(c x) / c: counts of photons."""
    c = (500, 250, 100, 75, 50)[s - 1]
    images = iter((x * c).cpu())
    return draw(lambda g: torch.poisson(next(images), generator=g)) / c


def impulse_noise(x: Tensor, s: int, draw: Draw) -> Tensor:
    """A share c of the values becomes 0 or 1, each with probability 1/2."""
    c = (0.01, 0.02, 0.03, 0.05, 0.07)[s - 1]
    u = draw(lambda g: torch.rand(2, *x.shape[1:], generator=g))
    return torch.where(u[:, 0] < c, (u[:, 1] < 0.5).to(x.dtype), x)


def defocus_blur(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Convolution with a disk of radius c_0 whose edge is smoothed by a Gaussian of width c_1."""
    radius, smoothing = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[s - 1]
    side = torch.arange(-2.0, 3.0)  # the largest disk with its smooth edge
    disk = (side.square() + side.square()[:, None] <= radius**2).float()
    disk = TF.gaussian_blur(F.pad(disk / disk.sum(), (1, 1, 1, 1))[None], [3, 3], [smoothing])[:, 1:-1, 1:-1]
    return _filtered(x, (disk / disk.sum()).to(x).expand(len(x), -1, -1), "reflect")


def gaussian_blur(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Convolution with a Gaussian of width c, cut at four widths."""
    c = (0.4, 0.6, 0.7, 0.8, 1.0)[s - 1]
    side = torch.arange(-int(4 * c + 0.5), int(4 * c + 0.5) + 1)
    line = (-side.square() / (2 * c * c)).exp()
    kernel = line[:, None] * line / line.sum() ** 2
    return _filtered(x, kernel.to(x).expand(len(x), -1, -1), "replicate")


def motion_blur(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Half a Gaussian of c_0 + 1 taps and width c_1, along a direction drawn from −45° to 45°."""
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[s - 1]
    steps = torch.arange(radius + 1.0)
    weight = (-steps.square() / (2 * sigma**2)).exp()
    angle = (draw(lambda g: torch.rand(1, generator=g)).cpu() - 0.5) * math.pi / 2
    down, right = (torch.sin(angle) * steps).round().long(), (torch.cos(angle) * steps).round().long()
    kernel = torch.zeros(len(x), 2 * radius + 1, 2 * radius + 1)
    which = torch.arange(len(x))[:, None].expand_as(down)
    kernel.index_put_(
        (which, down + radius, right + radius), (weight / weight.sum()).expand_as(down), accumulate=True
    )
    return _filtered(x, kernel.to(x), "replicate")


def zoom_blur(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Mean of the image and of itself enlarged about its centre by 1, 1.01, 1.02, ... up to c."""
    c = (6, 11, 16, 21, 26)[s - 1]
    total = x
    for step in range(c):
        zoom = 1 + step / 100
        place = torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]]).to(x).expand(len(x), -1, -1)
        grid = F.affine_grid(place, list(x.shape), align_corners=False)
        total = total + F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return total / (c + 1)


def fog(x: Tensor, s: int, draw: Draw) -> Tensor:
    """(x + c_0 plasma) max(x) / (max(x) + c_0), with a plasma whose detail falls by c_1² an octave."""
    strength, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[s - 1]
    size = 2 ** max(1, math.ceil(math.log2(max(x.shape[2:]))))
    u = draw(lambda g: 2 * torch.rand(size, size, generator=g) - 1)
    plasma = _plasma(u, decay)[:, None, : x.shape[2], : x.shape[3]]
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * plasma) * top / (top + strength)


def brightness(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Add c to the value of HSV, the largest channel; hue and saturation stay."""
    c = (0.05, 0.1, 0.15, 0.2, 0.3)[s - 1]
    value = x.amax(1, keepdim=True)
    brighter = (value + c).clamp_max(1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-12), brighter)


def contrast(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Shrink the distance of every pixel from its channel's mean by c."""
    c = (0.75, 0.5, 0.4, 0.3, 0.15)[s - 1]
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * c + means


def saturate(x: Tensor, s: int, draw: Draw) -> Tensor:
    """c_0 S + c_1 for the saturation S of HSV: first less, from severity 3 on more. Gray counts as red."""
    factor, shift = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[s - 1]
    value = x.amax(1, keepdim=True)
    depth = value - x  # V S k_i, where k depends on the hue alone
    saturation = depth.amax(1, keepdim=True) / value.clamp_min(1e-12)
    k = depth / depth.amax(1, keepdim=True).clamp_min(1e-12)
    k = torch.where(saturation > 0, k, torch.tensor([0.0, 1.0, 1.0]).to(x).reshape(1, 3, 1, 1))
    return value * (1 - (factor * saturation + shift).clamp(0, 1) * k)


def pixelate(x: Tensor, s: int, draw: Draw) -> Tensor:
    """Down to a share c of the side and back up, by Pillow's box filter both times."""
    c = (0.95, 0.9, 0.85, 0.75, 0.65)[s - 1]
    rows, columns = (
        _box(side, small) @ _box(small, side) for side in x.shape[2:] if (small := max(1, int(c * side)))
    )
    return torch.einsum("ih,bchw,wj->bcij", rows.T.to(x), x, columns.to(x))


def jpeg(x: Tensor, s: int, draw: Draw) -> Tensor:
    """JPEG of quality c, from and to 8 bits."""
    c = (80, 65, 58, 50, 40)[s - 1]
    images = []
    for levels in (x * 255).round().to(torch.uint8).cpu():
        file = BytesIO()
        TF.to_pil_image(levels).save(file, "JPEG", quality=c)
        images.append(TF.pil_to_tensor(Image.open(file)))
    return torch.stack(images).to(x) / 255


CORRUPTIONS: dict[str, Callable[[Tensor, int, Draw], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "gaussian_blur": gaussian_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "saturate": saturate,
    "pixelate": pixelate,
    "jpeg": jpeg,
}
COLOUR_ONLY = ("saturate",)


def chosen_corruptions(names: Sequence[str] | str, num_channels: int) -> tuple[str, ...]:
    """Return corruptions by name; ``"all"`` is what images of so many channels can have.

    Raises:
        ValueError: An unknown name, ``"all"`` beside others, or a name for colour images only with images of
            another number of channels.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    possible = [name for name in CORRUPTIONS if num_channels == 3 or name not in COLOUR_ONLY]
    if names == ("all",):
        return tuple(possible)
    if "all" in names:
        raise ValueError(
            f"corruptions: got {' '.join(names)}; expected all alone, or names. Leave out one or the other."
        )
    for name in names:
        if name not in possible:
            why = f" of images with {num_channels} channels" if name in CORRUPTIONS else ""
            raise ValueError(
                f"corruptions: got {name!r}{why}; expected all, or some of {', '.join(possible)}."
            )
    return tuple(dict.fromkeys(names))


def corrupt(
    x: Tensor, name: str, severity: int, *, places: Tensor | Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """Return corrupted images, in [0, 1].

    Args:
        x: Images [B, C, H, W] in [0, 1]; not modified. ``jpeg`` needs 1 or 3 channels, ``saturate`` 3.
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5.
        places: Place of each image in its set, which decides its random numbers; 0 to B - 1 by default.
        seed: Of the random numbers.

    Raises:
        ValueError: Unknown name or severity.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(corrupt(x, "fog", 3)[1:], corrupt(x[1:], "fog", 3, places=[1]))
        True
    """
    chosen_corruptions([name], x.shape[1])
    if severity not in SEVERITIES:
        raise ValueError(f"corrupt: got severity {severity!r}; expected 1 to 5. Choose one.")
    numbers = range(len(x)) if places is None else [int(place) for place in places]

    def draw(one: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([one(generator_from("cpu", seed, "corruption", name, k)) for k in numbers]).to(x)

    return CORRUPTIONS[name](x, severity, draw).clamp(0, 1)


def _filtered(x: Tensor, kernels: Tensor, padding: str) -> Tensor:
    """Return images [B, C, H, W] correlated with a kernel [B, k, k] of odd side each."""
    num, channels, side = len(x), x.shape[1], kernels.shape[-1] // 2
    # A reflection needs more pixels than it mirrors.
    mode = padding if min(x.shape[2:]) > side else "replicate"
    padded = F.pad(x, (side,) * 4, mode=mode)
    weight = kernels.repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded.reshape(1, -1, *padded.shape[2:]), weight, groups=num * channels).reshape(x.shape)


def _box(num: int, new: int) -> Tensor:
    """Return the matrix [num, new] of a resize: each new pixel is the mean of those centred in its place."""
    scale = num / new
    distance = (torch.arange(num)[:, None] + 0.5 - (torch.arange(new) + 0.5) * scale) / max(scale, 1)
    weight = ((distance > -0.5 + 1e-6) & (distance <= 0.5 + 1e-6)).float()
    return weight / weight.sum(0)


def _plasma(u: Tensor, decay: float) -> Tensor:
    """Return a height map in [0, 1] on a torus, from noise ``u`` [B, S, S] in [-1, 1], S a power of two.

    Diamond-square: each point is the mean of its four neighbours at a distance h plus w² u, first diagonal,
    then upright ones; then h halves and w, at first 100, is divided by ``decay`` (Fournier et al. 1982).
    """
    height, step, w = torch.zeros_like(u), u.shape[1], 100.0
    while step >= 2:
        h = step // 2
        diagonal, upright = [(h, h), (h, -h), (-h, h), (-h, -h)], [(h, 0), (-h, 0), (0, h), (0, -h)]
        for corners, shifts in (([(h, h)], diagonal), ([(0, h), (h, 0)], upright)):
            mean = torch.stack([height.roll(shift, (1, 2)) for shift in shifts]).mean(0) + w * w * u
            for row, column in corners:
                height[:, row::step, column::step] = mean[:, row::step, column::step]
        step, w = h, w / decay
    low = height.amin((1, 2), keepdim=True)
    return (height - low) / (height.amax((1, 2), keepdim=True) - low).clamp_min(1e-12)
