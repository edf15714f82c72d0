"""Who may ask for what: keys, each for all adapters or for some, one of them for who loads adapters.

    {"sk-abc": {"adapters": ["law", "med-*"]}, "sk-admin": {"admin": true}}

A key is compared with all keys, in constant time, as a hash: how long it takes says nothing of how much of it was right.
Where only admins have keys, anyone may ask for everything, and nobody else may load.
"""

import fnmatch
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qgraft.errors import OptionError
from qgraft.json_files import read_object


@dataclass(frozen=True)
class Permission:
    """What a key is good for.

    Attributes:
        adapters: patterns of names; None for all of them, and the base.
        name: how logs call the key: never itself.
    """

    name: str = "anyone"
    adapters: tuple[str, ...] | None = None
    admin: bool = False

    def allows(self, adapter: str) -> bool:
        """Whether answers of this adapter may be asked for."""
        return self.adapters is None or any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


class Keys:
    """The keys of a server.

    Args:
        permissions: by key. Where none is for others than admins, requests need no key.
    """

    def __init__(self, permissions: Mapping[str, Permission]) -> None:
        self._known = {_digest(key): permission for key, permission in permissions.items()}
        self.are_needed = not all(permission.admin for permission in permissions.values())

    def of(self, authorization: str | None) -> Permission | None:
        """The permission of an `Authorization: Bearer ...`; None for a wrong key, or none where one is needed."""
        if authorization is None and not self.are_needed:
            return Permission()
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip() if scheme.lower() == "bearer" else ""), None
        for digest, permission in self._known.items():  # all of them, also behind the right one
            if hmac.compare_digest(digest, given):
                found = permission
        return found if self.are_needed or found is not None else Permission()  # clients send some key always


def check_key(key: str, what: str) -> str:
    """The key. Raises OptionError for one that no header can hold: an empty one would be that of requests without any."""
    if not key or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise OptionError(f"{what}: got {key!r}, expected a key of printable ASCII, without blanks around it",
                          hint="a variable that is not set?" if not key else None)  # fmt: skip
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_keys(path: Path) -> dict[str, Permission]:
    """The permissions in a JSON file. Raises OptionError for what is none."""
    found: dict[str, Permission] = {}
    for number, (key, given) in enumerate(read_object(path, OptionError).items(), start=1):
        what = given if isinstance(given, dict) else {"": given}
        adapters, admin, name = what.get("adapters"), what.get("admin", False), what.get("name", f"key {number}")
        right = adapters is None or (isinstance(adapters, list) and all(isinstance(each, str) for each in adapters))
        check_key(key, f"{path}: key {number}")
        if what.keys() - {"adapters", "admin", "name"} or not right or not isinstance(admin, bool):
            raise OptionError(
                f"{path}: key {number}: expected an object with adapters (a list of names), admin (true or false) and name",
                hint='{"sk-abc": {"adapters": ["law"]}, "sk-admin": {"admin": true}}',
            )
        found[key] = Permission(str(name), None if adapters is None else tuple(adapters), admin)
    return found
