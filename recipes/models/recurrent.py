"""A classifier that reads an image row by row."""

from __future__ import annotations

from torch import Tensor, nn


class Rows(nn.Module):
    """An LSTM with the image's rows as steps, and a linear layer of its last state; torch.nn's initialisation."""

    def __init__(self, channels: int, size: int, classes: int, units: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels * size, units, batch_first=True)
        self.head = nn.Linear(units, classes)

    def forward(self, images: Tensor) -> Tensor:
        _, (last, _) = self.lstm(images.transpose(1, 2).flatten(2))
        return self.head(last[-1])
