"""Tweet normalization of the paper: links become `url`, handles become `@userid`."""

import re

# Each look-behind stands after its letter, so that the search can skip to the next @ or h.
_TOKEN = re.compile(r"(?:@(?<!\S@)|h(?<!\Sh)ttps?://)\S*")


def normalize_tweet(line: str) -> str:
    """Replace each word that starts with http:// or https:// by `url`, with @ by `@userid`.

    Words are separated by white space, which stays as it is. Semeniuta et al. 2017,
    arXiv:1702.02390.
    """
    return _TOKEN.sub(lambda token: "@userid" if token[0][0] == "@" else "url", line)
