"""What can go wrong, as types. Every message names the cause and the remedy.

Whatever raises one of these raises it before anything has been changed: parameters, gradients,
optimizer state and phases are what they were.
"""


class DecayPruningError(Exception):
    """Base of all errors raised by the core."""


class ConfigurationError(DecayPruningError, ValueError):
    """A setting is out of range or contradicts another one."""


class GroupError(DecayPruningError, ValueError):
    """A slice or a structure group is not something the core can decay."""


class PhaseError(DecayPruningError, ValueError):
    """A structure is not in the phase that the request needs."""


class AttachmentError(DecayPruningError, RuntimeError):
    """The order of calls is wrong, or the optimizer does not fit the groups."""


class GradientError(DecayPruningError, RuntimeError):
    """A gradient, a norm or a loss is not finite, or has an unsupported layout."""


class StateError(DecayPruningError, ValueError):
    """A state dict is damaged, of another version, or of other groups."""


class DisagreementError(DecayPruningError, RuntimeError):
    """The processes that train one model differ in steps, decisions, weights or gradients."""


def first_line(cause: BaseException) -> str:
    """What went wrong, without the advice that PyTorch adds over many lines."""
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def kind_and_line(cause: BaseException) -> str:
    """The error's type as well, where the line alone would not say what it is of."""
    line = first_line(cause)
    return line if line == type(cause).__name__ else f"{type(cause).__name__}: {line}"
