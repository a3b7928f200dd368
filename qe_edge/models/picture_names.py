"""Names of the inputs and outputs of the graph that prepares a picture, for those who write it and those who run it."""

IMAGE, PICTURES = "image", "pictures"  # inputs: a picture, and how many the prompt has
PLACEHOLDER_IDS, PLACEHOLDER_POSITIONS = (
    "placeholder_ids",
    "placeholder_positions",
)  # outputs, beside the encoder's own
