"""The one error a person sees: what happened, why, and what to do about it."""

WORK_FAILED, WRONG_REQUEST, DOES_NOT_FIT = 1, 2, 3
"""Exit statuses; the last one is of what does not fit in memory."""


class UserError(Exception):
    """A request or a piece of work that could not be carried out, in three sentences.

    `exit_status` is what a command leaves with: 2 when the request was wrong, 1 when the work
    failed, 3 when it does not fit in memory.
    """

    def __init__(self, what: str, why: str, fix: str, *, exit_status: int = WRONG_REQUEST) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix
        self.exit_status = exit_status

    def __str__(self) -> str:
        return f"{self.what} {self.why} {self.fix}"


class WorkError(UserError):
    """The request was right and the work failed: exit status 1."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix, exit_status=WORK_FAILED)
