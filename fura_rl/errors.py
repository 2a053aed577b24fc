"""The one exception that commands show as a sentence instead of a traceback."""


class FuraError(Exception):
    """Something the user can mend. The message is one clear sentence that names the cause and, if known, the remedy."""
