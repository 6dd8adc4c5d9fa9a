"""Interactions that are no crosses: a transformer over tokens, FinalMLP's two streams, DeepLight's field pairs.

Shapes: N rows, X width of the input, C tokens, E width of a token, A attention heads, e width of a head, F fields,
V width of a field's vector, M maps, K chunks of the bilinear form, I and J widths of a chunk of either stream,
O outputs.
"""

import torch
from torch import Tensor, nn

from model.interactions import sizes as s
from model.interactions.base import Interaction
from model.layers import mlp


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward part (Vaswani et al. 2017, arXiv 1706.03762; pre-norm: 2002.04745).

    Written out: the library's layer leaves its plain path in evaluation, where gradients per sample need it.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x_NCE: Tensor) -> Tensor:
        """(N, C, E) -> (N, C, E)."""
        qkv = self.qkv(self.norms[0](x_NCE)).unflatten(-1, (3, self.heads, -1))
        q_NACe, k_NACe, v_NACe = qkv.transpose(-2, -4).unbind(-3)
        weights_NACC = torch.softmax(q_NACe @ k_NACe.transpose(-1, -2) * q_NACe.shape[-1] ** -0.5, -1)
        x_NCE = x_NCE + self.out((weights_NACC @ v_NACe).transpose(-2, -3).flatten(-2))
        return x_NCE + self.ffn(self.norms[1](x_NCE))


class Transformer(Interaction):
    """C tokens, each a projection of the whole input, through encoder layers."""

    def __init__(self, sizes: s.Transformer, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.token_shape = (sizes.tokens, sizes.width)
        self.tokens = nn.Linear(sum(widths), sizes.tokens * sizes.width)
        hidden = sizes.multiplier * sizes.width
        self.layers = nn.Sequential(*(EncoderLayer(sizes.width, sizes.heads, hidden) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        self.out_features = sizes.tokens * sizes.width

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, C * E)."""
        x_NCE = self.tokens(x_NX).unflatten(-1, self.token_shape)
        return self.norm(self.layers(x_NCE)).flatten(-2)


class Stream(nn.Module):
    """MLP(2 sigmoid(g(x)) * x), one stream of FinalMLP with its feature gate (Mao et al. 2023, arXiv 2304.00902).

    The paper conditions the gate on chosen fields; here the input's order means nothing, so it is the whole input.
    The gate's last layer starts at zero: the gate starts at one.
    """

    def __init__(self, width: int, sizes: s.FinalMLP) -> None:
        super().__init__()
        opened = nn.Linear(sizes.gate, width)
        nn.init.zeros_(opened.weight)
        nn.init.zeros_(opened.bias)
        self.gate = nn.Sequential(nn.Linear(width, sizes.gate), nn.ReLU(), opened)
        self.mlp = mlp(width, sizes.hidden)

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, last hidden width)."""
        return self.mlp(2 * torch.sigmoid(self.gate(x_NX)) * x_NX)


class FinalMLP(Interaction):
    """b + W_1 o_1 + W_2 o_2 + sum over K chunks of o_1k' W_3k o_2k (arXiv 2304.00902)."""

    def __init__(self, sizes: s.FinalMLP, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.streams = nn.ModuleList(Stream(sum(widths), sizes) for _ in range(2))
        last = sizes.hidden[-1]
        self.linear = nn.Linear(2 * last, sizes.outputs)
        self.chunks = (sizes.heads, last // sizes.heads)
        self.bilinear = nn.Parameter(torch.empty(sizes.heads, last // sizes.heads, sizes.outputs, last // sizes.heads))
        nn.init.normal_(self.bilinear, std=1 / last)  # a sum of last ** 2 / K products
        self.out_features = sizes.outputs

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, O)."""
        first, second = (stream(x_NX) for stream in self.streams)
        first_NKI, second_NKJ = (o.unflatten(-1, self.chunks) for o in (first, second))
        half_NKOJ = torch.einsum("...ki,kioj->...koj", first_NKI, self.bilinear)
        met_NO = (half_NKOJ * second_NKJ.unsqueeze(-2)).sum((-1, -3))
        return self.linear(torch.cat([first, second], -1)) + met_NO


class DeepLight(Interaction):
    """M maps W x + sum over pairs i < j of R_ij <v_i, v_j>, beside an MLP of the v.

    This is DeepFwFM, the model of Deng et al. 2021, arXiv 2002.06987. The paper's magnitude pruning, which makes it
    fast to serve, is left out: it is a training schedule with sparse kernels behind it, and no other variant of the
    study is pruned.
    """

    upper: Tensor

    def __init__(self, sizes: s.DeepLight, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.vectors = nn.ModuleList(nn.Linear(width, sizes.width, bias=False) for width in widths)
        self.linear = nn.Linear(sum(widths), sizes.maps)
        fields = len(widths)
        # Only the upper triangle is read; full matrices keep the product a plain one.
        self.pairs = nn.Parameter(torch.empty(sizes.maps, fields, fields))
        nn.init.normal_(self.pairs, std=1 / fields)
        self.register_buffer("upper", torch.ones(fields, fields).triu(1), persistent=False)
        self.mlp = mlp(fields * sizes.width, sizes.hidden)
        self.out_features = sizes.maps + [fields * sizes.width, *sizes.hidden][-1]

    def forward(self, x_NX: Tensor) -> Tensor:
        """(N, X) -> (N, M + last hidden width)."""
        parts = x_NX.split(self.widths, -1)
        v_NFV = torch.stack([project(part) for project, part in zip(self.vectors, parts, strict=True)], -2)
        products_NFF = v_NFV @ v_NFV.transpose(-1, -2)
        wide_NM = self.linear(x_NX) + products_NFF.flatten(-2) @ (self.pairs * self.upper).flatten(-2).T
        return torch.cat([wide_NM, self.mlp(v_NFV.flatten(-2))], -1)
