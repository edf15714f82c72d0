"""Fields of requests' bodies: JSON is read, each field has to be of its kind, and what is not says what it is, in words.

    ApiError: 400 stop: got 5, expected a text, or a list of at most 16, none of them empty

A field is named as the client wrote it, from the outside in: `messages[0].content`, `tools[2].function.strict`. What it was
is told as JSON, cut where it is long.
"""

import codecs
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qgraft.errors import QgraftError, near_match
from qgraft.json_files import parse_json

SHOWN = 60  # characters of a value that an error tells
MISSING: Any = object()  # of a field that is not there
_WORDS = {  # what Python's reader says -> what it wanted
    "Expecting value": "a value",
    "Expecting property name enclosed in double quotes": "a key in double quotes",
    "Expecting ':' delimiter": "a colon behind a key",
    "Expecting ',' delimiter": "a comma, or the bracket that closes",
    "Extra data": "nothing more behind the value",
    "Invalid control character at": "line feeds and tabs in texts as \\n and \\t",
    "Invalid \\escape": 'behind a backslash one of " \\ / b f n r t u',
    "Invalid \\uXXXX escape": "four hexadecimal digits behind \\u",
    "Unterminated string starting at": "a text with a double quote at its end",
    "Illegal trailing comma before end of object": "no comma before the bracket that closes",
    "Illegal trailing comma before end of array": "no comma before the bracket that closes",
}


class ApiError(QgraftError):
    """An answer that is an error, as OpenAI's API gives them.

    Attributes:
        status: of HTTP.
        kind, code, param: `type`, `code` and `param` of the error.
        retry_after: seconds.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, hint: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, hint=hint)
        self.status, self.kind, self.code, self.param, self.retry_after = status, kind, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def json_of(body: bytes) -> Any:
    """The value of a body. Raises ApiError, which says where it is no JSON."""
    if not body.strip():
        raise _no_json("it is empty")
    if body.startswith(codecs.BOM_UTF8):
        raise _no_json("it begins with a byte order mark")
    try:
        text = body.decode("utf-8")
        value = parse_json(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _no_json(f"\\u{ord(error.object[error.start]):04x} is half of a character that takes two") from error
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start} (0x{body[error.start]:02x}) is no UTF-8") from error
    except json.JSONDecodeError as error:
        got = repr(error.doc[error.pos : error.pos + 1]) if error.doc[error.pos :] else "its end"
        where = f"line {error.lineno}, column {error.colno}"
        raise _no_json(f"{where}: got {got}, expected {_WORDS.get(error.msg, 'JSON')}") from error
    except ValueError as error:  # of parse_json, in words
        raise _no_json(str(error)) from error
    return value


def _no_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {why}", hint='{"model": ..., ...}, in UTF-8')


def shown(value: object) -> str:
    """A value for a message: as JSON, cut where it is long."""
    if value is MISSING:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def wrong(param: str, got: object, expected: str, *, hint: str | None = None) -> ApiError:
    """What is said of a field that is not what it has to be."""
    return ApiError(
        400, f"{param}: got {shown(got)}, expected {expected}", code="invalid_value", param=param, hint=hint
    )


def object_of(value: object, param: str = "") -> Mapping[str, Any]:
    """An object. Raises ApiError.

    Args:
        param: how the field is called; "" for the body.
    """
    if isinstance(value, dict):
        return value
    if param:
        raise wrong(param, value, "an object")
    raise ApiError(400, f"the body: got {shown(value)}, expected a JSON object")


def check_known(given: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Raise ApiError for a key that is not known here, unless its value is null.

    Args:
        where: what stands before the key in its name.
    """
    if unknown := [name for name in given if name not in known and given[name] is not None]:
        raise ApiError(
            400, f"unknown option {shown(where + unknown[0])}: it would have no effect", code="unknown_parameter",
            param=where + unknown[0][:SHOWN], hint=near_match(unknown[0][:SHOWN], sorted(known)),
        )  # fmt: skip


def check_supported(
    given: Mapping[str, Any], known: Collection[str], harmless: Mapping[str, object], where: str = ""
) -> None:
    """Raise ApiError for a key of an API that is not served, unless its value is null, or the one that changes nothing.

    Args:
        where: what stands before the key in its name.
    """
    for name, value in given.items():
        if name not in known and value is not None and (name not in harmless or value != harmless[name]):
            name = where + name[:100]
            raise ApiError(400, f"{name}: not supported here", param=name, code="unsupported_parameter")


def flag_of(given: Mapping[str, Any], name: str, *, where: str = "", default: bool = False) -> bool:
    """True or false; the default where it is null or missing. Raises ApiError."""
    value = given.get(name)
    if not isinstance(value, bool | None):
        raise wrong(where + name, value, "true or false")
    return default if value is None else value


def text_of(given: Mapping[str, Any], name: str, *, where: str = "", empty: bool = False) -> str:
    """A text. Raises ApiError.

    Args:
        empty: whether it may be "".
    """
    value = given.get(name, MISSING)
    if not isinstance(value, str) or not (value or empty):
        raise wrong(where + name, value, "a text")
    return value


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Within the block fields are called as another API calls them: those that begin with a key, as its value says."""
    try:
        yield
    except ApiError as error:
        param = error.param or ""
        for inner, outer in names.items():
            if param == inner or param.startswith((f"{inner}.", f"{inner}[")):
                error.param = outer + param.removeprefix(inner)
                if error.message.startswith(param):
                    error.message = error.param + error.message.removeprefix(param)
                    error.args = (f"{error.message}\nhint: {error.hint}" if error.hint else error.message,)
                break
        raise
