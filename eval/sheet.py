"""A sheet of pictures to look at: a named row for each generator, the prompts under the columns."""

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, MARGIN, LINE = 6, 104, 13
"""Pixels between pictures, for the names of rows, and of a line of text."""


def sheet(rows: Mapping[str, Tensor], captions: Sequence[str], side: int = 128) -> Image.Image:
    """``rows`` (n, 3, H, W) uint8 by name, enlarged by a whole factor to at least ``side``, over their n captions."""
    height, width = next(iter(rows.values())).shape[2:]
    zoom = max(1, -(-side // width))
    step_x, step_y = zoom * width + GAP, zoom * height + GAP
    texts = [textwrap.wrap(caption, max(8, step_x // 6)) for caption in captions]
    depth = max((len(lines) for lines in texts), default=0) * LINE + GAP
    page = Image.new("RGB", (MARGIN + len(captions) * step_x, len(rows) * step_y + depth), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for y, (name, pictures) in enumerate(rows.items()):
        lines = "\n".join(textwrap.wrap(name, MARGIN // 6))
        canvas.text((MARGIN - GAP, (y + 0.5) * step_y), lines, "black", font, anchor="rm", align="right")
        for x, picture in enumerate(pictures):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
            page.paste(
                tile.resize((zoom * width, zoom * height), Image.Resampling.NEAREST), (MARGIN + x * step_x, y * step_y)
            )
    for x, lines in enumerate(texts):
        middle = MARGIN + x * step_x + (step_x - GAP) / 2
        canvas.text((middle, len(rows) * step_y), "\n".join(lines), "black", font, anchor="ma", align="center")
    return page
