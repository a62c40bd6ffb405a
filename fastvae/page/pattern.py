"""A regular expression of Python as one of JavaScript that finds the same tokens."""

import re
from re import _constants as constants
from re import _parser as parser

CATEGORIES = {
    constants.CATEGORY_DIGIT: r"\p{Nd}",
    constants.CATEGORY_NOT_DIGIT: r"\P{Nd}",
    constants.CATEGORY_SPACE: r"\s\x1c-\x1f\x85",
    constants.CATEGORY_WORD: r"\p{L}\p{N}_",
}
NEGATED = {
    constants.CATEGORY_NOT_SPACE: CATEGORIES[constants.CATEGORY_SPACE],
    constants.CATEGORY_NOT_WORD: CATEGORIES[constants.CATEGORY_WORD],
}
WORD = CATEGORIES[constants.CATEGORY_WORD]
BOUNDARY = f"(?:(?<=[{WORD}])(?![{WORD}])|(?<![{WORD}])(?=[{WORD}]))"
PLACES = {
    constants.AT_BEGINNING: "^",
    constants.AT_BEGINNING_STRING: "(?<![^])",
    constants.AT_END_STRING: "(?![^])",
    constants.AT_BOUNDARY: BOUNDARY,
    constants.AT_NON_BOUNDARY: f"(?!{BOUNDARY})",
}
REPEATS = {constants.MAX_REPEAT: "", constants.MIN_REPEAT: "?"}
FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m"}


def to_javascript(pattern: str) -> tuple[str, str]:
    """Pattern of `TokenVocabulary`, in which . is any character -> source and flags of a RegExp.

    Args:
        pattern: a regular expression of Python's `re`.

    Raises:
        ValueError: the pattern has a construct that JavaScript lacks, such as an atomic group.
    """
    parsed = parser.parse(pattern, re.DOTALL)
    unknown = parsed.state.flags & ~(re.DOTALL | re.UNICODE | re.VERBOSE | sum(FLAGS))
    if unknown:
        raise ValueError(_refusal(pattern, str(re.RegexFlag(unknown))))
    multiline = bool(parsed.state.flags & re.MULTILINE)
    flags = "".join(letter for flag, letter in FLAGS.items() if parsed.state.flags & flag)
    return _sequence(parsed, pattern, multiline), "gsu" + flags


def _refusal(pattern: str, what: str) -> str:
    return f"the page cannot find tokens by {pattern!r}: JavaScript has no {what}"


def _sequence(items, pattern: str, multiline: bool) -> str:
    return "".join(_item(*item, pattern, multiline) for item in items)


def _item(op, value, pattern: str, multiline: bool) -> str:
    """One node of the parsed expression -> JavaScript."""

    def inner(items) -> str:
        return _sequence(items, pattern, multiline)

    if op is constants.LITERAL:
        return _character(value)
    if op is constants.NOT_LITERAL:
        return f"[^{_character(value)}]"
    if op is constants.ANY:
        return "[^]"
    if op is constants.IN:
        return _set(value, pattern)
    if op is constants.BRANCH:
        return f"(?:{'|'.join(map(inner, value[1]))})"
    if op is constants.SUBPATTERN and not value[1] and not value[2]:
        return f"({inner(value[3])})" if value[0] else f"(?:{inner(value[3])})"
    if op in REPEATS:
        low, high, body = value
        most = "" if high is constants.MAXREPEAT else high
        return f"(?:{inner(body)}){{{low},{most}}}{REPEATS[op]}"
    if op in (constants.ASSERT, constants.ASSERT_NOT):
        behind, sign = "<" if value[0] < 0 else "", "=" if op is constants.ASSERT else "!"
        return f"(?{behind}{sign}{inner(value[1])})"
    if op is constants.GROUPREF:
        return f"(?:\\{value})"
    if op is constants.AT and value is constants.AT_END:
        return "$" if multiline else r"(?=\n?(?![^]))"
    if op is constants.AT and value in PLACES:
        return PLACES[value]
    raise ValueError(_refusal(pattern, str(op).lower().replace("_", " ")))


def _set(items, pattern: str) -> str:
    """[...] with its items -> JavaScript, as alternatives where one of them is negated."""
    negated = items[0] == (constants.NEGATE, None)
    inside, alternatives = "", []
    for op, value in items[negated:]:
        if op is constants.LITERAL:
            inside += _character(value)
        elif op is constants.RANGE:
            inside += "-".join(map(_character, value))
        elif op is constants.CATEGORY and value in CATEGORIES:
            inside += CATEGORIES[value]
        elif op is constants.CATEGORY and value in NEGATED:
            alternatives.append(f"[^{NEGATED[value]}]")
        else:
            raise ValueError(_refusal(pattern, f"{op} {value} in a set"))
    if not alternatives:
        return f"[{'^' * negated}{inside}]"
    joined = "|".join([*([f"[{inside}]"] if inside else []), *alternatives])
    return f"(?:(?!{joined})[^])" if negated else f"(?:{joined})"


def _character(code: int) -> str:
    """A code point, escaped."""
    return f"\\u{{{code:x}}}" if not chr(code).isalnum() or code > 126 else chr(code)
