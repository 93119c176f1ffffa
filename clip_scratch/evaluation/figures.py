"""Pictures of measurements, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..training.checkpoint import write_atomically


def write_figure(figure, path: str | Path) -> Path:
    """Write a matplotlib figure in the format of the path's ending. Raises UserError where it cannot be written."""
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    kinds = figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UserError(f"cannot write the picture {path}: its name ends in none of {', '.join(sorted(kinds))}")
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
    return path
