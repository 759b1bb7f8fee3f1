"""The same numbers from curvlinops, by dense operators."""

import pytest
import torch
from oracles import dense_hessian, exact_gauss_newton_trace
from torch import Tensor, nn

from wcitrain.curvature.loss import cross_entropy, mean_squared_error
from wcitrain.params import Layers

# curvlinops' forward mode compiles its rules with torch.jit.script, which PyTorch warns of.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor, Layers]:
    """A convolutional GELU network with BatchNorm in eval mode, seven examples; biases are layers too."""
    torch.manual_seed(2)
    body, head = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU()), (nn.Linear(12, 4), nn.GELU())
    model = nn.Sequential(*body, nn.Flatten(), *head, nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y = torch.rand(7, 1, 4, 4).double(), torch.randint(0, 3, (7,))
    return model, x, y, Layers(dict(model.named_parameters()))


def test_dense_blocks_are_those_of_curvlinops(problem):
    """On two ragged batches: its Hessian of the mean over all examples is ours of the whole batch."""
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y, layers = problem
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    for name, block in dense_hessian(cross_entropy(model(x), y), layers).items():
        operator = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), [layers[name]], data)
        theirs = operator @ torch.eye(layers[name].numel()).double()
        # Rounding of float64 sums of a few thousand terms.
        assert torch.allclose(block, theirs, rtol=0, atol=1e-12 * float(1 + theirs.norm())), name


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
def test_gauss_newton_traces_are_those_of_curvlinops(loss, problem):
    """Its Gauss–Newton operator knows torch's reductions; ours must declare the same weight."""
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y, layers = problem
    targets = y if loss == "cross-entropy" else torch.rand(7, 3).double()
    criterion = nn.CrossEntropyLoss() if loss == "cross-entropy" else nn.MSELoss()
    ours_of = cross_entropy if loss == "cross-entropy" else mean_squared_error
    ours = exact_gauss_newton_trace(ours_of(model(x), targets), layers)
    for trace, (name, p) in zip(ours, layers.items(), strict=True):
        operator = curvlinops.GGNLinearOperator(model, criterion, [p], [(x, targets)])
        theirs = operator @ torch.eye(p.numel()).double()
        assert float(trace) == pytest.approx(float(theirs.trace()), rel=1e-10), name
