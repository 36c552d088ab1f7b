"""What a result needs to be used by others: its model card, how it is served, its way to the hub.

No torch: all of it is read from the run's own files, so that the trainer writes the same card at
the end of a run as a command does years later.
"""
