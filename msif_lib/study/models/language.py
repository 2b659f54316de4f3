"""A bidirectional language model in ELMo's form, and the heads of both its stages.

Characters make a token, by convolutions and highway layers; two layers of recurrence run over the
tokens, one chain from the left and one from the right (Peters et al. 2018,
`arXiv:1802.05365 <https://arxiv.org/abs/1802.05365>`_). Pretraining predicts the next token from
the left chain and the previous one from the right chain with one shared softmax; finetuning mixes
the layers, averages over the tokens and classifies.

Fused recurrent kernels have neither second derivatives nor forward mode; the recurrence of
:mod:`msif_lib.study.models.recurrence` has both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msif_lib.study.models.networks import seeded
from msif_lib.study.models.recurrence import chains, chains_plainly

# Token ids. The padding token is also the one that losses leave out.
PADDING, START, END, UNKNOWN = range(4)
_SPECIAL = ("<pad>", "<S>", "</S>", "<UNK>")

# Character ids, those of the published ELMo: bytes are 1 to 256, 0 is a padding token's.
CHARACTERS = 262
_START_CHARACTER, _END_CHARACTER, _WORD_START, _WORD_END, _WORD_PADDING = range(257, 262)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the embedding.

    Parameters
    ----------
    character_width
        Length of a character's vector.
    filters
        Pairs (characters spanned, number of filters) of the convolutions.
    highways
        Number of highway layers.
    projection
        Length of a token's vector, and of a chain's output.
    cells
        Memory cells of a chain in each layer.
    layers
        Layers of recurrence.
    """

    character_width: int
    filters: tuple[tuple[int, int], ...]
    highways: int
    projection: int
    cells: int
    layers: int = 2


_ELMO_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))

#: Sizes by name; ``"elmo"`` is the published original, 93,600,864 parameters.
SIZES = {
    "tiny": Sizes(4, ((1, 4), (2, 4), (3, 8)), 1, 8, 16),
    "small": Sizes(8, ((1, 16), (2, 16), (3, 32), (4, 32)), 1, 32, 128),
    "middle": Sizes(16, _ELMO_FILTERS[:6], 2, 128, 1024),
    "elmo": Sizes(16, _ELMO_FILTERS, 2, 512, 4096),
}


# --- text to numbers ------------------------------------------------------------------------------


class Vocabulary:
    """The tokens that the language model predicts, most frequent first.

    Parameters
    ----------
    sentences
        Sentences as lists of tokens.
    size
        Most entries, the four special ones (padding, start, end, unknown) included; None for all.

    Raises
    ------
    ValueError
        `size` leaves no room for a token.
    """

    def __init__(self, sentences: Iterable[Sequence[str]], size: int | None = None) -> None:
        if size is not None and size <= len(_SPECIAL):
            raise ValueError(f"size must exceed the {len(_SPECIAL)} special entries, not {size}")
        counts = Counter(token for sentence in sentences for token in sentence)
        # Ties in alphabetical order: the ids depend on the text alone.
        ordered = sorted(counts, key=lambda token: (-counts[token], token))
        self.tokens = [*_SPECIAL, *ordered][:size]
        self._ids = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Token ids ``(N, L)``, with start and end, padded to the longest sentence."""
        rows = [
            [START, *(self._ids.get(token, UNKNOWN) for token in sentence), END]
            for sentence in sentences
        ]
        return _padded(rows, PADDING)


def encode_characters(
    sentences: Sequence[Sequence[str]], characters: int = 50
) -> dict[str, Tensor]:
    """Sentences as the embedding's inputs.

    Parameters
    ----------
    sentences
        Sentences as lists of tokens, without start and end, which are added.
    characters
        Characters kept of a token (bytes of its UTF-8 form), its two boundaries included.

    Returns
    -------
    dict
        ``"characters"``, ids ``(N, L, characters)``, and ``"lengths"``, tokens ``(N,)``.

    Raises
    ------
    ValueError
        `characters` is below 3.
    """
    if characters < 3:
        raise ValueError(f"characters must be at least 3, not {characters}")

    def word(inner: Iterable[int]) -> list[int]:
        ids = [*[_WORD_START, *inner][: characters - 1], _WORD_END]
        return ids + [_WORD_PADDING] * (characters - len(ids))

    def token(text: str) -> list[int]:
        return word(byte + 1 for byte in text.encode("utf-8"))

    start, end = word([_START_CHARACTER]), word([_END_CHARACTER])
    rows = [[start, *map(token, sentence), end] for sentence in sentences]
    lengths = torch.tensor([len(row) for row in rows])
    return {"characters": _padded(rows, [0] * characters), "lengths": lengths}


def _padded(rows: list[list], filling: int | list[int]) -> Tensor:
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])


# --- the embedding --------------------------------------------------------------------------------


class _Convolution(nn.Conv1d):
    """Convolve tokens' characters ``(B, C, width)`` to ``(B, C − span + 1, filters)``.

    As one matrix product: torch's own convolution takes short sequences one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        (span,) = self.kernel_size
        positions = input.shape[1] - span + 1
        windows = torch.cat([input[:, start : start + positions] for start in range(span)], 2)
        return F.linear(windows, self.weight.mT.flatten(1), self.bias)


class CharacterEncoder(nn.Module):
    """Tokens ``(..., characters)`` to vectors ``(..., projection)``, each token by itself.

    Parameters
    ----------
    sizes
        Sizes of the layers.
    smooth
        As for :class:`LanguageModel`.
    """

    def __init__(self, sizes: Sizes, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = smooth
        width = sum(count for _, count in sizes.filters)
        self.characters = nn.Embedding(CHARACTERS, sizes.character_width)
        self.convolutions = nn.ModuleList(
            _Convolution(sizes.character_width, count, span) for span, count in sizes.filters
        )
        # Each gives the new value and the gate that mixes it with the old one.
        highways = [nn.Linear(width, 2 * width) for _ in range(sizes.highways)]
        for highway in highways:
            nn.init.constant_(highway.bias[width:], 1.0)  # carry at first
        self.highways = nn.ModuleList(highways)
        self.projection = nn.Linear(width, sizes.projection)

    def forward(self, characters: Tensor) -> Tensor:
        """Encode character ids ``(..., C)`` as ``(..., projection)``."""
        x = self.characters(characters.flatten(0, -2))
        # The largest response over the positions in the token.
        responses = [layer(x) for layer in self.convolutions]
        bend: Callable[[Tensor], Tensor]
        if self.smooth:
            bend = torch.tanh
            largest = [each.logsumexp(1) - math.log(each.shape[1]) for each in responses]
        else:
            bend = F.relu
            largest = [each.max(1).values for each in responses]
        x = bend(torch.cat(largest, 1))
        for highway in self.highways:
            new, carry = highway(x).chunk(2, 1)
            x = torch.lerp(bend(new), x, carry.sigmoid())
        return self.projection(x).unflatten(0, characters.shape[:-1])


class Chains(nn.Module):
    """One layer of two LSTM chains with projected outputs, each chain over its own inputs.

    What ``nn.LSTM(inputs, cells, proj_size=projection)`` computes (Sak et al. 2014), twice side
    by side, with one bias instead of two. The gates stand in the order input, forget, output,
    cell; torch has the last two the other way round.

    Parameters
    ----------
    inputs, cells, projection
        Lengths of the inputs, of the memory and of the outputs.
    clip
        Bound on memory and outputs (ELMo was trained with 3). None for none: a clipped value
        has no derivative at the bound and none of use beyond it.
    """

    def __init__(self, inputs: int, cells: int, projection: int, clip: float | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.input_weight = nn.Parameter(torch.empty(2, 4 * cells, inputs))
        self.state_weight = nn.Parameter(torch.empty(2, 4 * cells, projection))
        self.bias = nn.Parameter(torch.zeros(2, 4 * cells))
        self.projection_weight = nn.Parameter(torch.empty(2, projection, cells))
        for weight in (self.input_weight, self.state_weight, self.projection_weight):
            nn.init.uniform_(weight, -1 / math.sqrt(cells), 1 / math.sqrt(cells))
        nn.init.constant_(self.bias[:, cells : 2 * cells], 1.0)  # remember at first

    def forward(self, x: Tensor) -> Tensor:
        """Run both chains from first to last: ``(2, L, B, inputs)`` to ``(2, L, B, projection)``.

        The inputs' share of the gates is one product for all steps.
        """
        shares = torch.baddbmm(self.bias[:, None], x.flatten(1, 2), self.input_weight.mT)
        shares = shares.unflatten(1, x.shape[1:3])
        if self.clip is None:
            return chains(shares, self.state_weight, self.projection_weight)
        return chains_plainly(shares, self.state_weight, self.projection_weight, self.clip)[0]


class LanguageModel(nn.Module):
    """The embedding W: token encoder and two-chain recurrence.

    Parameters
    ----------
    sizes
        Sizes of the layers; :data:`SIZES` has four.
    clip
        As for :class:`Chains`.
    seed
        Seed of the initialisation; the global generator is left as it was.
    dtype
        Of the parameters.
    smooth
        In the token encoder take tanh for ELMo's rectifiers and, for the maximum over the
        positions, the logarithm of the mean of exponentials. Rectifiers and maxima have kinks, and
        training ends on them, where no gradient vanishes.
    """

    def __init__(
        self,
        sizes: Sizes = SIZES["small"],
        clip: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        with seeded(seed):
            self.tokens = CharacterEncoder(sizes, smooth)
            self.layers = nn.ModuleList(
                Chains(sizes.projection, sizes.cells, sizes.projection, clip)
                for _ in range(sizes.layers)
            )
        self.to(dtype)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embed sentences.

        Parameters
        ----------
        inputs
            As from :func:`encode_characters`, of N sentences of at most L tokens.

        Returns
        -------
        dict
            ``"layers"`` ``(N, L, layers + 1, 2 projection)``, the token vectors (twice) and each
            layer's output, the left chain's beside the right chain's; and ``"lengths"`` ``(N,)``.
        """
        characters, lengths = inputs["characters"], inputs["lengths"]
        # The right chain reads each sentence backwards from its last token, so that padding comes
        # after the sentence for both chains, where it changes nothing.
        steps = torch.arange(characters.shape[1], device=lengths.device)[:, None]
        backwards = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        tokens = self.tokens(characters.transpose(0, 1))
        x = torch.stack([tokens, tokens.take_along_dim(backwards, 0)])
        outputs = [x]
        for number, layer in enumerate(self.layers):
            x = layer(x) + x if number else layer(x)
            outputs.append(x)
        left, right = torch.stack(outputs, 3)
        right = right.take_along_dim(backwards[..., None], 0)
        return {"layers": torch.cat([left, right], 3).transpose(0, 1), "lengths": lengths}


# --- the heads ------------------------------------------------------------------------------------


class TokenPredictor(nn.Module):
    """The pretraining head U: a softmax over the vocabulary, shared by both chains.

    Parameters
    ----------
    projection
        Length of a chain's output.
    vocabulary
        Number of tokens.
    seed, dtype
        As for :class:`LanguageModel`.
    """

    def __init__(
        self, projection: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        with seeded(seed):
            self.scores = nn.Linear(projection, vocabulary).to(dtype)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits ``(N, L - 1, 2, vocabulary)`` for each pair of neighbours.

        The left chain predicts a pair's second token, the right chain its first.
        """
        left, right = features["layers"][:, :, -1].chunk(2, 2)
        return self.scores(torch.stack([left[:, :-1], right[:, 1:]], 2))


def language_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-sentence loss: the mean cross entropy over the tokens that either chain predicts.

    Parameters
    ----------
    outputs
        Logits of a :class:`TokenPredictor`, ``(N, L - 1, 2, vocabulary)``.
    targets
        Token ids ``(N, L)``, padded with :data:`PADDING`.

    Returns
    -------
    Tensor
        Losses ``(N,)``, in nats a token.
    """
    pairs = torch.stack([targets[:, 1:], targets[:, :-1]], 2)
    real = (targets[:, 1:] != PADDING)[..., None].expand_as(pairs)
    losses = F.cross_entropy(outputs.flatten(0, 2), pairs.flatten(), reduction="none")
    return (losses.view(pairs.shape) * real).sum((1, 2)) / real.sum((1, 2))


class SentenceClassifier(nn.Module):
    """The finetuning head Θ: a learned mix of layers, their mean over tokens, one hidden layer.

    The mix is γ Σ_j softmax(s)_j layer_j. A constant added to s changes nothing, so the Hessian
    has a flat direction there; weight decay or damping makes it definite.

    Parameters
    ----------
    projection
        Length of a chain's output.
    classes
        Number of classes.
    hidden
        Width of the hidden layer; the paper's is 64.
    layers
        Layers of recurrence.
    seed, dtype
        As for :class:`LanguageModel`.
    """

    def __init__(
        self,
        projection: int,
        classes: int = 2,
        hidden: int = 64,
        layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        with seeded(seed):
            self.mix = nn.Parameter(torch.zeros(layers + 1))
            self.gamma = nn.Parameter(torch.ones(()))
            self.classify = nn.Sequential(
                nn.Linear(2 * projection, hidden), nn.Tanh(), nn.Linear(hidden, classes)
            )
        self.to(dtype)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Logits ``(N, classes)``."""
        layers, lengths = features["layers"], features["lengths"]
        mixed = self.gamma * (self.mix.softmax(0) @ layers)
        real = torch.arange(layers.shape[1], device=lengths.device) < lengths[:, None]
        total = torch.where(real[..., None], mixed, 0.0).sum(1)
        return self.classify(total / lengths[:, None])
