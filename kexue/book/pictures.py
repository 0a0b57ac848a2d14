"""PNG pictures in notebooks: made small, and compared as an eye would."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageFilter

REACH = 2
"""Pixels by which a line may move: 0.3 % of the text column."""
LEVELS = 32
"""Grey levels (of 255) by which a pixel may change, after a blur of one pixel."""
STRANGE = 1e-3
"""Share of pixels that may have no like within REACH: a marker or two that moved, not another curve."""
FAINT = 0.75
"""Mean change in grey levels of 16 x 16 blocks: moved lines cancel in it, a changed shade does not."""


def decode(png: str) -> bytes:
    """The bytes of a PNG stored in a notebook.

    Raises:
        ValueError: not base64, or not a PNG.
    """
    data = base64.b64decode("".join(png.split()), validate=True)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"expected a PNG, got data that begins with {data[:8]!r}")
    return data


def _pixels(data: bytes, blur: float = 0.0) -> np.ndarray:
    """(h, w, 3) grey levels as float32, on white."""
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(flat.filter(ImageFilter.GaussianBlur(blur)) if blur else flat, dtype=np.float32)


def _strange(picture: np.ndarray, other: np.ndarray) -> int:
    """Pixels of `picture` that have no like within REACH in `other`."""
    h, w, _ = picture.shape
    padded = np.pad(other, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    nearest = np.full((h, w), np.inf, dtype=np.float32)
    for dy in range(2 * REACH + 1):
        for dx in range(2 * REACH + 1):
            np.minimum(nearest, np.abs(picture - padded[dy : dy + h, dx : dx + w]).max(-1), out=nearest)
    return int((nearest > LEVELS).sum())


def difference(stored: bytes, fresh: bytes) -> str:
    """Why an eye would tell two PNGs apart; empty if it would not.

    Every pixel of one has to have its like within `REACH` pixels in the other, and both ways at most a share
    `STRANGE` may have none: rounding, antialiasing and a palette pass, another curve does not. Shades that
    change over an area without an edge are seen in the means of blocks (`FAINT`).

    Args:
        stored, fresh: two PNG files; their sizes may differ by `REACH` pixels.
    """
    if stored == fresh:
        return ""
    a, b = _pixels(stored, 1.0), _pixels(fresh, 1.0)
    if max(abs(m - n) for m, n in zip(a.shape, b.shape)) > REACH:
        return f"size {b.shape[1]} x {b.shape[0]} pixels, stored {a.shape[1]} x {a.shape[0]}"
    h, w = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    a, b = a[:h, :w], b[:h, :w]
    share = (_strange(a, b) + _strange(b, a)) / (h * w)
    if share > STRANGE:
        return f"{share:.2%} of the pixels have no like within {REACH} pixels (at most {STRANGE:.2%} may)"
    change = np.pad(a - b, ((0, -h % 16), (0, -w % 16), (0, 0)))
    faint = float(np.abs(change.reshape(change.shape[0] // 16, 16, -1, 16, 3).mean((1, 3))).mean())
    return f"blocks differ by {faint:.2f} grey levels on average (at most {FAINT} may)" if faint > FAINT else ""


def optimise(png: str) -> str:
    """The picture as the smallest PNG that looks the same, in base64.

    A palette of 256 colours is taken where it loses nothing, or where 999 pixels of 1000 stay within 16 levels
    of 255 and the mean within a quarter (the colours of antialiased edges); smooth shades stay as they are.
    """
    data = decode(png)
    exact = _pixels(data)
    picture = Image.fromarray(exact.astype(np.uint8))
    small = _encoded(picture.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE))
    change = np.abs(_pixels(small) - exact).max(-1)
    candidates = [data, _encoded(picture)]
    if np.quantile(change, 0.999) <= 16 and change.mean() <= 0.25:
        candidates.append(small)
    return base64.b64encode(min(candidates, key=len)).decode()


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
