"""What a config's run really takes, measured in a few steps on weights that are drawn.

Nothing of it is kept, and no weight has to be downloaded first. What holds the weights, what is
trained and how a step is made are a run's own functions.

stand_in  the model that is measured: reduced without a GPU, its weights drawn
batches   the batch that decides the memory
peak_memory  the worst moment of a piece of work
trial     from a config to the figures
"""

from engine.train.fitcheck.trial import check

__all__ = ["check"]
