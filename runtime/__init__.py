"""Run HealthGPT bundles: a medical picture and words in, text or a picture out."""

import os

# ONNX Runtime 1.29 and later give every machine an identifier, keep events in the user's cache and send them to their
# maker, and can be told not to only before they are imported (microsoft/onnxruntime, pull request 27379).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from .decoding import Sampling
from .errors import Cancelled, HealthGPTError
from .images import read_study, write_image, write_report
from .results import Answer, Picture
from .session import Session, load

__all__ = [
    "Answer",
    "Cancelled",
    "HealthGPTError",
    "Picture",
    "Sampling",
    "Session",
    "load",
    "read_study",
    "write_image",
    "write_report",
]
