"""Texts for both stages: sentences for a language model, and two classes of texts to tell apart.

``pydoc`` needs no file: it is the English prose of the help pages that Python itself ships in
``pydoc_data.topics``. Pretraining reads sentences; finetuning tells other sentences of these pages
from sentences whose words have been put in a random order. The pages are those of the Python that
runs.

``news`` is the same with sentences of the One Billion Word benchmark.

``gop`` is the paper's pair: pretraining reads sentences of the One Billion Word benchmark,
finetuning tells positive from negative tweets about the first debate of the Republican candidates
in August 2015. The files of both come from the folder named by the environment variable
``MSIF_DATA``, packed by gzip (``.gz``) or as they are:

- ``obw/`` with the shards of :data:`NEWS_MD5`, ``news.en.heldout-00000-of-00050.txt`` and so on;
- ``gop/Sentiment.csv``.

Every file is verified by the md5 of its content each time it is read.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import html
import io
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msif_lib.study.data.datasets import DataFileError, data_folder

NAMES = ("pydoc", "news", "gop")

# md5 of the content; those of the news are in the benchmark's own list of checksums.
NEWS_MD5 = {
    "news.en.heldout-00000-of-00050": "ce1e84fb6d856ced56ba2c551104f6ac",
    "news.en.heldout-00010-of-00050": "36b9b690341bfb89239d9c656cce8c5a",
    "news.en.heldout-00011-of-00050": "13b0479e328f0d4ea7274845eff37e2c",
    "news.en.heldout-00012-of-00050": "f140e0524571c2b550e7896394b360e3",
    "news.en.heldout-00013-of-00050": "62fb44371855e100c3ad8efadb385517",
}
TWEETS_MD5 = "599989ae4f146aecb82dcfba212c97a1"

_HOW_NEWS = (
    "take the shards from heldout-monolingual.tokenized.shuffled/ of the One Billion Word "
    "benchmark (https://www.statmt.org/lm-benchmark/) and put them into obw/ of the folder "
    "MSIF_DATA, each as <name>.txt or <name>.txt.gz"
)
_HOW_TWEETS = (
    "take Sentiment.csv of the data set crowdflower/first-gop-debate-twitter-sentiment "
    "(https://www.kaggle.com, where it needs an account) and put it into gop/ of the folder "
    "MSIF_DATA, as Sentiment.csv or Sentiment.csv.gz"
)

# Grammar, interpreter sessions, tables and programs.
_NO_PROSE = re.compile(r"::=|>>>|^\+[-=]|\||::\s")
_ITEM_MARK = re.compile(r"^(\*|\d+\.|\(\d+\)|\[\d+\])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"“(]?[A-Z])")
_TOKEN = re.compile(r"https?://\S+|[@#]\w+|\w+(?:['’.,:-]\w+)*|[^\w\s]")
_LINK = re.compile(r"https?\S*")
_RETWEET = re.compile(r"^(?:\W*(?:RT\s+)?@\w+:?)+")
# Letters in which two tweets must differ: copies differ in their links and in where they are cut.
_TWEET_START = 40


@dataclass(frozen=True)
class Text:
    """A text and its tokens."""

    text: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Texts for both stages.

    Attributes
    ----------
    name
        One of :data:`NAMES`.
    sentences
        For pretraining, all different.
    classes
        Texts of each class of the finetuning task, all different.
    class_names
        Name of each class.
    source
        What the texts are, in words.
    """

    name: str
    sentences: tuple[Text, ...]
    classes: tuple[tuple[Text, ...], ...]
    class_names: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class TwoStageTexts:
    """A division of a corpus; no text is in two of the three sets.

    Attributes
    ----------
    corpus
        What was divided.
    pretrain
        Sentences of pretraining.
    finetune, test
        Texts of the finetuning task.
    finetune_labels, test_labels
        Their classes, int64, ``(n,)`` and ``(T,)``.
    """

    corpus: Corpus
    pretrain: tuple[Text, ...]
    finetune: tuple[Text, ...]
    test: tuple[Text, ...]
    finetune_labels: Tensor
    test_labels: Tensor


def tokenise(text: str) -> tuple[str, ...]:
    """Words, numbers, links, @names and #tags, and every other mark by itself."""
    return tuple(_TOKEN.findall(text))


def _distinct(texts: Iterator[str], tokens: Callable[[str], Sequence[str]]) -> tuple[Text, ...]:
    return tuple(Text(text, tuple(tokens(text))) for text in dict.fromkeys(texts))


# --- Python's help pages --------------------------------------------------------------------------


def prose(page: str) -> Iterator[str]:
    """Yield the English sentences of a help page, without programs, grammar and tables.

    Parameters
    ----------
    page
        Plain text whose paragraphs are separated by empty lines.

    Yields
    ------
    str
        Sentences that begin with a capital, end with a full stop, and of whose five or more
        tokens at least 70 % are words.
    """
    for block in re.split(r"\n[ \t]*\n", page):
        joined = " ".join(line.strip() for line in block.strip().split("\n"))
        joined = _ITEM_MARK.sub("", joined)
        if _NO_PROSE.search(joined):
            continue
        for sentence in _SENTENCE_END.split(joined):
            tokens = tokenise(sentence)
            words = sum(token.isalpha() for token in tokens)
            complete = sentence[:1].isupper() and sentence.endswith(".")
            if complete and len(tokens) >= 5 and words >= 0.7 * len(tokens):
                yield sentence


def _load_pydoc() -> Corpus:
    from pydoc_data.topics import topics

    pages = (topics[name] for name in sorted(topics))
    return _against_shuffled_words(
        "pydoc",
        _distinct((text for page in pages for text in prose(page)), tokenise),
        "the prose of Python's own help pages (pydoc_data.topics)",
    )


def _against_shuffled_words(name: str, sentences: tuple[Text, ...], source: str) -> Corpus:
    """Sentences for pretraining, and of them one half as they are and one with words shuffled."""
    # Always the same half in always the same disorder: seeds draw from it, and no sentence is in
    # both classes.
    rng = np.random.default_rng(0)
    halves = np.split(rng.permutation(len(sentences)), [len(sentences) // 2])
    ordered = tuple(sentences[index] for index in halves[0])
    return Corpus(
        name=name,
        sentences=sentences,
        classes=(ordered, tuple(_shuffled(sentences[index], rng) for index in halves[1])),
        class_names=("sentence", "shuffled words"),
        source=source,
    )


def _shuffled(sentence: Text, rng: np.random.Generator) -> Text:
    """The tokens of a sentence, not all alike, in another order."""
    tokens = sentence.tokens
    while tokens == sentence.tokens:
        tokens = tuple(sentence.tokens[index] for index in rng.permutation(len(tokens)))
    return Text(" ".join(tokens), tokens)


# --- news and tweets ------------------------------------------------------------------------------


def _content(path: Path, md5: str, how: str) -> str:
    """Text of a file, packed or not, whose md5 is right."""
    packed = path.with_name(path.name + ".gz")
    found = next((candidate for candidate in (packed, path) if candidate.exists()), None)
    if found is None:
        raise DataFileError(f"{path} (or {packed.name}) is missing; {how}")
    try:
        content = found.read_bytes()
        if found == packed:
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{found} is broken or half-downloaded ({error}); {how}") from error
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != md5:
        raise DataFileError(
            f"{found} is broken or half-downloaded: its content has {len(content)} bytes and md5 "
            f"{got}, expected md5 {md5}; {how}"
        )
    return content.decode("utf-8")


def _read_news(folder: Path) -> Iterator[str]:
    for shard, md5 in NEWS_MD5.items():
        yield from _content(folder / "obw" / f"{shard}.txt", md5, _HOW_NEWS).splitlines()


def tweet_start(text: str) -> str:
    """What copies of a tweet have in common: its first letters and digits, without links.

    Parameters
    ----------
    text
        A tweet, perhaps a retweet (``RT @name: ...``) cut short.

    Returns
    -------
    str
        At most 40 lower-case letters and digits.
    """
    bare = _LINK.sub("", _RETWEET.sub("", text))
    return "".join(char for char in bare.lower() if char.isalnum())[:_TWEET_START]


def _read_tweets(folder: Path) -> dict[str, list[str]]:
    """Positive and negative tweets, one of all copies, where most of the copies agree."""
    content = _content(folder / "gop" / "Sentiment.csv", TWEETS_MD5, _HOW_TWEETS)
    copies: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(content, newline="")):
        text = html.unescape(row["text"])
        copies[tweet_start(text)].append((row["sentiment"], text))
    found: dict[str, list[str]] = {"Negative": [], "Positive": []}
    for rows in copies.values():
        label, votes = Counter(sentiment for sentiment, _ in rows).most_common(1)[0]
        if label in found and 2 * votes > len(rows):
            found[label].append(next(text for sentiment, text in rows if sentiment == label))
    return found


def _folder(how: str) -> Path:
    folder = data_folder()
    if folder is None:
        raise DataFileError(f"MSIF_DATA is not set, and these texts are not downloaded: {how}")
    return folder


def _news(folder: Path) -> tuple[Text, ...]:
    """The news, which come as tokens already, separated by spaces."""
    return _distinct(_read_news(folder), str.split)


def _load_news() -> Corpus:
    sentences = tuple(text for text in _news(_folder(_HOW_NEWS)) if len(set(text.tokens)) > 1)
    return _against_shuffled_words("news", sentences, "sentences of the One Billion Word benchmark")


def _load_gop() -> Corpus:
    folder = _folder(f"{_HOW_NEWS}; {_HOW_TWEETS}")
    tweets = _read_tweets(folder)
    return Corpus(
        name="gop",
        sentences=_news(folder),
        classes=tuple(_distinct(iter(tweets[name]), tokenise) for name in tweets),
        class_names=tuple(name.lower() for name in tweets),
        source="sentences of the One Billion Word benchmark, and tweets about a debate",
    )


# --- division into two stages ---------------------------------------------------------------------

_LOADERS: dict[str, Callable[[], Corpus]] = {
    "pydoc": _load_pydoc,
    "news": _load_news,
    "gop": _load_gop,
}


def load_texts(name: str) -> Corpus:
    """Load a corpus.

    Parameters
    ----------
    name : {"pydoc", "news", "gop"}
        The corpus.

    Returns
    -------
    Corpus
        Its texts. Of tweets that are copies of each other one is kept, with the label of most of
        them; where no label has more than half, none.

    Raises
    ------
    ValueError
        There is no corpus of that name.
    DataFileError
        A file is missing, broken or half-downloaded; the message says how to get it.
    """
    if name not in _LOADERS:
        raise ValueError(f"dataset must be one of {NAMES}, not {name!r}")
    return _LOADERS[name]()


def two_stage_texts(
    name: str = "pydoc",
    pretrain_size: int = 150,
    finetune_size: int = 160,
    test_size: int = 100,
    longest: int = 16,
    seed: int = 0,
    finetune_longest: int | None = None,
) -> TwoStageTexts:
    """Draw sentences for pretraining and texts for finetuning and test.

    Parameters
    ----------
    name : {"pydoc", "news", "gop"}
        The corpus.
    pretrain_size
        Sentences of pretraining.
    finetune_size, test_size
        Texts, of each class equally many.
    longest
        Tokens of a text at most; none has fewer than 5.
    seed
        Of the draw.
    finetune_longest
        Tokens of a text of finetuning or test at most; None: `longest`.

    Returns
    -------
    TwoStageTexts
        The three sets. No text is in two of them, nor its words in another order.

    Raises
    ------
    ValueError
        A size that is more than there is, or no multiple of the number of classes; `longest` or
        `finetune_longest` below 5; no such corpus.
    DataFileError
        As :func:`load_texts`.
    """
    finetune_longest = longest if finetune_longest is None else finetune_longest
    for argument, size in (("longest", longest), ("finetune_longest", finetune_longest)):
        if size < 5:
            raise ValueError(f"{argument} must be at least 5 tokens, not {size}")
    corpus = load_texts(name)
    count = len(corpus.classes)
    for argument, size in (("finetune_size", finetune_size), ("test_size", test_size)):
        if size < count or size % count:
            raise ValueError(f"{argument} must be a multiple of the {count} classes, not {size}")
    rng = np.random.default_rng(seed)

    def fits(text: Text, most: int) -> bool:
        return 5 <= len(text.tokens) <= most

    drawn: dict[str, list[tuple[Text, int]]] = {"finetune": [], "test": []}
    for label, name_of_class in enumerate(corpus.class_names):
        texts = [text for text in corpus.classes[label] if fits(text, finetune_longest)]
        wanted = {"finetune": finetune_size // count, "test": test_size // count}
        if sum(wanted.values()) > len(texts):
            raise ValueError(
                f"finetune_size and test_size ask for {sum(wanted.values())} texts of the class "
                f"{name_of_class!r}, but there are only {len(texts)} of 5 to "
                f"{finetune_longest} tokens"
            )
        order = iter(rng.permutation(len(texts)).tolist())
        for which, number in wanted.items():
            drawn[which] += [(texts[next(order)], label) for _ in range(number)]
    # A sentence and its words in another order are the same here.
    taken = {tuple(sorted(text.tokens)) for pairs in drawn.values() for text, _ in pairs}
    pool = [
        text
        for text in corpus.sentences
        if fits(text, longest) and tuple(sorted(text.tokens)) not in taken
    ]
    if not 1 <= pretrain_size <= len(pool):
        raise ValueError(
            f"pretrain_size is {pretrain_size}; there are {len(pool)} sentences of 5 to {longest} "
            "tokens that are not in the finetuning task"
        )
    chosen = rng.permutation(len(pool))[:pretrain_size]

    def part(which: str) -> tuple[tuple[Text, ...], Tensor]:
        pairs = [drawn[which][index] for index in rng.permutation(len(drawn[which]))]
        return tuple(text for text, _ in pairs), torch.tensor([label for _, label in pairs])

    (finetune, finetune_labels), (test, test_labels) = part("finetune"), part("test")
    return TwoStageTexts(
        corpus=corpus,
        pretrain=tuple(pool[index] for index in chosen),
        finetune=finetune,
        test=test,
        finetune_labels=finetune_labels,
        test_labels=test_labels,
    )


def bm25(
    queries: Sequence[Sequence[str]],
    documents: Sequence[Sequence[str]],
    k1: float = 1.2,
    b: float = 0.75,
) -> Tensor:
    """Relevance of documents to queries by shared words (Robertson & Zaragoza 2009).

    Parameters
    ----------
    queries, documents
        T and m lists of tokens; upper and lower case are the same.
    k1, b
        How soon repetitions stop to count, and how much length does.

    Returns
    -------
    Tensor
        ``(m, T)``, float64.
    """
    counts = [Counter(token.lower() for token in document) for document in documents]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)
    spread = Counter(token for count in counts for token in count)
    found = torch.zeros(len(documents), len(queries), dtype=torch.float64)
    for column, query in enumerate(queries):
        for token in {token.lower() for token in query} & spread.keys():
            rarity = math.log(1 + (len(documents) - spread[token] + 0.5) / (spread[token] + 0.5))
            for row, count in enumerate(counts):
                if token in count:
                    damped = count[token] + k1 * (1 - b + b * lengths[row] / mean)
                    found[row, column] += rarity * count[token] * (k1 + 1) / damped
    return found
