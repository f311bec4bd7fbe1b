"""The solids world: scenes of one to four solids with captions, rendered from signed distance functions.

Nothing is stored: scene i is a function of its seed alone, and its boxes, masks, counts, depth and shape are known.
"""

from models.scene.solids.rendering import Rendered, backdrop, boxes_around, render
from models.scene.solids.scenes import FLOOR, RGB, Scene, Solid, sample_scene, sample_turntable
from models.scene.solids.shapes import unit_sdf
from models.scene.solids.world import Solids, contact_sheet

__all__ = [
    "FLOOR",
    "RGB",
    "Rendered",
    "Scene",
    "Solid",
    "Solids",
    "backdrop",
    "boxes_around",
    "contact_sheet",
    "render",
    "sample_scene",
    "sample_turntable",
    "unit_sdf",
]
