"""Images above their adversarial examples: what the robust accuracy of a run is about, to look at."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from wcitrain.attacks import Attack
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.report.drawing import INK, SERIES, SOFT, empty_figure
from wcitrain.seeding import generator_from

NUM_IMAGES = 8
MAX_PIXELS = 96  # of an edge; larger images are drawn smaller


def strip(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, title: str = "", *, seed: int = 0
) -> Figure:
    """Attack up to ``NUM_IMAGES`` images and draw them: clean, adversarial, and the magnified difference.

    Over the columns stand the labels, over the images the model's predictions, in colour where wrong.

    ``x`` [N, C, H, W] in [0, 1] and ``y`` [N] are on the model's device; ``seed`` is of the random starts.
    """
    x, y = x[:NUM_IMAGES], y[:NUM_IMAGES]
    with undisturbed(model, training=False), full_precision(model):
        generator = generator_from(x.device, seed, "report images")
        x_adv = attack(model, x, y, generator)
        with torch.no_grad():
            predictions = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    factor = 0.5 / max(float((x_adv - x).abs().max()), 1e-12)
    images = {"clean": x, "adversarial": x_adv, f"difference\n× {factor:.3g}": 0.5 + factor * (x_adv - x)}
    figure = empty_figure(0.85 * len(x) + 0.6, 3.3, f"{title}, {attack.threat}".removeprefix(", "))
    axes = figure.subplots(3, len(x), squeeze=False)
    for i, (name, batch) in enumerate(images.items()):
        if max(batch.shape[2:]) > MAX_PIXELS:
            batch = F.interpolate(batch, scale_factor=MAX_PIXELS / max(batch.shape[2:]), mode="area")
        pixels = batch.float().clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()
        axes[i, 0].set_ylabel(name, fontsize=8, color=INK)
        for k, label in enumerate(y.tolist()):
            ax = axes[i, k]
            ax.imshow(pixels[k], interpolation="none")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i < 2:
                text = f"label {label}\n" * (i == 0) + f"→ {predictions[i][k]}"
                colour = SOFT if predictions[i][k] == label else SERIES[1]
                ax.set_title(text, fontsize=8, color=colour)
    return figure
