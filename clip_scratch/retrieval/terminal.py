"""Thumbnails in terminals that can show pictures: kitty's graphics protocol, and iTerm2's inline images."""

import base64
import io
import os
import sys
from pathlib import Path

from PIL import Image

_LINES, _PIXELS = 5, 160
_CHUNK = 4096  # of kitty's protocol


def thumbnail(path: Path) -> str:
    """The escape sequence that draws an image file, five lines high; "" where the output cannot show it.

    https://sw.kovidgoyal.net/kitty/graphics-protocol/ and https://iterm2.com/documentation-images.html
    """
    kitty = "KITTY_WINDOW_ID" in os.environ or os.environ.get("TERM") in ("xterm-kitty", "xterm-ghostty")
    iterm = os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm")
    if not (kitty or iterm) or not sys.stdout.isatty():
        return ""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * _PIXELS, 2 * _PIXELS))
            image = image.convert("RGB")
            image.thumbnail((_PIXELS, _PIXELS))
            image.save(buffer, "png")
    except Exception:  # a picture that is gone or damaged since it was indexed has no thumbnail
        return ""
    data = base64.standard_b64encode(buffer.getvalue()).decode()
    if iterm and not kitty:
        return f"\033]1337;File=inline=1;height={_LINES}:{data}\a "
    chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    parts = [f"\033_Gm={int(i + 1 < len(chunks))};{chunk}\033\\" for i, chunk in enumerate(chunks)]
    parts[0] = parts[0].replace("\033_G", f"\033_Ga=T,f=100,r={_LINES},", 1)
    return "".join(parts) + " "
