"""What can go wrong with one object, in the store's own words.

Knows how the local disk, fsspec and botocore report failures; turns them into one-line StoreErrors and tells passing failures
(worth a retry) from lasting ones. Does no input or output itself.
"""

from __future__ import annotations

import errno

from botocore.exceptions import (
    BotoCoreError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError

from plora_ray.errors import StoreError

# 409 is S3's ConditionalRequestConflict: two conditional writes crossed and neither was judged; ask again.
TRANSIENT_STATUS = frozenset({409, 429, 500, 502, 503, 504})
TRANSIENT_CODES = frozenset({"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "XAmzContentSHA256Mismatch"})

AZURE_TRANSIENT = frozenset({"ServiceRequestError", "ServiceResponseError", "IncompleteReadError"})


class ObjectNotFound(StoreError):
    """There is no object of this name."""


class ObjectExists(StoreError):
    """A create-only write met an object that is already there."""


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind `error`, if a server answered at all."""
    statuses = (
        _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode"),
        getattr(error, "status_code", None),  # Azure's
        getattr(error, "code", None),  # Google's
    )
    return next((status for status in statuses if isinstance(status, int)), None)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if http_status(error) in TRANSIENT_STATUS or _code(error) in TRANSIENT_CODES:
        return True
    if isinstance(error, (BotoConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, FlexibleChecksumError)):
        return True  # the last: the bytes changed on their way, or were half replaced
    # Errors of the connection (a payload cut short) that arrive unwrapped; their packages are only known by name here.
    module, name = type(error).__module__, type(error).__name__
    return (
        isinstance(error, (ConnectionError, TimeoutError, FSTimeoutError))
        or module.startswith(("aiohttp", "requests"))
        or (module.startswith("azure.core") and name in AZURE_TRANSIENT)
    )


def is_refused_condition(error: BaseException) -> bool:
    """Whether the object was there already, or was not the version that the write named."""
    return isinstance(error, FileExistsError) or http_status(error) == 412


def is_beyond_end(error: BaseException) -> bool:
    """Whether a ranged read began after the object's last byte."""
    return http_status(error) == 416


def store_error(verb: str, uri: str, error: BaseException) -> StoreError:
    """The one-line StoreError for `error`, met when asked to `verb` the object at `uri`."""
    if _is_missing_object(error) and verb not in ("create", "write"):
        return ObjectNotFound(f"can't {verb} {uri}: it doesn't exist")
    return StoreError(f"can't {verb} {uri}: {_one_line(_reason(error))}; {_advice(error)}")


def _response(error: BaseException) -> dict[str, dict[str, object]]:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _is_missing_object(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket"


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        code = _code(error)
        return f"{error.strerror} ({code})" if code else error.strerror
    if hasattr(error, "status_code") and hasattr(error, "reason"):
        return str(error.reason)  # Azure's; its text is a page
    return str(error) or type(error).__name__


def _advice(error: BaseException) -> str:
    if _code(error) == "NoSuchBucket":
        return "create the bucket or correct the store's URI"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return "give credentials (environment, instance role, or key and secret in the storage options)"
    if http_status(error) in (401, 403):
        return "check the credentials and the bucket's policy"
    if isinstance(error, (BotoConnectionError, HTTPClientError, ConnectionError, FSTimeoutError, TimeoutError)):
        return "check the endpoint URL and the network"
    if http_status(error) in TRANSIENT_STATUS:
        return "the storage is overloaded or away for now"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return "check that this user may read and write the folder"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or choose another store"
    if isinstance(error, BotoCoreError) or http_status(error) is not None:
        return "check the store's URI and storage options"
    return "check the store's URI"


def _one_line(text: str) -> str:
    return " ".join(text.split())
