"""Networks that multiply in every way: recurrent layers, functions, attention, other numbers of axes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """A convolution, and behind it whatever a function makes of its feature map.

    Args:
        behind: Gets the network and the map, (N, 8, 8, 8), and returns (N, features).
        features: How many it returns.
        parts: Modules that it uses, by name.
    """

    def __init__(self, behind, features: int, **parts: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        for name, part in parts.items():
            self.add_module(name, part)
        self.head, self.behind = nn.Linear(features, 4), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self, F.relu(self.stem(x))))


class Held(nn.Module):
    """A parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape))


def rows(x: Tensor) -> Tensor:
    """Return a feature map (N, C, H, W) as a sequence of its columns, (N, W, C * H)."""
    return x.permute(0, 3, 1, 2).flatten(2)


def _cells(net: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 6)
    for step in rows(x).unbind(1):
        state = net.cell(step, state)
    return state


def _attend(net: nn.Module, x: Tensor) -> Tensor:
    tokens = net.proj(x.flatten(2).transpose(1, 2))
    return net.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


def _nonlocal(net: nn.Module, x: Tensor) -> Tensor:
    """Each place as a mean of all places, weighted by how alike they are."""
    q, k, v = (layer(x).flatten(2) for layer in (net.q, net.k, net.v))
    return torch.matmul(v, torch.matmul(q.transpose(1, 2), k).softmax(-1).transpose(1, 2)).mean(2)


def networks() -> dict[str, tuple[nn.Module, int]]:
    """Name -> a network and the MACs of what lies between its first convolution and its head."""
    mean = (2, 3)
    return {
        "gru": (Body(lambda n, x: n.r(rows(x))[0].mean(1), 12, r=nn.GRU(64, 6, 2, True, True, bidirectional=True)),
                2 * 8 * 18 * (64 + 6 + 12 + 6)),
        "lstm": (Body(lambda n, x: n.r(rows(x))[0].mean(1), 6, r=nn.LSTM(64, 6, batch_first=True)), 8 * 24 * (64 + 6)),
        "projected": (Body(lambda n, x: n.r(rows(x))[0].mean(1), 5, r=nn.LSTM(64, 6, batch_first=True, proj_size=5)),
                      8 * (24 * (64 + 5) + 6 * 5)),
        "rnn": (Body(lambda n, x: n.r(rows(x).transpose(0, 1))[1][-1], 6, r=nn.RNN(64, 6)), 8 * 6 * (64 + 6)),
        "cell": (Body(_cells, 6, cell=nn.GRUCell(64, 6)), 8 * 18 * (64 + 6)),
        "functional": (Body(lambda n, x: F.conv2d(x, n.w.kernel, padding=1).mean(mean), 5, w=Held(5, 8, 3, 3)),
                       64 * 5 * 72),
        "computed": (Body(lambda n, x: F.conv2d(x, n.w.kernel.tanh(), padding=1).mean(mean), 5, w=Held(5, 8, 3, 3)),
                     64 * 5 * 72),
        "matrix": (Body(lambda n, x: x.mean(mean) @ n.w.kernel, 5, w=Held(8, 5)), 40),
        "einsum": (Body(lambda n, x: torch.einsum("nchw,ck->nkhw", x, n.w.kernel).mean(mean), 5, w=Held(8, 5)),
                   64 * 40),
        "nonlocal": (Body(_nonlocal, 6, q=nn.Conv2d(8, 4, 1), k=nn.Conv2d(8, 4, 1), v=nn.Conv2d(8, 6, 1)),
                     64 * 8 * 14 + 64 * 64 * (4 + 6)),
        "attention": (Body(_attend, 8, proj=nn.Linear(8, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True)),
                      64 * 8 * 8 * (1 + 3 + 1) + 64 * 64 * 8 * 2),
        "bilinear": (Body(lambda n, x: n.b(x.mean(mean), x.amax(mean)), 5, b=nn.Bilinear(8, 8, 5)), 5 * 64 + 5 * 8),
        "volume": (Body(lambda n, x: n.v(x[:, None]).mean((2, 3, 4)), 2, v=nn.Conv3d(1, 2, 3, padding=1)),
                   512 * 2 * 27),
        "line": (Body(lambda n, x: n.v(x.flatten(2)).mean(2), 5, v=nn.Conv1d(8, 5, 3, groups=1)), 62 * 5 * 24),
        "wider": (Body(lambda n, x: n.v(x).mean(mean), 6, v=nn.ConvTranspose2d(8, 6, 2, 2, groups=2)), 64 * 8 * 3 * 4),
        "deep": (Body(lambda n, x: n.v(x).mean(mean), 16, v=nn.Conv2d(8, 16, 3, padding=1, groups=8)), 64 * 16 * 9),
    }  # fmt: skip


NAMES = tuple(networks())


def build(name: str) -> tuple[nn.Module, int]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module, macs = networks()[name]
    return module.eval(), macs
