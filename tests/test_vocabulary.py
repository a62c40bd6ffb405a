import json
import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvae.atomic_files import read_limited
from fastvae.text import ByteVocabulary, CharVocabulary, Vocabulary, normalize_tweet


@given(st.text(min_size=1))
def test_characters_round_trip(text):
    vocabulary = CharVocabulary.from_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


@given(st.text())
def test_bytes_round_trip(text):
    vocabulary = ByteVocabulary()
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.binary())
def test_any_bytes_survive(data):
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode_bytes(data)
    assert vocabulary.decode_bytes(ids) == data
    assert vocabulary.decode(torch.from_numpy(ids)) == data.decode("utf-8", "replace")
    # what the command line could not decode comes as surrogate escapes
    escaped = data.decode("utf-8", "surrogateescape")
    assert vocabulary.encode(escaped) == ids.tolist()


def test_characters_as_bytes():
    vocabulary = CharVocabulary("aé☃")
    assert vocabulary.decode_bytes([1, 2, 3, 0]) == "é☃a".encode()


def test_character_ids():
    vocabulary = CharVocabulary.from_text("banana split\n")
    assert vocabulary.characters == "ban split\n"[:3] + " split\n"
    assert vocabulary.encode("nab") == [2, 1, 0]
    assert (vocabulary.size, vocabulary.pad_id) == (11, 10)
    assert (vocabulary.start_id, vocabulary.dropped_id) == (11, 12)
    assert vocabulary.end_id is None and vocabulary.unk_id is None
    assert vocabulary.unit == "character"
    assert vocabulary.encode_sample("ban", 5) == [0, 1, 2, 10, 10]
    assert vocabulary.decode([0, 10, 1, 2, 10]) == "ban"


def test_byte_ids():
    vocabulary = ByteVocabulary()
    assert vocabulary.encode("\0aé") == [3, 3 + 97, 3 + 0xC3, 3 + 0xA9]
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.end_id) == (0, 1, 2)
    assert (vocabulary.size, vocabulary.start_id, vocabulary.dropped_id) == (259, 259, 260)
    assert vocabulary.unit == "byte"
    assert vocabulary.encode_sample("ab", 5) == [100, 101, 2, 0, 0]
    assert vocabulary.decode([100, 0, 1, 101, 2, 100]) == "a\ufffdb"  # nothing after the end
    assert vocabulary.decode_bytes([3 + 0xFF, 2]) == b"\xff"


def test_unknown_character_names_itself_and_its_position():
    vocabulary = CharVocabulary("abc")
    with pytest.raises(ValueError, match=r"'d' \(U\+0064\) at position 2 .* 3 "):
        vocabulary.encode("abdc")
    with pytest.raises(ValueError, match=r"U\+1F600\) at position 0 "):
        vocabulary.encode("\U0001f600")


@pytest.mark.parametrize("vocabulary", [CharVocabulary("abc"), ByteVocabulary()], ids=repr)
def test_ids_out_of_range(vocabulary):
    for bad in (-1, vocabulary.size):
        with pytest.raises(ValueError, match=f"id {bad} at position 1"):
            vocabulary.decode([0, bad])


@pytest.mark.parametrize(
    ("vocabulary", "fits"), [(CharVocabulary("abc"), "abca"), (ByteVocabulary(), "abc")], ids=repr
)
def test_sample_must_fit(vocabulary, fits):
    assert vocabulary.decode(vocabulary.encode_sample(fits, 4)) == fits
    with pytest.raises(ValueError, match=f"{len(fits) + 1} .*more than the {len(fits)} that fit"):
        vocabulary.encode_sample(fits + "a", 4)


@pytest.mark.parametrize("characters", ["", "aba"])
def test_characters_must_be_distinct(characters):
    with pytest.raises(ValueError, match=r"at least one|'a' twice"):
        CharVocabulary(characters)


@pytest.mark.parametrize("vocabulary", [CharVocabulary('a"\\\n é☃\U0001f600'), ByteVocabulary()])
def test_save_and_load(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert type(loaded) is type(vocabulary) and loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "word"}', '{"kind": "character"}', "é"])
def test_damaged_vocabulary_names_its_file(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocabulary\.json: "):
        Vocabulary.load(path)


def test_a_vocabulary_of_all_characters_takes_a_moment(tmp_path):
    """Time grows with the characters, not with their square: 300,000 would take minutes."""
    codes = [*range(0xD800), *range(0xE000, 0x4A000)]
    characters = "".join(map(chr, codes))
    path = tmp_path / "text"
    path.write_bytes(characters[::-1].encode())
    begin = time.process_time()
    vocabulary = CharVocabulary.from_file(path)
    assert vocabulary.characters == characters[::-1]
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    with pytest.raises(ValueError, match=re.escape(f"{characters[-1]!r} twice")):
        CharVocabulary(characters + characters[-1])
    assert time.process_time() - begin < 20


@pytest.mark.parametrize(
    "content", [b" " * (1 << 24) + b"{}", b"[" * 100_000], ids=["long", "deep"]
)
def test_a_senseless_vocabulary_is_refused(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vocabulary\.json: "):
        Vocabulary.load(path)


def test_a_file_may_have_16_mib(tmp_path):
    for size, fits in ((1 << 24, True), ((1 << 24) + 1, False)):
        with open(tmp_path / "file", "wb") as file:
            file.truncate(size)
        if fits:
            assert len(read_limited(tmp_path / "file")) == size
            continue
        with pytest.raises(ValueError, match=r"file is too large: it may have 16 MiB"):
            read_limited(tmp_path / "file")


def test_an_endless_vocabulary_is_read_to_a_limit():
    with pytest.raises(ValueError, match=r"/dev/zero is too large: it may have 16 MiB"):
        Vocabulary.load("/dev/zero")


def test_from_file_keeps_the_order_of_first_appearance(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(("ab\r\n" * 400_000 + "zé" + "a☃" * 300_000 + "y").encode())
    assert CharVocabulary.from_file(path).characters == "ab\r\nzé☃y"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"text is empty$"):
        CharVocabulary.from_file(path)


@pytest.mark.parametrize(
    ("tweet", "expected"),
    [
        ("look http://t.co/x https://a.b", "look url url"),
        ("@bob: hi @alice_1 !", "@userid hi @userid !"),
        ("mail me@home.org (@bob) xhttp://no", "mail me@home.org (@bob) xhttp://no"),
        ("http https:/ @", "http https:/ @userid"),
        ("\t@a\u3000@b  http://c\u00a0d", "\t@userid\u3000@userid  url\u00a0d"),
        ("", ""),
    ],
)
def test_normalize_tweet(tweet, expected):
    assert normalize_tweet(tweet) == expected
    assert normalize_tweet(expected) == expected


@given(st.lists(st.sampled_from(["@", "http://", "https://", "h", "a", " ", "\n", "\u2003"])))
def test_normalize_tweet_acts_on_whole_tokens(parts):
    def token(word):
        if word.startswith(("http://", "https://")):
            return "url"
        return "@userid" if word.startswith("@") else word

    tweet = "".join(parts)
    assert normalize_tweet(tweet).split() == [token(word) for word in tweet.split()]
