"""The hash of the C sources: it ties the library to them, and so to the Python that calls it.

ctypes checks nothing. A `git pull` that is not followed by a build leaves a library whose structures and arguments may be
laid out in another way than abi.py fills them in: memory would be overwritten, or a result be
wrong. So setup.py compiles this hash into the library, and library.py compares before anything is called. All of the
sources count, not only the structures' header: arguments are declared where functions are defined, and a kernel whose
arithmetic was mended must not go on computing as before, either.

setup.py runs this file by its path, without the rest of the package: standard library only.
"""

import hashlib
from pathlib import Path


def sources_hash(folder: Path) -> str:
    """16 hexadecimal digits of the SHA-256 of every C file and header in `folder`, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
