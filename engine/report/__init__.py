"""What a person is told, once for every printer: facts become lines, and nothing is drawn here.

    line        a line: mark, label, text, detail; which verdict and which severity has which mark
    machine     a computer: its cards, what is installed and what is missing
    models      a model on a device: verdict, method, size
    data        rows: a bad one, what to know, how much is learned
    plan        a plan: verdict, parts, time, what would make it fit, on which card
    memory_bar  where its memory goes
    fit         what a config took when it was measured
    events      an event of a run
    run         where a run is, and what its last evaluation said
    results     what a run changed

Commands, questions and the full screen print these lines; how a mark looks where there is no colour
or no letter for it is theirs to say. A module a subject, and this package imports only `line`, so
that the first frame of the wizard waits for no other.
"""

from engine.report.line import SEVERITY_MARKS, VERDICT_MARKS, Line, Mark

__all__ = ["SEVERITY_MARKS", "VERDICT_MARKS", "Line", "Mark"]
