"""The residual networks for small pictures, which distillation is measured on: ResNet-20, 32, 44, 56, 110."""

import os
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.arguments import integer, typed
from lightning_distill.models.files import BROKEN, one_line
from lightning_distill.models.pretrained import load_module


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (option A): every second pixel, new channels are zero.

    Args:
        channels: Channels that come in.
        width: Channels that go out.
        stride: 2 halves height and width.

    Example:
        >>> import torch
        >>> from lightning_distill.models.cifar_resnet import Block
        >>> Block(4, 8, stride=2)(torch.randn(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.new = stride, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""
        shortcut = x[..., :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


@typed
class CifarResNet(nn.Module):
    """A ResNet for pictures of about 32 x 32 pixels: three stages of 16, 32 and 64 channels, ``depth = 6 n + 2``.

    Its parameters are named as in akamaster's pytorch_resnet_cifar10, whose weights it loads. Features for objectives
    are the modules ``layer1``, ``layer2`` and ``layer3``.

    Args:
        depth: Number of layers: 8, 14, 20, 32, 44, 56, 110 ...
        num_labels: Number of classes.
        channels: Channels of the pictures.
        class_names: Names of the classes in the order of their ids, where they have any.

    Raises:
        ValueError: If the depth is not 6 n + 2.

    Example:
        >>> import torch
        >>> from lightning_distill.models.cifar_resnet import CifarResNet
        >>> model = CifarResNet(20)
        >>> model(torch.randn(2, 3, 32, 32)).shape, sum(parameter.numel() for parameter in model.parameters())
        (torch.Size([2, 10]), 269722)

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2, with shortcuts of option A.
    """

    def __init__(
        self, depth: int = 20, num_labels: int = 10, channels: int = 3, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        integer("num_labels", num_labels, 1)
        if depth < 8 or depth % 6 != 2:
            near = 6 * max(1, round((depth - 2) / 6)) + 2
            raise ValueError(
                f"Expected argument `depth` to be 6 n + 2 (8, 14, 20 ...), but got {depth}; {near} is near"
            )
        names = None if class_names is None else list(class_names)
        #: What makes it again; :func:`lightning_distill.models.pretrained.export` writes it into ``config.json``.
        self.hparams = {"depth": depth, "num_labels": num_labels, "channels": channels, "class_names": names}
        self.num_labels, self.class_names = num_labels, names
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, depth)
        self.layer2 = _stage(16, 32, depth)
        self.layer3 = _stage(32, 64, depth)
        self.linear = nn.Linear(64, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``[B, num_labels]`` of pictures ``[B, channels, H, W]``."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], name: str = "path") -> "CifarResNet":
        """Load what was exported, or weights alone, of which depth and classes are read off.

        Args:
            path: A folder that :func:`~lightning_distill.models.pretrained.export` wrote; a ``.safetensors`` file; or a
                folder of such files, of which the largest is taken.
            name: What the argument is called where the user gave it, for the error.

        Raises:
            ValueError: If there are no weights, or they are of another network.
        """
        path = Path(path)
        if (path / "config.json").is_file():
            return load_module(cls, path, name)
        files = sorted(path.glob("*.safetensors"), key=lambda file: file.stat().st_size) if path.is_dir() else [path]
        try:
            weights = safetensors.torch.load_file(files[-1])
            blocks = sum(key.startswith("layer1.") and key.endswith(".conv1.weight") for key in weights)
            model = cls(6 * blocks + 2, len(weights["linear.weight"]), weights["conv1.weight"].shape[1])
            model.load_state_dict(weights)
        except (*BROKEN, LookupError) as error:
            raise ValueError(
                f"Expected argument `{name}` to hold weights of a CifarResNet in safetensors, but got "
                f"{os.fspath(path)}: {one_line(error)}"
            ) from None
        return model


def _stage(channels: int, width: int, depth: int) -> nn.Sequential:
    first = Block(channels, width, stride=1 if channels == width else 2)
    return nn.Sequential(first, *(Block(width, width) for _ in range((depth - 2) // 6 - 1)))
