"""Where progress is shown: in a terminal and in a notebook, unless somebody says otherwise.

What goes into a file or a pipe is no place for a bar that moves: there nothing is shown, and `logging.getLogger("qgraft")`
has a line for each log of a run, at the level INFO.
"""

import logging
import sys

from rich.console import Console

LOGGER = logging.getLogger("qgraft")


def shown(progress: bool | Console | None) -> Console | None:
    """The console that progress goes to; None for none.

    Args:
        progress: True and False are obeyed, a console is taken as it is; None: where somebody is watching.
    """
    if isinstance(progress, Console):
        return progress
    if progress is None:
        progress = (sys.stderr is not None and sys.stderr.isatty()) or Console().is_jupyter
    return Console(stderr=True) if progress else None
