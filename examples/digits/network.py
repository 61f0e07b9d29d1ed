"""The network."""

from collections import OrderedDict

import torch
from torch import nn

from digits.data import NUM_CLASSES


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU. `update_bn` finds batch norms by the "bn" in their names."""
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels_out), relu=nn.ReLU(inplace=True)))


def network(width: int) -> nn.Module:
    """A small convolutional network for 8 x 8 images."""
    net = nn.Sequential(
        block(1, width),
        block(width, 2 * width, stride=2),
        block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, NUM_CLASSES),
    )
    return net.to(memory_format=torch.channels_last)  # on CPUs a third faster at this size
