"""What an answer or a picture is worth beside the expected one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float64]


def answer_scores(answer: str, expected: str) -> dict[str, float]:
    """`exact` and `recall`."""
    return {"exact": float(is_right(answer, expected)), "recall": recall(answer, expected)}


def picture_scores(
    picture: npt.ArrayLike, target: npt.ArrayLike, baseline: npt.ArrayLike | None = None
) -> dict[str, float]:
    """`psnr` and `ssim`, and those of a `baseline`."""
    scores = {"psnr": psnr(picture, target), "ssim": ssim(picture, target)}
    if baseline is not None:
        scores |= {"baseline_psnr": psnr(baseline, target), "baseline_ssim": ssim(baseline, target)}
    return scores


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for letter case, surrounding spaces and a full stop at the end."""
    return _bare(answer) == _bare(expected)


def recall(answer: str, expected: str) -> float:
    """The share of the expected answer's different words that occur in the answer, letter case aside.

    For "yes" or "no" it is whether the answer says so at all, for longer ones the score of open questions in LLaVA-Med
    (Li et al., 2023, section 5). An expected answer without words counts as `is_right` does.
    """
    wanted = _words(expected)
    return len(wanted & _words(answer)) / len(wanted) if wanted else float(is_right(answer, expected))


def chance(expected: Sequence[str]) -> float:
    """The share of questions that the most frequent of their expected answers would get right."""
    return Counter(map(_bare, expected)).most_common(1)[0][1] / len(expected)


def psnr(picture: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255; infinite for equal pictures.

    Pictures are [H, W], or [H, W, 3] of which the channels' mean is taken. Raises ValueError.
    """
    first, second = _pair(picture, target)
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(picture: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean structural similarity over 7x7 uniform windows (Wang et al., 2004, eq. 13; sample covariance).

    Pictures are as for `psnr`. Raises ValueError.
    """
    first, second = _pair(picture, target)
    mean_first, mean_second = _window_mean(first), _window_mean(second)
    unbiased = 49 / 48
    variance_first = unbiased * (_window_mean(first * first) - mean_first**2)
    variance_second = unbiased * (_window_mean(second * second) - mean_second**2)
    covariance = unbiased * (_window_mean(first * second) - mean_first * mean_second)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_first * mean_second + c1) / (mean_first**2 + mean_second**2 + c1)
    structure = (2 * covariance + c2) / (variance_first + variance_second + c2)
    return float(np.mean(luminance * structure))


def _bare(answer: str) -> str:
    return answer.strip().removesuffix(".").casefold()


def _words(answer: str) -> set[str]:
    return set(re.findall(r"\w+", answer.casefold()))


def _pair(picture: npt.ArrayLike, target: npt.ArrayLike) -> tuple[Field, Field]:
    first, second = (np.asarray(value, dtype=np.float64) for value in (picture, target))
    first, second = (value.mean(axis=2) if value.ndim == 3 else value for value in (first, second))
    if first.shape != second.shape or first.ndim != 2 or min(first.shape) < 7:
        raise ValueError(f"expected two pictures of one shape, at least 7x7, got {first.shape} and {second.shape}")
    return first, second


def _window_mean(values: Field) -> Field:
    """The mean of every 7x7 window: [H, W] -> [H-6, W-6]."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (7, 7))
    mean: Field = windows.mean(axis=(2, 3))
    return mean
