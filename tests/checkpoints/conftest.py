"""What the tests of saving share, from disks.py; those of tokenizers import vocabularies.py beside it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from disks import failing_after, full_disk  # noqa: E402

__all__ = ["failing_after", "full_disk"]
