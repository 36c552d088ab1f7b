"""What draws: the console script and the progress of a run in the foreground.

Everything that decides is in `engine`; nothing there imports this.
"""
