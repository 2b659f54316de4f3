"""Time and memory of scoring sentences, for a language model in ELMo's form and a transformer.

    python -m benchmarks.sentences --size elmo --device cpu --threads 2

measures each model in a process of its own: a forward pass over all sentences, and the scores of
all sentences by `Stage.directional_derivatives` along one direction, both as the library runs them,
in turn; then it writes ``results/benchmarks/sentences-<size>-<device>.json``. On a GPU:

    python -m benchmarks.sentences --size elmo --device cuda --sentences 2048 --batch 256

Sentences are random tokens of one length, since time does not depend on what they say. Memory is
the peak above what the process held before the model was made (on a GPU, of torch's own
allocations), in multiples of the parameters' bytes. It holds the modules, their flat copy and the
direction, which makes three; then the activations of one batch, and for a while the gradient of one
sentence, by which forward mode is checked.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.command import make_parser, parse, record
from msif_lib import Stage
from msif_lib.study.models.language import SIZES, LanguageModel, TokenPredictor, language_loss

CHARACTERS = 50
# Width, layers and width of the hidden layer of a transformer of about the same size; the largest
# is that of BERT's base model.
TRANSFORMERS = {
    "tiny": (16, 2, 32),
    "small": (64, 3, 256),
    "middle": (256, 10, 1024),
    "elmo": (768, 12, 3072),
}


class TransformerEmbedding(nn.Module):
    """Token ids ``(N, L)`` to vectors ``(N, L, width)``, each from the tokens up to it."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) / width**0.5)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), hidden, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1], tokens.device, self.positions.dtype
        )
        return self.encoder(self.tokens(tokens) + self.positions, mask=mask)


def next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of each sentence's tokens but the first."""
    return F.cross_entropy(outputs[:, :-1].mT, targets[:, 1:], reduction="none").mean(1)


def make_stage(model: str, options: argparse.Namespace) -> Stage:
    generator = torch.Generator().manual_seed(options.seed)
    shape = options.sentences, options.length
    targets = torch.randint(4, options.vocabulary, shape, generator=generator)
    embedding: nn.Module
    inputs: Any
    if model == "language model":
        sizes = SIZES[options.size]
        embedding, head = LanguageModel(sizes), TokenPredictor(sizes.projection, options.vocabulary)
        characters = torch.randint(1, 257, (*shape, CHARACTERS), generator=generator)
        inputs = {
            "characters": characters.to(options.device),
            "lengths": torch.full(shape[:1], options.length, device=options.device),
        }
        loss: Callable[[Tensor, Tensor], Tensor] = language_loss
    else:
        width, layers, hidden = TRANSFORMERS[options.size]
        torch.manual_seed(options.seed)
        embedding = TransformerEmbedding(options.vocabulary, options.length, width, layers, hidden)
        head = nn.Linear(width, options.vocabulary)
        inputs, loss = targets.to(options.device), next_token_loss
    return Stage(
        embedding.to(options.device).eval(),
        head.to(options.device),
        loss,
        (inputs, targets.to(options.device)),
        batch_size=options.batch,
        # The batch is the one asked for.
        memory_budget=2**50,
    )


def memory(device: str) -> int:
    """Peak memory so far, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def seconds(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one model, in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        torch.backends.cudnn.allow_tf32 = options.tf32
    torch.set_num_threads(options.threads)
    before = memory(options.device)
    stage = make_stage(model, options)
    parameters = stage.embedding_size + stage.head_size
    generator = torch.Generator(options.device).manual_seed(options.seed)
    directions = torch.randn(parameters, 1, generator=generator, device=options.device)

    def forward() -> None:
        stage.example_losses()

    def scores() -> None:
        for _ in stage.directional_derivatives(directions):
            pass

    seconds(forward, options.device)
    seconds(scores, options.device)
    times = [
        (seconds(forward, options.device), seconds(scores, options.device))
        for _ in range(options.repetitions)
    ]
    forwards, scorings = zip(*times, strict=True)
    peak = memory(options.device) - before
    return {
        "model": model,
        "embedding_parameters": stage.embedding_size,
        "head_parameters": stage.head_size,
        "forward_seconds_a_sentence": statistics.median(forwards) / options.sentences,
        "scoring_seconds_a_sentence": statistics.median(scorings) / options.sentences,
        "ratio": statistics.median(score / once for once, score in times),
        "ratio_low": min(score / once for once, score in times),
        "ratio_high": max(score / once for once, score in times),
        "forward_mode": stage.can.forward_mode,
        "peak_bytes": peak,
        "peak_over_parameters": peak / (4 * parameters),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the record."""
    parser = make_parser("sentences", __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--sentences", type=int, default=32, help="sentences in all")
    parser.add_argument("--batch", type=int, default=8, help="sentences at once")
    parser.add_argument("--length", type=int, default=20, help="tokens a sentence")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the softmax")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tf32", action="store_true", help="allow TF32 products (cuda)")
    options = parse(parser, arguments)
    if options.quick:
        options.size, options.sentences, options.repetitions = "tiny", 4, 1
    models = []
    for model in ("language model", "transformer"):
        # A process each: the peak of memory is a process's own.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            models.append(pool.submit(measure, model, options).result())
        print(json.dumps(models[-1], indent=2))
    values = {"models": models, "paper_seconds_a_sentence": 0.94}
    return record(options, f"sentences-{options.size}-{options.device}", "random tokens", values)


if __name__ == "__main__":
    main()
