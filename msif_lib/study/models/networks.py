"""The study's networks: tanh embeddings and the heads that sit on them.

Influence functions need a loss with two derivatives, hence tanh and average pooling where most
networks have rectifiers and maxima. The networks are small enough that both stages can be
retrained to an optimum hundreds of times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msif_lib.study.own import is_own, own_function

ARCHITECTURES = ("cnn", "mlp")
HEADS = ("linear", "mlp")

# Up to this many input pixels the matrix form of a convolution is the faster one.
_MATRIX_PIXELS = 64


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules from this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class PooledConv2d(nn.Conv2d):
    """A stride-one convolution followed by 2 x 2 average pooling, as one linear map.

    Parameters, their names, shapes and initialisation are those of ``nn.Conv2d``, and the output
    is that of ``nn.Conv2d(..., padding=kernel_size // 2)`` followed by ``nn.AvgPool2d(2)``, up to
    rounding. Both steps are linear, so on a small image the pair is written as one matrix, made
    from the kernel by a fixed basis, and applied as a matrix product. ``torch.func.vmap`` over
    models then sees products of matrices only; for 8 x 8 images this is about four times as fast
    as a grouped convolution followed by pooling. On a larger image the pair is one convolution of
    stride two, whose kernel is a side longer: the mean of the four shifts of the original. With
    16 models of 28 x 28 or 32 x 32 images it is about three times as fast as the two steps. Where
    it looks at the images themselves, its patches are cut out once for all models and meet the
    kernels in one product of matrices: as fast for many models, for a single one two to three
    times as fast in products with the Hessian.

    Parameters
    ----------
    in_channels, out_channels : int
        Numbers of channels.
    kernel_size : int
        Side of the square kernel, odd.
    image_size : tuple of int
        Height and width of the inputs, each at least 2. As in ``nn.AvgPool2d``, an odd last row
        or column is left out of the pooling.
    first : bool
        Whether the inputs are the images, the same for all models.

    Raises
    ------
    ValueError
        If the kernel size is even or the image is smaller than 2 x 2.
    """

    basis: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        image_size: tuple[int, int],
        first: bool = False,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if min(image_size) < 2:
            raise ValueError(f"image_size must be at least (2, 2) to be pooled, got {image_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        height, width = image_size
        self.image_size, self.first = (height, width), first
        self.pooled_size = (height // 2, width // 2)
        basis = None
        if height * width <= _MATRIX_PIXELS:
            # Response of each output pixel to each input pixel, one kernel entry at a time.
            taps = kernel_size**2
            pixels = torch.eye(height * width).reshape(-1, 1, height, width)
            kernels = torch.eye(taps).reshape(taps, 1, kernel_size, kernel_size)
            response = F.avg_pool2d(F.conv2d(pixels, kernels, padding=kernel_size // 2), 2)
            basis = response.flatten(2).permute(1, 2, 0).flatten(1).to(self.weight)
        # Not persistent: the state is that of nn.Conv2d.
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve and pool.

        Parameters
        ----------
        input : Tensor
            Images, shape (B, in_channels, height, width).

        Returns
        -------
        Tensor
            Shape (B, out_channels, height // 2, width // 2).

        Raises
        ------
        ValueError
            If the images are not of the layer's size.
        """
        if input.shape[-2:] != self.image_size:
            raise ValueError(
                f"input images are {tuple(input.shape[-2:])}, the layer was made for "
                f"{self.image_size}"
            )
        if self.basis is None:
            kernel = F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, 1)
            if self.first:
                return self._on_patches(input, kernel)
            return F.conv2d(input, kernel, self.bias, stride=2, padding=self.padding)
        channels_out, channels_in = self.weight.shape[:2]
        pixels = input.shape[-2] * input.shape[-1]
        pooled = self.basis.shape[1] // pixels
        matrix = (self.weight.flatten(2) @ self.basis).unflatten(-1, (pooled, pixels))
        matrix = matrix.transpose(1, 2).reshape(channels_out * pooled, channels_in * pixels)
        assert self.bias is not None
        bias = self.bias[:, None].expand(channels_out, pooled).flatten()
        return F.linear(input.flatten(1), matrix, bias).unflatten(
            -1, (channels_out, *self.pooled_size)
        )

    def _on_patches(self, input: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of stride two as one matrix product over the patches of all images."""
        (height, width), (rows, columns) = self.image_size, self.pooled_size
        before, taps = self.kernel_size[0] // 2, kernel.shape[-1] // 2
        # What lies beyond an odd last row or column is cut off: a padding below zero.
        right, below = (
            2 * (pooled - 1 + taps) - before - size
            for pooled, size in ((columns, width), (rows, height))
        )
        # Four pixels become four channels, and the stride one.
        fine = F.pixel_unshuffle(F.pad(input, (before, right, before, below)), 2).transpose(0, 1)
        patches = torch.cat(
            [
                fine[:, :, i : i + rows, j : j + columns]
                for i, j in itertools.product(range(taps), repeat=2)
            ]
        )
        matrix = F.pixel_unshuffle(kernel, 2).permute(0, 2, 3, 1).flatten(1)
        assert self.bias is not None
        flat = matrix @ patches.flatten(1) + self.bias[:, None]
        return flat.unflatten(-1, (len(input), rows, columns)).transpose(0, 1)


def _pixels(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Image shape as (channels, height, width), checked."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), got {image_shape}")
    channels, height, width = image_shape
    return int(channels), int(height), int(width)


def tanh_cnn(
    image_shape: Sequence[int],
    channels: Sequence[int] = (6, 8),
    kernel_size: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Convolutional tanh embedding: convolution, 2 x 2 average pooling, tanh, for each layer.

    Pooling stands before the squashing, as in LeNet-5: the two linear steps become one
    (`PooledConv2d`) and a quarter of the tanhs remain. With the defaults the embedding has 500
    parameters and 32 features on 8 x 8 grey images, 500 and 392 on 28 x 28 grey ones, 608 and
    512 on 32 x 32 colour ones.

    Parameters
    ----------
    image_shape : sequence of int
        (channels, height, width) of the inputs.
    channels : sequence of int
        Channels after each convolution.
    kernel_size : int
        Side of the kernels, odd.
    seed : int
        Seed of the initialisation; the global generator is left as it was.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    nn.Sequential
        Maps (B, channels, height, width) to (B, features).

    Raises
    ------
    ValueError
        If the image is too small for the number of poolings, or an argument is malformed.
    """
    in_channels, height, width = _pixels(image_shape)
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"image_shape {tuple(image_shape)} is too small for {len(channels)} poolings; "
            "give fewer channels"
        )
    with seeded(seed):
        layers: list[nn.Module] = []
        for out_channels in channels:
            size, first = (height, width), not layers
            layers.append(PooledConv2d(in_channels, out_channels, kernel_size, size, first))
            layers.append(nn.Tanh())
            in_channels, height, width = out_channels, height // 2, width // 2
        layers.append(nn.Flatten())
        return nn.Sequential(*layers).to(dtype)


def tanh_mlp(
    image_shape: Sequence[int],
    hidden: Sequence[int] = (8, 8),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Fully connected tanh embedding.

    Parameters
    ----------
    image_shape : sequence of int
        (channels, height, width) of the inputs.
    hidden : sequence of int
        Widths of the layers; the last is the number of features.
    seed : int
        Seed of the initialisation; the global generator is left as it was.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    nn.Sequential
        Maps (B, channels, height, width) to (B, hidden[-1]).

    Raises
    ------
    ValueError
        If `hidden` is empty or the image shape malformed.
    """
    channels, height, width = _pixels(image_shape)
    if not hidden:
        raise ValueError("hidden must name at least one layer width")
    with seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        in_features = channels * height * width
        for out_features in hidden:
            layers += [nn.Linear(in_features, out_features), nn.Tanh()]
            in_features = out_features
        return nn.Sequential(*layers).to(dtype)


def linear_head(
    in_features: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Linear:
    """Linear classifier on the features, (B, in_features) to (B, classes).

    Parameters
    ----------
    in_features, classes : int
        Sizes.
    seed : int
        Seed of the initialisation; the global generator is left as it was.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    nn.Linear
        The head.
    """
    with seeded(seed):
        return nn.Linear(in_features, classes).to(dtype)


def mlp_head(
    in_features: int,
    hidden: int,
    classes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Classifier with one tanh layer, (B, in_features) to (B, classes).

    Parameters
    ----------
    in_features, hidden, classes : int
        Sizes.
    seed : int
        Seed of the initialisation; the global generator is left as it was.
    dtype : torch.dtype
        Of the parameters.

    Returns
    -------
    nn.Sequential
        The head.
    """
    with seeded(seed):
        return nn.Sequential(
            nn.Linear(in_features, hidden), nn.Tanh(), nn.Linear(hidden, classes)
        ).to(dtype)


def feature_count(embedding: nn.Module, image_shape: Sequence[int]) -> int:
    """Count the features that an embedding gives for one image.

    Parameters
    ----------
    embedding : nn.Module
        Maps (B, channels, height, width) to (B, features).
    image_shape : sequence of int
        (channels, height, width).

    Returns
    -------
    int
        The number of features.
    """
    parameter = next(embedding.parameters())
    with torch.no_grad():
        return int(embedding(parameter.new_zeros(1, *image_shape)).shape[1])


def _own_embedding(
    architecture: str, image_shape: Sequence[int], widths: Sequence[int] | None
) -> nn.Module:
    """Make the user's embedding and see what it gives for two images."""
    embedding = own_function("architecture", architecture)(tuple(image_shape), widths)
    wanted = f"architecture = {architecture!r} must return an nn.Module with parameters"
    if not isinstance(embedding, nn.Module) or not list(embedding.parameters()):
        raise ValueError(f"{wanted}, got {type(embedding).__name__}")
    parameter = next(embedding.parameters())
    try:
        with torch.no_grad():
            shape = tuple(embedding(parameter.new_zeros(2, *image_shape)).shape)
    except RuntimeError as error:
        raise ValueError(f"{wanted} that takes images of {tuple(image_shape)}: {error}") from error
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"{wanted} that gives (B, features), got {shape} for two images")
    return embedding


def build_model(
    architecture: str,
    head: str,
    image_shape: Sequence[int],
    pretrain_classes: int,
    finetune_classes: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    widths: Sequence[int] | None = None,
    head_hidden: int = 8,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Embedding and the heads of both stages, each initialised from its own seed.

    Parameters
    ----------
    architecture : {"cnn", "mlp"} or "module:function"
        The embedding: `tanh_cnn`, `tanh_mlp`, or what a function of the user's makes of
        `image_shape` and `widths`: a module from (B, channels, height, width) to (B, features).
    head : {"linear", "mlp"}
        Kind of both heads: `linear_head` or `mlp_head`.
    image_shape : sequence of int
        (channels, height, width).
    pretrain_classes, finetune_classes : int
        Number of classes of each stage.
    seed : int
        The three modules take seeds 3 seed, 3 seed + 1 and 3 seed + 2.
    dtype : torch.dtype
        Of all parameters.
    widths : sequence of int, optional
        Channels of the convolutions, or units of the hidden layers; by default those of
        `tanh_cnn` and `tanh_mlp`.
    head_hidden : int
        Width of the hidden layer of an "mlp" head.

    Returns
    -------
    tuple of nn.Module
        Embedding, pretraining head, finetuning head.

    Raises
    ------
    ValueError
        If the architecture or the head is not one of those named, or the user's function makes
        something else.
    """
    embedding: nn.Module
    if is_own(architecture):
        with seeded(3 * seed):
            embedding = _own_embedding(architecture, image_shape, widths).to(dtype)
    elif architecture == "cnn":
        embedding = tanh_cnn(image_shape, widths or (6, 8), seed=3 * seed, dtype=dtype)
    elif architecture == "mlp":
        embedding = tanh_mlp(image_shape, widths or (8, 8), seed=3 * seed, dtype=dtype)
    else:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}")
    features = feature_count(embedding, image_shape)

    def make_head(classes: int, head_seed: int) -> nn.Module:
        if head == "linear":
            return linear_head(features, classes, head_seed, dtype)
        if head == "mlp":
            return mlp_head(features, head_hidden, classes, head_seed, dtype)
        raise ValueError(f"head must be one of {HEADS}, got {head!r}")

    return (
        embedding,
        make_head(pretrain_classes, 3 * seed + 1),
        make_head(finetune_classes, 3 * seed + 2),
    )
