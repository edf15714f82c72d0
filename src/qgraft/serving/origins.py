"""Pages of other sites in a browser: which of them may read answers (CORS), where the browser asks before it lets them.

    --allowed_origins https://chat.example.org      this site's pages may, with a key where keys are needed
    --allowed_origins "*"                           all may

A browser asks first (OPTIONS, without a key) whether a page may send JSON and a key. Without the option no answer says so,
and the page sees an error of the browser's. What a page may ask is what answers: the studio's endpoints look for themselves.
"""

import re
from collections.abc import Mapping, Sequence

from qgraft.errors import OptionError, option

_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#@]+")  # as browsers write it: no path behind it
_KEPT = "600"  # seconds that a browser need not ask again


class Origins:
    """Sites whose pages may read answers.

    Args:
        allowed: as browsers write them in Origin, or "*".

    Raises OptionError for what is none.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        if odd := [each for each in allowed if each != "*" and not _ORIGIN.fullmatch(each)]:
            raise OptionError(
                f"allowed_origins: got {odd[0][:100]!r}, expected a scheme and a host without a path, or *",
                hint=option("allowed_origins", "https://chat.example.org"),
            )
        self._allowed = {each.lower() for each in allowed}

    def allow(self, origin: str) -> bool:
        """Whether its pages may."""
        return "*" in self._allowed or origin.lower() in self._allowed

    def headers(self, asked: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
        """What an answer says to the browser of a page that may read it; nothing to others."""
        origin = asked.get(b"origin")
        if origin is None or not self.allow(origin):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
            (b"access-control-expose-headers", b"Retry-After"),
        ]  # fmt: skip


def preflight(asked: Mapping[bytes, str]) -> dict[str, str]:
    """What a browser is told that asks whether it may send a request with these headers."""
    told = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST", "Access-Control-Max-Age": _KEPT,
        "Access-Control-Allow-Headers": asked.get(b"access-control-request-headers", "*"),
    }  # fmt: skip
    private = {"Access-Control-Allow-Private-Network": "true"}
    return told | private if asked.get(b"access-control-request-private-network") == "true" else told
