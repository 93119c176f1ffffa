"""What the user did wrong, said in one clear line, and the exit statuses of the commands."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

USER_ERROR, INTERRUPTED = 2, 130


class UserError(Exception):
    """A mistake that the user can mend: the message names the file, row or setting and the fix."""


def suggest(word: str, options: Iterable[str], n: int = 3) -> str:
    """' Did you mean x or y?' for the options nearest to `word`; '' where none is near."""
    near = difflib.get_close_matches(word, list(options), n=n, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def run_command(command: Callable[[], object]) -> None:
    """Run a verb and turn its outcome into an exit status: 0 done, 2 the user's mistake, 130 Ctrl-C.

    Anything else is a bug of ours and keeps its traceback (status 1).
    """
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)
