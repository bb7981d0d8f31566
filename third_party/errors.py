"""The error that frameworks have in common; kinds of it stand where they are raised."""

from dpm_core.errors import DecayPruningError


class AdapterError(DecayPruningError, ValueError):
    """A framework cannot do what is asked of it. The message says why, and what to change."""
