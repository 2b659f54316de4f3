"""The texts of both stages: what is read, what is refused, and how it is divided."""

import gzip
import hashlib
import math
import os

import pytest
import torch

from msif_lib.study.data import texts
from msif_lib.study.data.datasets import DataFileError
from msif_lib.study.data.texts import (
    bm25,
    load_texts,
    prose,
    tokenise,
    tweet_start,
    two_stage_texts,
)

REAL_DATA = os.environ.get("MSIF_DATA")

PAGE = """\
The "with" statement
********************

The statement wraps the execution of a
block.  A context manager supplies the methods that it needs. It binds:

   with_stmt ::= "with" with_stmt_contents ":" suite

* The context expression is evaluated to obtain a manager of the context.

   >>> This is no prose at all, although it ends so.

+------+ A table is no prose at all either, although it ends so.
"""

ROWS = [
    # candidate text, label; the copies differ in links, names and case
    ("RT @a: The debate was a great success for everyone tonight http://t.co/x", "Positive"),
    ("The debate was a GREAT success for everyone tonight", "Positive"),
    ("“@b: The debate was a great success for everyone tonight", "Negative"),
    ("Nobody of them said\na word about it &amp; that is all", "Negative"),
    ("What a sad evening, all in all", "Negative"),
    ("What a sad evening, all in all!", "Neutral"),
    ("Nothing to say", "Neutral"),
    ("I liked every minute of it", "Positive"),
    ("This long one has many more words than the nine kept of it", "Negative"),
]
NEWS = [
    "One sentence of the news , with tokens .",
    "Short .",
    "It 's another one of them all , is it ?",
]


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Tiny files in the places of the real ones, with their md5s."""
    (tmp_path / "gop").mkdir()
    (tmp_path / "obw").mkdir()
    quoted = [f'"{text}",{label}' for text, label in ROWS]
    tweets = "\n".join(["text,sentiment", *quoted, ""]).encode()
    (tmp_path / "gop" / "Sentiment.csv.gz").write_bytes(gzip.compress(tweets))
    news = "".join(f"{line}\n" for line in [*NEWS, NEWS[0]]).encode()
    (tmp_path / "obw" / "shard.txt").write_bytes(news)
    monkeypatch.setattr(texts, "TWEETS_MD5", md5(tweets))
    monkeypatch.setattr(texts, "NEWS_MD5", {"shard": md5(news)})
    monkeypatch.setenv("MSIF_DATA", str(tmp_path))
    return tmp_path


def test_prose_is_whole_sentences_without_programs_grammar_and_tables():
    assert list(prose(PAGE)) == [
        "The statement wraps the execution of a block.",
        "A context manager supplies the methods that it needs.",
        "The context expression is evaluated to obtain a manager of the context.",
    ]


def test_tokens_are_words_names_links_and_marks():
    assert tokenise("RT @a_b: didn't pay $19.5B, see http://t.co/X #GOP!") == (
        "RT", "@a_b", ":", "didn't", "pay", "$", "19.5B", ",", "see", "http://t.co/X", "#GOP", "!",
    )  # fmt: skip


def test_copies_of_a_tweet_begin_alike():
    starts = {tweet_start(text) for text, _ in ROWS[:3]}
    assert starts == {"thedebatewasagreatsuccessforeveryonetoni"}
    assert tweet_start(ROWS[3][0]) != tweet_start(ROWS[4][0])


def test_tweets_have_one_copy_and_the_label_of_most(files):
    corpus = load_texts("gop")
    assert corpus.class_names == ("negative", "positive")
    negative, positive = ({text.text for text in each} for each in corpus.classes)
    assert negative == {"Nobody of them said\na word about it & that is all", ROWS[8][0]}
    assert positive == {ROWS[0][0], ROWS[7][0]}
    assert [text.text for text in corpus.sentences] == NEWS
    assert corpus.sentences[0].tokens == tuple(NEWS[0].split())


def test_news_are_told_from_news_with_shuffled_words(files):
    news = "".join(f"{line}\n" for line in [*NEWS, NEWS[0], "no no no no no"]).encode()
    (files / "obw" / "shard.txt").write_bytes(news)
    texts.NEWS_MD5["shard"] = md5(news)
    (files / "gop" / "Sentiment.csv.gz").unlink()  # is not needed
    corpus = load_texts("news")
    assert [text.text for text in corpus.sentences] == NEWS, "all but the one with one word"
    ordered, shuffled = corpus.classes
    assert len(ordered) + len(shuffled) == len(NEWS)
    assert {text.text for text in ordered} <= set(NEWS)
    for text in shuffled:
        assert text.text not in NEWS
        assert sorted(text.tokens) in [sorted(line.split()) for line in NEWS]


def test_texts_are_chosen_by_length(files):
    data = two_stage_texts("gop", 1, 2, 2, longest=13)
    assert [text.text for text in data.pretrain] == [NEWS[0]]
    with pytest.raises(ValueError, match="pretrain_size is 3; there are 2 sentences of 5 to 13"):
        two_stage_texts("gop", 3, 2, 2, longest=13)
    with pytest.raises(ValueError, match=r"ask for 2 texts of the class 'negative', .* only 1 of"):
        two_stage_texts("gop", 1, 2, 2, longest=12)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_broken_file_is_named_and_never_half_read(files, damage):
    tweets, news = files / "gop" / "Sentiment.csv.gz", files / "obw" / "shard.txt"
    for path in (tweets, news):
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole + b"x")
        with pytest.raises(DataFileError, match="MSIF_DATA") as error:
            load_texts("gop")
        assert path.name.removesuffix(".gz") in str(error.value)
        assert ("missing" if damage == "missing" else "broken or half-downloaded") in str(
            error.value
        )
        path.write_bytes(whole)
    load_texts("gop")


def test_without_a_folder_the_error_says_how_to_get_the_files(monkeypatch):
    monkeypatch.delenv("MSIF_DATA", raising=False)
    with pytest.raises(DataFileError, match=r"MSIF_DATA is not set.*obw/.*gop/"):
        load_texts("gop")
    with pytest.raises(DataFileError, match=r"MSIF_DATA is not set.*obw/"):
        load_texts("news")


def test_the_embedded_corpus_has_sentences_and_sentences_in_disorder():
    corpus = load_texts("pydoc")
    ordered, shuffled = corpus.classes
    assert len(ordered) + len(shuffled) == len(corpus.sentences)
    known = {text.text for text in corpus.sentences}
    assert {text.text for text in ordered} < known
    assert not {text.text for text in shuffled} & known
    words = {tuple(sorted(text.tokens)) for text in corpus.sentences}
    assert all(tuple(sorted(text.tokens)) in words for text in shuffled)


def test_no_words_are_in_two_sets_and_classes_are_equal():
    data = two_stage_texts("pydoc", 150, 60, 40, longest=15, seed=3)
    parts = (data.pretrain, data.finetune, data.test)
    sets = [{tuple(sorted(text.tokens)) for text in part} for part in parts]
    assert [len(part) for part in parts] == [150, 60, 40]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert data.finetune_labels.bincount().tolist() == [30, 30]
    assert data.test_labels.bincount().tolist() == [20, 20]
    assert all(5 <= len(text.tokens) <= 15 for part in parts for text in part)
    shuffled = {text.text for text in data.corpus.classes[1]}
    for part, labels in ((data.finetune, data.finetune_labels), (data.test, data.test_labels)):
        assert [text.text in shuffled for text in part] == labels.bool().tolist()


def test_texts_of_finetuning_may_be_longer_than_sentences():
    data = two_stage_texts("pydoc", 100, 60, 40, longest=10, seed=3, finetune_longest=18)
    lengths = [
        max(len(text.tokens) for text in part) for part in (data.pretrain, data.finetune, data.test)
    ]
    assert lengths[0] <= 10 < min(lengths[1:])
    assert max(lengths) <= 18


def test_same_seed_same_draw():
    first, second, other = (two_stage_texts(seed=seed) for seed in (1, 1, 2))
    assert first.pretrain == second.pretrain
    assert torch.equal(first.test_labels, second.test_labels)
    assert first.pretrain != other.pretrain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "letters"}, "dataset must be one of"),
        ({"longest": 4}, "longest must be at least 5 tokens, not 4"),
        ({"finetune_longest": 4}, "finetune_longest must be at least 5 tokens, not 4"),
        ({"finetune_size": 5000, "finetune_longest": 6}, "of 5 to 6 tokens"),
        ({"finetune_size": 5}, "finetune_size must be a multiple of the 2 classes, not 5"),
        ({"test_size": 0}, "test_size must be a multiple of the 2 classes, not 0"),
        ({"test_size": 5000}, "ask for 2580 texts of the class 'sentence'"),
        ({"pretrain_size": 5000}, "pretrain_size is 5000; there are"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        two_stage_texts(**arguments)


def test_bm25_is_its_formula_written_out():
    documents = [["a", "b"], ["A", "a", "c", "d"], ["e", "f", "c"]]
    found = bm25([["a"], ["c", "e", "zebra", "c"]], documents)

    def weight(held):
        return math.log(1 + (3 - held + 0.5) / (held + 0.5))

    def share(times, length):
        return times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / 3))

    expected = torch.tensor(
        [
            [weight(2) * share(1, 2), 0.0],
            [weight(2) * share(2, 4), weight(2) * share(1, 4)],
            [0.0, weight(2) * share(1, 3) + weight(1) * share(1, 3)],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not REAL_DATA, reason="MSIF_DATA names no folder of data files")
def test_the_real_files_are_those_described():
    corpus = load_texts("gop")
    assert 30_000 < len(corpus.sentences) <= 30_396
    assert sum(len(text.tokens) for text in corpus.sentences) == pytest.approx(770_254, rel=1e-3)
    assert [len(each) > 1000 for each in corpus.classes] == [True, True]
    starts = [tweet_start(text.text) for each in corpus.classes for text in each]
    assert len(set(starts)) == len(starts)
