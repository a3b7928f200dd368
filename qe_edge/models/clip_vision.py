"""CLIP's and SigLIP's vision encoders alone."""

from __future__ import annotations

from qe_edge.models.image_processors import CropValues, SquareValues, check_equal, load_image_processor
from qe_edge.models.vision_encoder import PictureProcessor, VisionEncoder


class ClipVision(VisionEncoder):
    """Any `CLIPVisionModel` of transformers."""

    model_type = "clip_vision_model"
    layer = "CLIPEncoderLayer"

    def load_processor(self, folder: str) -> PictureProcessor:
        """The PIL image processor of `folder`.

        Raises:
            ModelError: If it gives pictures another size than the encoder's.
        """
        processor = PictureProcessor(load_image_processor(folder, "clip", CropValues))
        check_equal(folder, "the pictures' size", self.picture_size(processor), (self.config.image_size,) * 2)
        return processor


class SiglipVision(VisionEncoder):
    """Any `SiglipVisionModel` of transformers. There is no token that stands for the picture as a whole."""

    model_type = "siglip_vision_model"
    layer = "SiglipEncoderLayer"
    class_token = False

    def load_processor(self, folder: str) -> PictureProcessor:
        """The PIL image processor of `folder`.

        Raises:
            ModelError: If it gives pictures another size than the encoder's.
        """
        image_processor = load_image_processor(folder, "siglip", SquareValues)
        size = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", size, [self.config.image_size] * 2)
        return PictureProcessor(image_processor)
