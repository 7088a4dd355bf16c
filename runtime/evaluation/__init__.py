"""How good a bundle's answers and pictures are, on cases of one's own or on the phantom's held-out slices."""

from .cases import Case, check_cases, phantom_cases, read_cases
from .evaluate import Evaluation, Outcome, evaluate

__all__ = ["Case", "Evaluation", "Outcome", "check_cases", "evaluate", "phantom_cases", "read_cases"]
