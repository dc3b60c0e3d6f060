"""Locations as people may see them: what a URL carries besides a place is kept out of messages, reports and settings."""

from __future__ import annotations

import re

_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs", "github", "hf")  # container@account, owner:repository@revision, name@revision


def holds_credentials(url: str) -> bool:
    """Whether a user name or password stands before the host, in any part of a chained URL (`simplecache::https://...`)."""
    for part in url.split("::"):
        scheme, divider, rest = part.partition("://")
        if divider and scheme.lower() not in _AT_IS_A_PLACE and "@" in re.split(r"[/?#]", rest, maxsplit=1)[0]:
            return True
    return False


def shown_location(location: str) -> str:
    """The location without the query of an http or https URL, which may be a signature. In other locations `?` is a wildcard."""
    return re.sub(r"(?i)(\bhttps?://[^\s?#]*)[?#]\S*", r"\1", location)
