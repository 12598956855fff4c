"""What predictions cost, in forwards of the denoiser."""

COST_OF_BACKWARD = 2


def cost_of_prediction(guidance_scale: float) -> int:
    """Forwards in one prediction: guidance needs the unconditional one too."""
    return 1 if guidance_scale == 1.0 else 2
