"""What is said of rows that a run leaves out."""

import pytest

from engine.data.statistics import LeftOut
from engine.report.data import left_out_line

LIMIT = "sequence_len (512)"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (LeftOut(100), ""),
        (LeftOut(100, bad=5), "· 5 of 100 rows left out: 5 that cannot be used"),
        (
            LeftOut(100, bad=50, judged=49),
            "· 50 of 100 rows left out: 1 that cannot be used, 49 that field_label judges false",
        ),
        (
            LeftOut(100, bad=1, too_long=3, nothing_learned=2),
            "! 6 of 100 rows left out: 1 that cannot be used,"
            f" 3 longer than {LIMIT}, 2 with nothing to learn",
        ),
        (
            LeftOut(100, too_long=2, image_rows=2, images_left_out=2),
            f"! 2 of 100 rows left out: 2 longer than {LIMIT}; all 2 rows with images among them",
        ),
        (
            LeftOut(100, too_long=2, image_rows=3, images_left_out=2),
            f"· 2 of 100 rows left out: 2 longer than {LIMIT}",
        ),
        (LeftOut(100, cut=99), f"· 99 rows cut at {LIMIT}"),
    ],
)
def test_rows_that_are_left_out_by_reason(left: LeftOut, said: str) -> None:
    line = left_out_line(left, 512)
    assert (f"{line.mark} {line.text}" if line else "") == said
