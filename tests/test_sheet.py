"""A sheet shows every picture once, in its place, and says what was asked for."""

import numpy as np
import torch

from eval.sheet import GAP, MARGIN, sheet


def test_pictures_are_in_their_places_and_text_is_beside_them():
    tones = torch.arange(6, dtype=torch.uint8).mul(40)[:, None, None, None].expand(6, 3, 8, 8)
    page = np.array(sheet({"true renders": tones[:3], "student": tones[3:]}, ["a cube", "a cone", "a torus"], 32))
    places = [(y * (32 + GAP) + 16, MARGIN + x * (32 + GAP) + 16) for y in range(2) for x in range(3)]
    assert [int(page[place][0]) for place in places] == [0, 40, 80, 120, 160, 200]
    assert page[: 2 * (32 + GAP), : MARGIN - GAP].min() < 128  # names of rows
    assert page[2 * (32 + GAP) :, MARGIN:].min() < 128  # captions
