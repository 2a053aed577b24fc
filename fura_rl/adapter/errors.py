"""The adapter's own exception."""

from ..errors import FuraError


class AdapterError(FuraError, ValueError):
    """A mistake in how an adapter is configured, built, loaded or merged. Also a ValueError, as PEFT's users expect."""
