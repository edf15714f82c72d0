"""What the tests of saving share, from disks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from disks import failing_after, full_disk

__all__ = ["failing_after", "full_disk"]
