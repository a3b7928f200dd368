"""DINOv2: a vision encoder alone."""

from __future__ import annotations

from qe_edge.models.image_processors import CropValues, load_image_processor
from qe_edge.models.vision_encoder import PictureProcessor, VisionEncoder


class Dinov2(VisionEncoder):
    """Any `Dinov2Model` of transformers. Positions are stretched to the size that the image processor gives."""

    model_type = "dinov2"
    layer = "Dinov2Layer"

    def load_processor(self, folder: str) -> PictureProcessor:
        """The PIL image processor of `folder`."""
        return PictureProcessor(load_image_processor(folder, "bit", CropValues))
