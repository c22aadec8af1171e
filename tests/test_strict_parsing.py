"""JSON and YAML that parsers take and programs cannot process: refused, at once, with the reason."""

import pytest

from vlmcap.strict_parsing import DEPTH, YAML_BYTES, parse_json, parse_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[" * 100_000, "levels of nesting"),
        ("[" * DEPTH + "[1]" + "]" * DEPTH, "levels of nesting"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' occurs twice"),
        ("[NaN]", "NaN is not a finite number"),
        ("-Infinity", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("9" * 5000, "4300 digits"),
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"\udfff": 1}', "half of a surrogate pair"),
        (b'"\xed\xa0\x80"', "can't decode byte"),
        ("[]".encode("utf-16"), "can't decode byte"),
        ("", "line 1 column 1"),
    ],
)
def test_json_that_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_json_that_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xe7\x8c\xab"]}') == {"a": [1, 2.5, None, "猫"]}
    assert parse_json(r'"\ud83d\ude00"') == "😀"
    assert parse_json("[" * DEPTH + "1" + "]" * DEPTH)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LAUGHS, "alias"),
        ("a: &a [*a]", "alias"),
        ("- " * 500 + "a", "levels of nesting"),
        ("{" * 3000, "levels of nesting"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice"),
        ("!!int ''", "index out of range"),  # PyYAML's own, an IndexError
        ("!!timestamp x", "groupdict"),  # an AttributeError
        ("!!bool x", "x"),  # a KeyError
        ("2020-13-45", "month"),
        ('"\\UFFFFFFFF"', "too large|not in range"),
        ("a: .nan", "nan is not a finite number"),
        ("a: [-.inf, 1.0e+999]", "-inf is not a finite number"),
        ("a: 0x" + "f" * 5_000, "a whole number in it has thousands of digits"),
        ('a: ["\\ud800"]', "half of a surrogate pair"),
        ("!!set {\"\\ud800\"}", "half of a surrogate pair"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("x" * (YAML_BYTES + 1), "bytes"),
        (b"\xff", "decode"),
        ("a: 1".encode("utf-16"), "decode"),
        ("a: [", "expected the node content"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(data)


def test_yaml_that_is_read():
    assert parse_yaml("a: [1, 1e-4, x, null, true]\nb: {c: 猫}".encode()) == {
        "a": [1, "1e-4", "x", None, True],
        "b": {"c": "猫"},
    }


def test_a_key_that_is_repeated_among_many_is_found_at_once():
    keys = ", ".join(f'"{i}": 0' for i in range(200_000))  # to compare each with each would take minutes
    with pytest.raises(ValueError, match="'199999' occurs twice"):
        parse_json(f'{{{keys}, "199999": 1}}')
