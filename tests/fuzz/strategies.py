"""Inputs for the fuzzer: hostile texts, values of JSON, and files that are almost right."""

import json

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# What has broken parsers, cards, pages and prompts elsewhere; first what holds no space.
_WORDS = r"""
<|im_start|> <|im_end|> <|image_pad|> <|endoftext|> [SEP] </s> <image> </script><img/src=x/onerror=alert(1)> <!-- -->
{{7*7}} {%raw%} {#x#} ](javascript:alert(1)) ``` ` | \ * _ # > ~~~ --- ... : - ? & ! % @ ' " <b> &a
!!python/object:os.system https://example.com/?a=b (http://x.jp) www.a
ー − ― ガ ｶﾞ か゛ は゜ 神 葛󠄀 👨‍👩‍👧 2️⃣ 🇯🇵 ① ㍿ ﬁ İ ß ﷺ 한 汉 é 、、 。。 ， ． 「 」
です ます ました ません ませんでした でしょう ございます 走り 赤い 男性 女性が いる
hoá quý MỘt vơt tennis don't '90s 1/2 half-baked a. U.S. &eacute; &#65; PB&J;
"""
_OTHERS = [
    *("\n---\n", "\n# A section\n", "\n## Scores\n", "| a | b |", ": ", " #", "- a", "bóng bóng", "\t", "\r\n", "\0"),
    *("\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "\u0085", "\x1b[31m", "\x1c", "\x96", "\ufffd", "\ue001"),
    *("e\u0301", "*a"),
]
SNIPPETS = [*_WORDS.split(), *_OTHERS]
DAMAGE = [b"[" * 3000, b'{"a":' * 3000, b"- " * 500, b"9" * 5000, b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999"]
JAPANESE = "あいうえおかがきくっのはをんアイカガキッンー犬猫男女白赤い道走立座。、"


def texts(surrogates: bool = False) -> SearchStrategy[str]:
    """Texts of hostile pieces, Japanese, and anything; with halves of surrogate pairs if asked."""
    pieces = [st.sampled_from(SNIPPETS), st.text(JAPANESE, max_size=8), st.text(max_size=6)]
    if surrogates:
        pieces.append(st.sampled_from(["\ud800", "\udfff\ud800"]))
    return st.lists(st.one_of(pieces), max_size=8).map("".join)


def values() -> SearchStrategy[object]:
    """Values of JSON and YAML, NaN, infinity and numbers of thousands of digits among them."""
    numbers = st.sampled_from([0, -1, 1, 2**53, 2**63, -(2**70), 10**400, 1e308, -0.0, float("nan"), float("inf")])
    leaves = st.one_of(st.none(), st.booleans(), numbers, texts(surrogates=True), st.sampled_from(["1", "a", ""]))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3), max_leaves=4
    )


def places(document: object) -> list[tuple]:
    """Paths of all values inside a document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path for key, value in items for path in ((key,), *((key, *rest) for rest in places(value)))]


def replaced(document: object, path: tuple, value: object) -> object:
    """A copy of a document with another value at a path."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


@st.composite
def altered(draw, document: object, edits: int = 2) -> object:
    """A document with a few values replaced, left out, or put under another key."""
    for _ in range(draw(st.integers(1, edits))):
        found = places(document)
        if not found:
            return document
        path = draw(st.sampled_from(found))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        deed = draw(st.sampled_from(["replace", "replace", "drop", "double"]))
        if deed == "replace":
            document = replaced(document, path, draw(values()))
        elif isinstance(parent, dict):
            others = {key: value for key, value in parent.items() if key != path[-1]}
            extra = {draw(texts()): parent[path[-1]]} if deed == "double" else {}
            document = replaced(document, path[:-1], others | extra)
        else:
            others = [
                *parent[: path[-1]],
                *([parent[path[-1]]] * 2 if deed == "double" else []),
                *parent[path[-1] + 1 :],
            ]
            document = replaced(document, path[:-1], others)
    return document


@st.composite
def mutated(draw, *seeds: bytes) -> bytes:
    """Bytes of a file with pieces cut out, put in, doubled; re-encoded; or cut off."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 64])))
        piece = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([snippet.encode() for snippet in SNIPPETS]),
                st.sampled_from(DAMAGE),
                st.just(data[start:end] * 2),
            )
        )  # fmt: skip
        data = data[:start] + piece + data[end:]
    return data


def recoded(text: str) -> SearchStrategy[bytes]:
    """A text in encodings that files have come in."""
    return st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp932", "latin-1", "utf-7"]).map(
        lambda encoding: text.encode(encoding, "replace")
    )


def _json(value: object) -> bytes:
    return json.dumps(value, default=str).encode()


def _yaml(value: object) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode("utf-8", "replace")


def files(*documents: object, dump=_json) -> SearchStrategy[bytes]:
    """Files of a format whose valid documents are known: almost right, damaged, re-encoded, or any bytes."""
    seeds = [dump(document) for document in documents]
    return st.one_of(
        st.sampled_from(documents).flatmap(altered).map(lambda document: _dumped(document, dump)),
        mutated(*seeds),
        recoded(seeds[0].decode()),
        values().map(lambda value: _dumped(value, dump)),
        st.binary(max_size=100),
    )


def _dumped(document: object, dump) -> bytes:
    try:
        return dump(document)
    except (ValueError, yaml.YAMLError):  # 10**400 is not a text of Python's any more
        return repr(document).encode("utf-8", "replace")


def json_files(*documents: object) -> SearchStrategy[bytes]:
    return files(*documents)


def yaml_files(*documents: object) -> SearchStrategy[bytes]:
    return files(*documents, dump=_yaml)


def jsonl_files(*lines: dict) -> SearchStrategy[bytes]:
    """Files of JSON lines: good ones, bad ones, good ones twice."""
    line = st.one_of(st.sampled_from(lines).map(_json), files(*lines).map(lambda data: data.replace(b"\n", b" ")))
    return st.lists(line, max_size=4).map(b"\n".join)
