"""Run HealthGPT bundles: a medical picture and words in, text or a picture out."""

from .decoding import Sampling
from .errors import HealthGPTError
from .images import write_image
from .results import Answer, Picture
from .session import Session, load

__all__ = ["Answer", "HealthGPTError", "Picture", "Sampling", "Session", "load", "write_image"]
