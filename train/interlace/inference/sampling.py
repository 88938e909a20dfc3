"""How answers are drawn, and which frames of videos are asked for; without torch, so that a mistake is told at once."""

import math
from dataclasses import dataclass

from interlace.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy by default; the names and meanings are those of transformers' `generate`.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 leave no token out. `repetition_penalty` counts the question too. With a `seed` the same question
    behind the same turns has the same answer.

    Raises:
        InputError: values out of range, all of them named.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "at least 0"),
        }
        wrong = [f"{name}: expected {expected}, got {getattr(self, name)}" for name, (is_right, expected) in checks.items() if not is_right]
        if wrong:
            raise InputError("; ".join(wrong))

    @property
    def idle(self) -> list[str]:
        """The settings that have a value and no effect: the likeliest token is drawn whatever they say."""
        return [name for name, given in (("top_p", self.top_p < 1), ("top_k", self.top_k), ("seed", self.seed is not None)) if given and not self.temperature]


def check_frames(num_frames: int, video_fps: float | None) -> None:
    """Whether so many frames of a video can be taken, at most and per second.

    Raises:
        InputError: values out of range, all of them named.
    """
    wrong = [f"num_frames: expected at least 1, got {num_frames}"] if num_frames < 1 else []
    if video_fps is not None and not 0 < video_fps < math.inf:
        wrong.append(f"video_fps: expected above 0, got {video_fps}")
    if wrong:
        raise InputError("; ".join(wrong))
