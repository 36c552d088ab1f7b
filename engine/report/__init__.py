"""What a person is told, once for every printer: facts become lines, and nothing is drawn here.

    line        a line: mark, label, text, detail; which verdict and which severity has which mark
    plan        a plan: verdict, parts, time, what would make it fit, on which card

Commands, questions and the full screen print these lines; how a mark looks where there is no colour
or no letter for it is theirs to say. A module a subject, and this package imports only `line`, so
that the first frame of the wizard waits for no other.
"""

from engine.report.line import SEVERITY_MARKS, VERDICT_MARKS, Line, Mark

__all__ = ["SEVERITY_MARKS", "VERDICT_MARKS", "Line", "Mark"]
