"""A regular expression of Python as one of JavaScript that finds the same tokens."""

import re
from functools import cache
from re import _constants as constants
from re import _parser as parser

CATEGORIES = {
    constants.CATEGORY_DIGIT: r"\p{Nd}",
    constants.CATEGORY_NOT_DIGIT: r"\P{Nd}",
    constants.CATEGORY_SPACE: (
        r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    ),
    constants.CATEGORY_WORD: r"\p{L}\p{N}_",
}
NEGATED = {
    constants.CATEGORY_NOT_SPACE: CATEGORIES[constants.CATEGORY_SPACE],
    constants.CATEGORY_NOT_WORD: CATEGORIES[constants.CATEGORY_WORD],
}
IN_PYTHON = {
    constants.CATEGORY_DIGIT: r"\d",
    constants.CATEGORY_NOT_DIGIT: r"\D",
    constants.CATEGORY_SPACE: r"\s",
    constants.CATEGORY_NOT_SPACE: r"\S",
    constants.CATEGORY_WORD: r"\w",
    constants.CATEGORY_NOT_WORD: r"\W",
}
WORD = CATEGORIES[constants.CATEGORY_WORD]
BOUNDARY = f"(?:(?<=[{WORD}])(?![{WORD}])|(?<![{WORD}])(?=[{WORD}]))"
PLACES = {  # outside of and with re.MULTILINE; JavaScript's own knows more ends of lines
    constants.AT_BEGINNING: ("(?<![^])", r"(?<![^\n])"),
    constants.AT_END: (r"(?=\n?(?![^]))", r"(?![^\n])"),
    constants.AT_BEGINNING_STRING: ("(?<![^])",) * 2,
    constants.AT_END_STRING: ("(?![^])",) * 2,
    constants.AT_BOUNDARY: (BOUNDARY,) * 2,
    constants.AT_NON_BOUNDARY: (f"(?!{BOUNDARY})",) * 2,
}
REPEATS = {constants.MAX_REPEAT: "", constants.MIN_REPEAT: "?"}
FLAGS = re.DOTALL | re.UNICODE | re.VERBOSE | re.IGNORECASE | re.MULTILINE


def to_javascript(pattern: str) -> str:
    """Pattern of `TokenVocabulary`, in which . is any character -> source of a RegExp.

    The RegExp has the flags g, s and u. It finds no empty matches, which are no tokens.

    Args:
        pattern: a regular expression of Python's `re`.

    Raises:
        ValueError: the pattern has a construct that JavaScript lacks, such as an atomic group.
    """
    parsed = parser.parse(pattern, re.DOTALL)
    if unknown := parsed.state.flags & ~FLAGS:
        raise ValueError(_refusal(pattern, str(re.RegexFlag(unknown))))
    may_be_empty = parsed.getwidth()[0] == 0
    translator = _Translator(pattern, parsed.state.flags, first_group=may_be_empty)
    source = translator.sequence(parsed, set())
    if not may_be_empty:
        return source
    # Python tries again to find more at the place of an empty match. Group 1 is the text from here
    # on; behind a match, something less must be left.
    return rf"(?=([^]*))(?:{source})(?!\1(?![^]))"


def _refusal(pattern: str, what: str) -> str:
    return f"the page cannot find tokens by {pattern!r}: JavaScript has no {what}"


class _Translator:
    """Nodes of a parsed expression -> JavaScript.

    Args:
        pattern: for error messages.
        flags: of the expression.
        first_group: how many groups the translation has before those of the expression.
    """

    def __init__(self, pattern: str, flags: int, first_group: int):
        self.pattern, self.first_group = pattern, int(first_group)
        self.multiline = bool(flags & re.MULTILINE)
        self.ignores_case = bool(flags & re.IGNORECASE)

    def sequence(self, items, set_: set[int]) -> str:
        """Nodes one after the other; groups that they set for certain are added to `set_`."""
        return "".join(self.item(op, value, set_) for op, value in items)

    def item(self, op, value, set_: set[int]) -> str:
        """One node."""
        if op in (constants.LITERAL, constants.NOT_LITERAL):
            items = [(constants.LITERAL, value)]
            if op is constants.NOT_LITERAL:
                items = [(constants.NEGATE, None), *items]
            elif not self.ignores_case:
                return _character(value)
            return self.one_of(items)
        if op is constants.ANY:
            return "[^]"
        if op is constants.IN:
            return self.one_of(value)
        if op is constants.BRANCH:
            return f"(?:{'|'.join(self.sequence(items, set(set_)) for items in value[1])})"
        if op is constants.SUBPATTERN and not value[1] and not value[2]:
            inner = self.sequence(value[3], set_)
            if not value[0]:
                return f"(?:{inner})"
            set_.add(value[0])
            return f"({inner})"
        if op in REPEATS:
            low, high, body = value
            most = "" if high is constants.MAXREPEAT else high
            inner = self.sequence(body, set_ if low else set(set_))
            return f"(?:{inner}){{{low},{most}}}{REPEATS[op]}"
        if op in (constants.ASSERT, constants.ASSERT_NOT):
            behind, sign = "<" if value[0] < 0 else "", "=" if op is constants.ASSERT else "!"
            return f"(?{behind}{sign}{self.sequence(value[1], set(set_))})"
        if op is constants.GROUPREF:
            if self.ignores_case or value not in set_:
                what = "reference like this one to what a group found, in any case or if anything"
                raise ValueError(_refusal(self.pattern, what))
            return f"(?:\\{value + self.first_group})"
        if op is constants.AT and value in PLACES:
            return PLACES[value][self.multiline]
        raise ValueError(_refusal(self.pattern, str(op).lower().replace("_", " ")))

    def one_of(self, items) -> str:
        """[...] with its items, as alternatives where one of them is negated."""
        if self.ignores_case:
            return _found_by(_in_python(items))
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
                raise ValueError(_refusal(self.pattern, f"{op} {value} in a set"))
        if not alternatives:
            return f"[{'^' * negated}{inside}]"
        joined = "|".join([*([f"[{inside}]"] if inside else []), *alternatives])
        return f"(?:(?!{joined})[^])" if negated else f"(?:{joined})"


def _character(code: int) -> str:
    """A code point, escaped."""
    return f"\\u{{{code:x}}}" if not chr(code).isalnum() or code > 126 else chr(code)


def _in_python(items) -> str:
    """Items of [...] -> their source in Python."""
    inside = ""
    for op, value in items:
        if op is constants.NEGATE:
            inside += "^"
        elif op is constants.CATEGORY:
            inside += IN_PYTHON[value]
        else:
            codes = value if op is constants.RANGE else (value,)
            inside += "-".join(f"\\U{code:08x}" for code in codes)
    return f"[{inside}]"


@cache
def _found_by(source: str) -> str:
    """[...] of Python -> one of JavaScript with each character that it finds in either case.

    What counts as the same letter differs between the two languages.
    """
    characters = "".join(map(chr, range(0x110000)))
    codes = [ord(c) for c in re.findall(source, characters, re.IGNORECASE)]
    starts = [a for n, a in enumerate(codes) if n == 0 or codes[n - 1] != a - 1]
    ends = [a for n, a in enumerate(codes) if n + 1 == len(codes) or codes[n + 1] != a + 1]
    parts = zip(map(_character, starts), map(_character, ends), strict=True)
    return f"[{''.join(a if a == b else f'{a}-{b}' for a, b in parts)}]"
