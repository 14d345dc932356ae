"""A ViT as others export it: q, k and v apart, the scale behind QK^T, torch's older exporter, nodes with its names."""

import io
import warnings

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.1, 4.0)  # equal ones would be stored once, behind Identity nodes
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1)
        x = x + self.output((weights @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 2, depth: int = 2):
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, dim, 8, 8), nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 17, dim))
        self.blocks, self.norm = nn.Sequential(*(Block(dim, heads) for _ in range(depth))), nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.norm(self.blocks(x))
        return x[:, 0], x[:, 1:]


def foreign(opset: int = 17) -> ModelProto:
    """images [batch, 3, 32, 32] -> cls, patches."""
    torch.manual_seed(0)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Net().eval(), (torch.zeros(2, 3, 32, 32),), data, dynamo=False, opset_version=opset, input_names=["images"],
            output_names=["cls", "patches"], dynamic_axes={"images": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(data.getvalue())
