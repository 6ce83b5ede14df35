"""A heat map as one PNG: a hundred layers by hundreds of buckets cost the browser one mark.

Letters: B buckets along x, L layers along y.
"""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from entropy_dashboard.theme import Palette

_NUM_COLORS = 253  # odd, so that 0 has its own colour
_UNDETERMINED, _HATCH = 253, 254
_MIN_WIDTH, _MIN_HEIGHT = 1000, 400
"""The browser smooths what it enlarges; so large, cells keep their edges."""
_HATCH_PERIOD = 9


def draw_diverging(values_BL: NDArray[np.floating], palette: Palette) -> str:
    """Draw values in [-1, 1], the first layer at the bottom; undetermined cells are grey with diagonal lines.

    Args:
        values_BL: the values; NaN is undetermined, which is not the colour of 0.
        palette: the colours.

    Returns:
        A ``data:`` URL.
    """
    known = np.isfinite(values_BL)
    # Beyond [-1, 1] there is only rounding: both alignments are cosines.
    unit = (np.clip(np.where(known, values_BL, 0), -1, 1) + 1) / 2
    codes = np.where(known, np.rint(unit * (_NUM_COLORS - 1)), _UNDETERMINED).astype(np.uint8)
    num_buckets, num_layers = codes.shape
    image = np.repeat(codes, -(-_MIN_WIDTH // max(1, num_buckets)), axis=0)
    image = np.repeat(image, -(-_MIN_HEIGHT // max(1, num_layers)), axis=1).T[::-1]
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    lines = (rows + columns) % _HATCH_PERIOD < 2
    image = np.where((image == _UNDETERMINED) & lines, np.uint8(_HATCH), image)
    picture = Image.fromarray(np.ascontiguousarray(image), mode="L")
    picture.putpalette(_color_table(palette))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@lru_cache
def _color_table(palette: Palette) -> bytes:
    stops = np.array([_rgb(color) for color in palette.diverging], float)
    where = np.linspace(0, 1, len(stops))
    ramp = [np.interp(np.linspace(0, 1, _NUM_COLORS), where, stops[:, channel]) for channel in range(3)]
    colors = [np.stack(ramp, axis=1), [_rgb(palette.undetermined), _rgb(palette.hatch)]]
    return np.rint(np.concatenate(colors)).astype(np.uint8).tobytes()


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
