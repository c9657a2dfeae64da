"""The one hierarchy of errors. Each is also the standard-library error it stands for.

A `UserError` is something the person at the keyboard can mend. Its message is one line: what was given,
what is allowed, what to type next. The command line prints it without a traceback and exits with 2.
"""


class LoopwiseError(Exception):
    """Base of every error that Loopwise raises on purpose."""


class UserError(LoopwiseError):
    """A mistake that the caller can mend; printed as one line."""


class ConfigError(UserError, ValueError):
    """A configuration value, key, rule or option that is not allowed."""


class InputError(UserError, ValueError):
    """Tokens, text or tensors that the model cannot take (too long, empty, out of range)."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is corrupt, truncated, or does not fit the model it claims to be."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder, run or hub id that is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class StorageError(UserError, OSError):
    """The disk refused: full, read-only, or gone."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the install command."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; type: pip install 'loopwise[{extra}]'")


class LoopRangeWarning(UserWarning):
    """More loops were asked for than the model has seen in training."""


class CheckpointWarning(UserWarning):
    """A checkpoint was not taken quite as it stands: a mix of dtypes made one, or a broken one passed over."""
