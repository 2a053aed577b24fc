"""The one exception that commands show as a sentence instead of a traceback, and what a process ended with."""

import re
from collections.abc import Sequence

ERROR = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*([Ee]rror|Exception): .")


class FuraError(Exception):
    """Something the user can mend. The message is one clear sentence that names the cause and, if known, the remedy."""


def last_error(lines: Sequence[str]) -> str | None:
    """Of a process's output, the last line that begins with an error and its message, a rank of torchrun's before it or
    not; None if there is none."""
    return next((line for line in reversed(lines) if ERROR.match(line)), None)
