"""What the user did wrong, in one clear line, and the exit statuses of the commands."""

import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable

USER_ERROR, INTERRUPTED = 2, 130
# What a disk or a file system may say at any time: it is full, read-only, gone, or not the user's
_DISK = {errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENODEV, getattr(errno, "EDQUOT", 0)}
_DISK |= {getattr(errno, "ESTALE", 0), errno.EMFILE, errno.ENFILE}
_NO_MEMORY = ("out of memory", "allocate memory", "could not create a primitive", "could not create a memory object")


class UserError(Exception):
    """A mistake that the user can fix: the message names the file, row or setting and the fix."""


def suggest(word: str, options: Iterable[str], n: int = 3) -> str:
    """' Did you mean x or y?' for the options nearest to `word`; '' where none is near."""
    near = difflib.get_close_matches(word, list(options), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, or a RuntimeError of torch or oneDNN, says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def run_command(command: Callable[[], object]) -> None:
    """Run a verb and turn its outcome into an exit status: 0 done, 2 the user's mistake, 130 Ctrl-C.

    Anything else is a bug of ours and keeps its traceback (status 1).
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as clip_scratch/__init__.py left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails too
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = _line_for(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _line_for(error: Exception) -> str | None:
    """What the user is told of an error; None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. What was saved before is whole" if error.errno in _DISK else None
    if isinstance(error, MemoryError | RuntimeError):
        if "DataLoader worker" in str(error):
            return "a process that decodes images was killed, perhaps for lack of memory: lower --num-workers"
        return "out of memory: free some memory, or use --device cpu" if is_out_of_memory(error) else None
    if "(os error 28)" in str(error):  # of safetensors, which raises no OSError
        return "no space left on the disk. What was saved before is whole"
    return None
