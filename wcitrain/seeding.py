"""Randomness without state: every random number is a function of the seed and of where it is used.

Nothing here has to be saved for an exact resume, and two processes can draw the same or different numbers on
purpose, by naming the same or different places: ``seed_from(seed, "attack", step, rank)``.
"""

import hashlib

import torch


def seed_from(*parts: object) -> int:
    """Return a 63-bit seed: a function of ``parts``, plain values that name where numbers are drawn.

    It is the same on every machine, in every process and every Python version.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_from(device: torch.device | str, *parts: object) -> torch.Generator:
    """Return a fresh generator on ``device``, seeded with ``seed_from(*parts)``."""
    return torch.Generator(device=device).manual_seed(seed_from(*parts))
