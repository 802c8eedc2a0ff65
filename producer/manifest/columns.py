"""What the name of a column plainly means, so that no column is passed over in silence for a slip of the hand.

The words of ordinary catalogues (weight, speed, quantity) must mean nothing here: who has such columns has done nothing
wrong.
"""

import re
from itertools import takewhile

from producer.jobs.contract import Submission

FIELDS = dict.fromkeys(Submission.model_fields)
SIZE = "size"
ELSEWHERE = {
    "num_inference_steps": "steps",
    "inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "width_px": "width",
    "height_px": "height",
    "negative": "negative_prompt",
}
"""What diffusers, other programs and this farm's own answers call a field."""
SLIP_MIN_CHARACTERS = 5
"""Shorter names are a letter away from too many words: seed and need, name and game."""
WORDS = frozenset({"formal", "formats", "heights", "qualify", "stems", "stews", "stops", "widths"})
"""A letter away from a field, and words of their own that a catalogue may have."""


def meant(column: str) -> str | None:
    """The field that ``column`` means, whatever its case and with spaces or hyphens between its words; or from which it
    differs by one slip."""
    plain = re.sub(r"[\s_-]+", "_", column.strip().lower())
    if plain in FIELDS or plain == SIZE:
        return plain
    if plain in ELSEWHERE or plain in WORDS or not plain.replace("_", "").isalpha():  # prompt2 is no slip
        return ELSEWHERE.get(plain)
    return next((field for field in FIELDS if _is_slip(plain, field)), None)


def _is_slip(column: str, field: str) -> bool:
    """Whether, behind the first letter, one is wrong, missing or too much, or two have changed places."""
    if min(len(column), len(field)) < SLIP_MIN_CHARACTERS or abs(len(column) - len(field)) > 1:
        return False
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(column, field, strict=False)))
    rest, right = column[alike:], field[alike:]
    one_letter = rest[1:] == right[1:] or rest[1:] == right or rest == right[1:]
    return alike > 0 and (one_letter or (rest[1::-1], rest[2:]) == (right[:2], right[2:]))
