"""Random probes: Rademacher signs, cheap and reproducible."""

from collections.abc import Sequence

import torch
from torch import Tensor


def signs(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return one Rademacher tensor a tensor (entries −1 or +1, mean 0, variance 1).

    Args:
        tensors: Whose shapes, dtypes and device are followed.
        generator: On any device; ``seeding.generator_from(device, *key)`` makes the draw a function of a key.
    """
    target = tensors[0].device
    device = target if generator is None else generator.device
    num = sum(t.numel() for t in tensors)
    # Eight signs a random byte: several times cheaper than one random number a sign.
    random_bytes = torch.randint(0, 256, (-(-num // 8), 1), generator=generator, device=device, dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[:num].to(torch.int8).mul_(2).sub_(1).to(target)
    parts = flat.split([t.numel() for t in tensors])
    return [v.view(t.shape).to(t.dtype) for v, t in zip(parts, tensors, strict=True)]
