"""The typed errors of fastee: every one names what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FasteeError(Exception):
    """Base of the errors that are fastee's own; bad arguments raise plain ``TypeError`` or ``ValueError``."""


class BackendUnavailable(FasteeError, RuntimeError):
    """An explicitly chosen backend cannot run; the message gives its reason."""


class CannotCut(FasteeError, ValueError):
    """The backbone cannot be cut at the asked place; the message names the place and the values that cross it."""


class CannotExport(FasteeError, ValueError):
    """A segment cannot be written in the asked format; the message names the segment, the node and the module's path."""


class CannotCompile(FasteeError, ValueError):
    """numba cannot compile a user's rule or policy; the message names the construct and its line."""


class NotCalibrated(FasteeError, RuntimeError):
    """An operation needs thresholds, a profile or heads that were never set."""


class NoPlan(FasteeError, ValueError):
    """No plan keeps every limit; the message names the limit and how far it is missed."""


class CheckpointMismatch(FasteeError, ValueError):
    """A file belongs to another backbone, version or format."""


class FrameError(FasteeError, ValueError):
    """Bytes from a peer are not a frame that this program may act on."""


class FingerprintMismatch(FrameError):
    """A frame or a peer belongs to another model."""


class ClusterError(FasteeError, RuntimeError):
    """A cluster could not do what was asked."""


class PeerLost(ClusterError):
    """A node left and no other node could take its work."""


class DeadlineExceeded(ClusterError, TimeoutError):
    """No answer could be had before the deadline plus its grace."""


class Rejected(ClusterError):
    """Admission refused the task; nothing was executed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
