"""Tweets as the paper reads them: links become `url`, handles become `@userid`."""

import re

# Each look-behind stands after its letter, so that the search can skip to the next @ or h.
_TOKEN = re.compile(r"(?:@(?<!\S@)|h(?<!\Sh)ttps?://)\S*")


def normalize_tweet(line: str) -> str:
    """Replace each token that starts with http:// or https:// by `url`, with @ by `@userid`.

    Tokens are what white space separates; the white space stays as it is.
    """
    return _TOKEN.sub(lambda token: "@userid" if token[0][0] == "@" else "url", line)
