"""The small trained checkpoint that comes with the package; see RECIPE.md beside it for the command that made it."""

from pathlib import Path

from loopwise.hub.checkpoints import load
from loopwise.models.looped_lm import LoopedLM

FOLDER = Path(__file__).parent / "checkpoint"


def load_shipped() -> LoopedLM:
    """The shipped model in float32: a CPU multiplies bfloat16 slowly."""
    return load(FOLDER, dtype="float32")
