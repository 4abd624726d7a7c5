"""Flax NNX layers and architectures that more than one method uses."""

from rlib.nn.adversarial import fgsm, pgd
from rlib.nn.convnet import ConvNet
from rlib.nn.convolution import Conv, avg_pool, conv, max_pool
from rlib.nn.coordinate import (
    Affine,
    Constant,
    CoordinateNetwork,
    Finer,
    FourierMLP,
    Gaussian,
    Siren,
    Wire,
)
from rlib.nn.functional import affine, cosine, sine
from rlib.nn.partitioning import logical_axes
from rlib.nn.perceptron import Perceptron
from rlib.nn.resnet import GroupNorm, ResidualBlock, ResNet, group_norm
from rlib.nn.transformer import (
    Transformer,
    causal_attention,
    next_token_loss,
    rotary,
    rotary_table,
)

__all__ = [
    "Affine",
    "Constant",
    "Conv",
    "ConvNet",
    "CoordinateNetwork",
    "Finer",
    "FourierMLP",
    "Gaussian",
    "GroupNorm",
    "Perceptron",
    "ResNet",
    "ResidualBlock",
    "Siren",
    "Transformer",
    "Wire",
    "affine",
    "avg_pool",
    "causal_attention",
    "conv",
    "cosine",
    "fgsm",
    "group_norm",
    "logical_axes",
    "max_pool",
    "next_token_loss",
    "pgd",
    "rotary",
    "rotary_table",
    "sine",
]
