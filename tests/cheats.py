"""Models that fool attacks, one for each way, around an honest one: what ``evaluate`` must say of each."""

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wcitrain.attacks import Attack, ThreatModel

EPS = 0.1


def digits(num: int = 200) -> tuple[Tensor, Tensor]:
    """Return the first images of scikit-learn's digits, [num, 1, 8, 8], and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:num] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(
        labels[:num]
    )


@cache
def honest() -> nn.Module:
    """Return a small network with batch normalisation, trained against one step on the other digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
        model, (x, y) = nn.Sequential(nn.Flatten(), *layers), digits(1797)
        optimizer, attack = torch.optim.Adam(model.parameters(), 0.01), Attack(ThreatModel("linf", EPS), 1)
        for _ in range(60):
            x_adv = attack(model, x[200:], y[200:], torch.Generator().manual_seed(0))
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y[200:]).backward()
            optimizer.step()
    return model.eval()


def trained(how: str, eps: float, epochs: int) -> nn.Module:
    """Return a small convolutional network, trained against linf of radius ``eps`` on the later digits."""
    ball = ThreatModel("linf", eps)
    attack = {
        "plain": Attack(ball, 0, start="none"),
        "FGSM": Attack(ball, 1, step_size=eps, start="none"),
        "PGD": Attack(ball, 5),
        "TRADES": Attack(ball, 5, loss="kl", start="gaussian"),
    }[how]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        front = nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()
        model = nn.Sequential(*front, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        (x, y), optimizer = digits(1797), torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(epochs):
            for places in (400 + torch.randperm(1397)).split(100):
                images, labels = x[places], y[places]
                hit = model(attack(model, images, labels, torch.Generator().manual_seed(0)))
                clean = model(images) if how == "TRADES" else hit
                apart = F.kl_div(hit.log_softmax(1), clean.softmax(1), reduction="batchmean")
                optimizer.zero_grad()
                (F.cross_entropy(clean, labels) + 6 * apart).backward()
                optimizer.step()
    return model.eval()


class Cheat(nn.Module):
    """An honest model behind a module ``front`` and before a module ``back``."""

    def __init__(
        self, model: nn.Module, front: nn.Module | None = None, back: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.front, self.model, self.back = front or nn.Identity(), model, back or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.model(self.front(x)))


class Backward(torch.autograd.Function):
    """The identity, whose gradient is ``change`` of the right one."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


class Part(nn.Module):
    """A function as a module, so that it has a name in a model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def wrong_gradient(change):
    return Part(lambda x: Backward.apply(x, change))


def over_batch(x: Tensor) -> Tensor:
    """Normalise with the batch at hand, as batch normalisation does that is never put in eval mode."""
    return F.batch_norm(x, None, None, training=True)


def other_where_recorded(x: Tensor) -> Tensor:
    return x.flip(3) if torch.is_grad_enabled() else x


def half_detached(x: Tensor) -> Tensor:
    return torch.cat([x[..., :4], x[..., 4:].detach()], 3)


FRONTS = {  # what stands in front of the honest model
    "batch": over_batch,
    "flipped": lambda x: Backward.apply(x, torch.neg),
    "permuted": lambda x: Backward.apply(x, lambda g: g.flip(2)),
    "random": lambda x: Backward.apply(x, torch.randn_like),
    "partial": half_detached,
    "shattered": lambda x: x + 0.02 * torch.sin(3000 * x),
    "wavy": lambda x: x + 0.015 * torch.sin(200 * x),
    "noise": lambda x: x + 0.015 * torch.sin(200 * x + 6.2832 * torch.rand_like(x)),
    "quantised": lambda x: (16 * x).round() / 16,
    "coarse": lambda x: x + ((1.5 * x).round() / 1.5 - x).detach(),
    "detached": lambda x: x.detach(),
    "clipped": lambda x: x.clamp(0.08, 0.92),
    "recorded": other_where_recorded,
}
BACKS = {  # and behind it
    "saturated": lambda z: 1e4 * z,
    "softmax": lambda z: z.softmax(1),
    "rounded logits": lambda z: (z / 4).round(),
}
NAMED = {  # what ``evaluate`` calls each, and whether it stops before a number
    "batch": ("batch_dependent", "error"),
    "flipped": ("gradient_wrong", "error"),
    "permuted": ("gradient_wrong", "error"),
    "random": ("gradient_wrong", "error"),
    "partial": ("gradient_wrong", "error"),
    "shattered": ("gradient_wrong", "error"),
    "wavy": ("random_search", "warning"),
    "noise": ("randomised", "error"),
    "quantised": ("zero_gradient", "error"),
    "coarse": ("rough", "warning"),
    "detached": ("no_gradient", "error"),
    "clipped": ("blind_pixels", "warning"),
    "recorded": ("recorded", "error"),
    "saturated": ("zero_gradient", "warning"),
    "softmax": ("probabilities", "error"),
    "rounded logits": ("zero_gradient", "error"),
}


def cheat(name: str) -> nn.Module:
    """Return the honest model with what fools attacks in front of it or behind it."""
    return Cheat(honest(), *(Part(table[name]) if name in table else None for table in (FRONTS, BACKS)))
