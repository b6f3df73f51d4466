"""Deprecations that transformers tells of, and whose code they are about."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import transformers

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "hivtp_hf"
_LIBRARIES = ("site-packages", str(Path(logging.__file__).parents[1]))
_REMOTE_CODE = "transformers_modules"
# About the arguments that a caller of `generate` gave, as transformers' own pipelines and assistants do; ours hands them on.
_ABOUT_CALLERS = ("Passing `generation_config` together with generation-related arguments",)

# About names of torch that torch.compile itself reads while it traces, not our code.
_OF_TORCH = tuple(f"'has_{name}' is deprecated" for name in ("cuda", "cudnn", "mps", "mkldnn"))


class DeprecationWatch(logging.Handler):
    """Collects what transformers calls deprecated where our code, in the package or beside a checkpoint, made it do so.

    Attributes:
        found: the messages, each with the line of ours.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.notice(record.getMessage())

    def notice(self, message: str) -> None:
        caller = next(_callers(sys._getframe()), None)
        if message.startswith((*_ABOUT_CALLERS, *_OF_TORCH)):
            return
        if "deprecated" in message and caller is not None and is_ours(caller.f_code.co_filename):
            self.found.append(f"{caller.f_code.co_filename}:{caller.f_lineno}: {message}")


@contextlib.contextmanager
def watched_deprecations() -> Iterator[DeprecationWatch]:
    """Watches what is logged and what is warned of. A filter of warnings would not do: they name a line of transformers."""
    watch = DeprecationWatch()
    logger = transformers.utils.logging.get_logger("transformers")
    warn = warnings.warn

    def noticed(message, category=None, stacklevel=1, **more):
        watch.notice(str(message))
        warn(message, category, stacklevel + 1, **more)

    transformers.utils.logging.warning_once.cache_clear()  # else it says so once a process
    logger.addHandler(watch)
    warnings.warn = noticed
    try:
        yield watch
    finally:
        warnings.warn = warn
        logger.removeHandler(watch)


def is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(PACKAGE) or _REMOTE_CODE in filename


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames that are neither a library's nor this file's, innermost first."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename != __file__ and (_REMOTE_CODE in filename or not any(part in filename for part in _LIBRARIES)):
            yield frame
        frame = frame.f_back
