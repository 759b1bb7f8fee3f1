"""What the attack's answer to the weights adds to the curvature at images held fixed; for small models.

Legend: L(W, x) mean loss, x the images that the attack finds at W, φ(W) = L(W, x(W)) from the same starts,
W_l weights of a layer (filter), v_l random signs, r the radius.

Danskin's theorem gives the gradient of φ at images held fixed, not its Hessian. At a maximum without borders

    φ'' = L_WW − L_Wx L_xx⁻¹ L_xW                                                                          (1)

where the second part is never negative: held images leave out curvature, and the index is too low. For any
attack and border that part is, along one v_l,

    [ φ(W + h v_l) − L(W + h v_l, x) + φ(W − h v_l) − L(W − h v_l, x) ] / h²,     h ‖v_l‖ = r ‖W_l‖        (2)

since φ(W) = L(W, x): what the attack gains by answering. Its mean over v_l is added to the trace t_l. It asks
for nothing but losses. A sign attack's images are piecewise constant in W and answer in jumps, which no
derivative sees. The smaller the radius, the more of (2) is the noise of an attack that ends elsewhere for
nothing, which falls as r⁻²; the larger, the more of higher orders is in it.

Differences are in float64, on a copy of the model. Cost of a draw: two attacks a layer (filter).
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from wcitrain.curvature.loss import signs
from wcitrain.params import Layers

LossAt = Callable[[], Tensor]  # the loss at the weights as they are


def answers(anew: LossAt, held: LossAt, layers: Layers, radius: float, generator: Generator) -> Tensor:
    """Return one draw of (2) [L] in float64; the weights come back bit for bit.

    ``anew`` is φ, ``held`` the loss at the images of W. A layer of zeros is moved by the radius itself.
    """
    found = []
    for tensor, count in zip(layers.tensors, layers.num_parts, strict=True):
        v, whole = signs([tensor], generator)[0], tensor.detach().clone()
        for rows in torch.arange(len(tensor)).chunk(count):
            h = radius * (float(whole[rows].norm()) or 1.0) / v[rows].numel() ** 0.5
            gained = torch.zeros((), dtype=torch.float64)
            for step in (h, -h):
                with torch.no_grad():
                    tensor[rows] += step * v[rows]
                gained += (anew() - held()).cpu()
                with torch.no_grad():
                    tensor.copy_(whole)
            found.append(gained / h**2)
    return torch.stack(found)
