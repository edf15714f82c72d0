"""The files beside are programs too (docs/make_architectures.py): they import each other by their own names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
