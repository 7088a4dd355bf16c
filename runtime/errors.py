"""The exceptions a caller can get: one tree, one class per subject.

Every message names what was expected and what was found, and never holds pixels, prompts or DICOM values.
"""


class HealthGPTError(Exception):
    """Base of every error raised on purpose; the command line turns it into exit code 2."""


class ImageError(HealthGPTError):
    """A picture cannot be read, is too large, or is of a kind that is not supported."""


class PromptError(HealthGPTError):
    """A question or instruction cannot be turned into token ids."""


class BundleError(HealthGPTError):
    """A bundle is damaged, unknown, or does not hold what was asked for."""


class CheckpointError(HealthGPTError):
    """A released file is missing, malformed, or disagrees with the others."""


class ExecutorError(HealthGPTError):
    """The engine that runs the graphs is missing or refused them."""


class GenerationError(HealthGPTError):
    """The model's output is unusable: not finite, or not the codes of one image."""


class KeptError(HealthGPTError):
    """A file of kept pictures is damaged, of another bundle or executor, or too large."""


class BenchmarkError(HealthGPTError):
    """A row is unknown or does not fit the bundle, or what was to be timed computes something else."""
