"""What a Continuous Thought Machine looks at: inputs turned into features, (N, places, width of the backbone).

Axes: N rows, S places, C channels, Y and X of images.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.errors import InputError
from loopwise.models.ctm_config import CTMConfig

_STAGES = {"18": (2, 2), "34": (3, 4)}
_STAGE_WIDTHS = (64, 128)


class Backbone(nn.Module):
    """Base: features of an input, and how wide they are."""

    features: int
    """Width of a feature."""


class Given(Backbone):
    """The input holds features already."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = channels

    def forward(self, inputs: Float[Tensor, "rows channels *places"]) -> Float[Tensor, "rows flat channels"]:
        return _as_places(_of_channels(inputs, self.features))


class ParityEmbedding(Backbone):
    """A vector for each value of +-1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = width
        self.embedding = nn.Embedding(2, width)

    def forward(self, inputs: Float[Tensor, "rows places"]) -> Float[Tensor, "rows places features"]:
        if inputs.dim() != 2 or not bool((inputs.abs() == 1).all()):
            raise InputError(f"an input of shape {tuple(inputs.shape)}; (rows, places) of +1 and -1 is needed")
        embedded: Tensor = self.embedding((inputs == 1).long())
        return embedded


class ConvNet(Backbone):
    """Our own for small images: three 3x3 convolutions with group norms, a skip over the last two, and halvings.

    Group norms and not batch norms, so that a sample's answer does not depend on its neighbours, in training either.
    """

    def __init__(self, channels: int, width: int, halvings: int) -> None:
        super().__init__()
        self.features, self.channels, self.halvings = width, channels, halvings
        groups = next(groups for groups in (8, 4, 2, 1) if width % groups == 0)
        widths = (channels, width, width)
        self.convolutions = nn.ModuleList(nn.Conv2d(before, width, 3, padding=1) for before in widths)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in widths)

    def forward(self, images: Float[Tensor, "rows channels y x"]) -> Float[Tensor, "rows places features"]:
        images = _of_channels(images, self.channels)
        x = self._layer(0, images)
        for _ in range(self.halvings):
            x = F.max_pool2d(x, 2)
        return _as_places(x + self._layer(2, self._layer(1, x)))

    def _layer(self, number: int, x: Tensor) -> Tensor:
        return F.relu(self.norms[number](self.convolutions[number](x)))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip (He et al. 2015, arXiv 1512.03385, figure 5 left); torchvision's names."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or width_in != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        skipped = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + skipped)


class ResNet(Backbone):
    """The first one or two stages of ResNet-18 or -34, as the authors' maze models begin.

    A 1x1 convolution to three channels, then a 3x3 one in place of the usual 7x7, a halving max pool, and the stages.
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        depth, stages = kind.removeprefix("resnet").split("-")
        self.channels = channels
        self.features = _STAGE_WIDTHS[int(stages) - 1]
        self.rgb = nn.Conv2d(channels, 3, 1)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stages = nn.ModuleList()
        before = 64
        for width, blocks in zip(_STAGE_WIDTHS[: int(stages)], _STAGES[depth], strict=False):
            stride = 1 if width == 64 else 2
            self.stages.append(
                nn.Sequential(
                    *(
                        _ResidualBlock(before if block == 0 else width, width, stride if block == 0 else 1)
                        for block in range(blocks)
                    )
                )
            )
            before = width

    def forward(self, images: Float[Tensor, "rows channels y x"]) -> Float[Tensor, "rows places features"]:
        x = F.relu(self.bn1(self.conv1(self.rgb(_of_channels(images, self.channels)))))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return _as_places(x)


class RotationPositions(nn.Module):
    """Place s of S is turned by 180 s / (S - 1) degrees; the turned unit vector is projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2, width)

    def forward(self, features: Float[Tensor, "rows places width"]) -> Float[Tensor, "places width"]:
        turn = torch.linspace(0.0, torch.pi, features.shape[1], dtype=features.dtype, device=features.device)
        turned: Tensor = self.projection(torch.stack((-turn.sin(), turn.cos()), dim=-1))
        return turned


def build_backbone(config: CTMConfig) -> Backbone:
    """The backbone that `config` names."""
    if config.backbone == "parity":
        return ParityEmbedding(config.width)
    channels = config.channels or 0
    if config.backbone == "given":
        return Given(channels)
    if config.backbone == "convnet":
        return ConvNet(channels, config.backbone_width or 0, config.halvings)
    return ResNet(channels, config.backbone)


def _of_channels(inputs: Tensor, channels: int) -> Tensor:
    if inputs.dim() < 3 or inputs.shape[1] != channels:
        raise InputError(f"an input of shape {tuple(inputs.shape)}; (rows, {channels} channels, places...) is needed")
    return inputs


def _as_places(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)
