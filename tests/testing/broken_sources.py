"""Small sources that break one rule of the contract each."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import ClassVar

import torch
from PIL import Image
from pydantic import ConfigDict
from torch import Tensor

from unlabeled.ssl.core.errors import DataError
from unlabeled.ssl.data.decode import decode_rgb
from unlabeled.ssl.data.source import SourceConfig, Split


class GoodConfig(SourceConfig):
    """Settings of images of noise."""

    count: int = 10
    """Training images."""


class Good:
    """Images of noise that keep every rule."""

    Config: ClassVar[type[SourceConfig]] = GoodConfig
    classes: list[str] | None = ["even", "odd"]

    def __init__(self, config: GoodConfig, split: Split = "train") -> None:
        self.count = config.count if split == "train" else 4
        self.first = 0 if split == "train" else 1000

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.first + index)
        return torch.randint(0, 256, (3, 8, 10), generator=generator, dtype=torch.uint8)

    def labels(self) -> Tensor | None:
        return torch.arange(self.count) % 2

    def describe(self, index: int) -> str:
        return f"noise {self.first + index}"


class NoDocstring(Good):
    pass


NoDocstring.__doc__ = None


class BareConfig(GoodConfig):
    """Settings."""

    strength: int = 1


class BareSetting(Good):
    """Noise."""

    Config = BareConfig


class LooseConfig(GoodConfig):
    """Settings."""

    model_config = ConfigDict(extra="ignore")


class LooseSettings(Good):
    """Noise."""

    Config = LooseConfig


class TakenConfig(GoodConfig):
    """Settings."""

    name: str = "x"
    """A name that all data has."""


class TakenSetting(Good):
    """Noise."""

    Config = TakenConfig


class CallableConfig(GoodConfig):
    """Settings."""

    made_by: Callable[[], int] = len
    """What cannot be written."""


class UnwrittenSettings(Good):
    """Noise."""

    Config = CallableConfig


class Empty(Good):
    """Noise."""

    def __len__(self) -> int:
        return 0


class Floats(Good):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return super().read(index) / 255


class ChannelsLast(Good):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return super().read(index).permute(1, 2, 0)


class Random(Good):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return torch.randint(0, 256, (3, 8, 10), dtype=torch.uint8)


class OtherOrder(Good):
    """Noise."""

    opened = 0

    def __init__(self, config: GoodConfig, split: Split = "train") -> None:
        super().__init__(config, split)
        type(self).opened += 1
        self.first += self.opened


class FloatLabels(Good):
    """Noise."""

    def labels(self) -> Tensor | None:
        return torch.zeros(self.count)


class TooManyLabels(Good):
    """Noise."""

    def labels(self) -> Tensor | None:
        return torch.arange(self.count)


class NoClasses(Good):
    """Noise."""

    classes = None


class OneDescription(Good):
    """Noise."""

    def describe(self, index: int) -> str:
        return "noise"


class Endless(Good):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return super().read(index % self.count)


class KeyErrors(Good):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return {position: super(KeyErrors, self).read(position) for position in range(self.count)}[index]


class Overlapping(Good):
    """Noise."""

    def __init__(self, config: GoodConfig, split: Split = "train") -> None:
        super().__init__(config, split)
        self.first = 0


class NoTestSplit(Good):
    """Noise; keeps every rule."""

    def __init__(self, config: GoodConfig, split: Split = "train") -> None:
        if split == "test":
            raise DataError("data: there is no test split; give other data")
        super().__init__(config, split)


class Encoded(Good):
    """Noise behind encoded bytes; keeps every rule."""

    def encoded(self, index: int) -> bytes:
        Image.fromarray(Good.read(self, index).permute(1, 2, 0).numpy()).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    def read(self, index: int) -> Tensor:
        return decode_rgb(self.encoded(index), self.describe(index))


class OtherThanEncoded(Encoded):
    """Noise."""

    def read(self, index: int) -> Tensor:
        return super().read(index).flip(2)


class PillowsError(Encoded):
    """Noise."""

    def read(self, index: int) -> Tensor:
        Image.open(io.BytesIO(self.encoded(index))).load()
        return super().read(index)


class SmallMask(Good):
    """Noise."""

    def mask(self, index: int) -> Tensor:
        return torch.zeros(4, 4, dtype=torch.uint8)


class MaskBeyondClasses(Good):
    """Noise."""

    def mask(self, index: int) -> Tensor:
        return torch.full((8, 10), 3, dtype=torch.uint8)


class BoxBeyondImage(Good):
    """Noise."""

    def boxes(self, index: int) -> Tensor:
        return torch.tensor([[0.0, 0.0, 11.0, 8.0]])


class OpenFile(Good):
    """Noise."""

    def __init__(self, config: GoodConfig, split: Split = "train") -> None:
        super().__init__(config, split)
        self.file = open(__file__, "rb")  # noqa: SIM115 - that is the fault
