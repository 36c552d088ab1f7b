"""What a config's run really takes, measured in a few steps on weights that are drawn.

Apart from `run`, which trains: nothing here is kept, and no weight has to be downloaded first. What
holds the weights, what is trained and how a step is made are a run's own functions.

random_weights  tensors that stand in for a model's files
reduced   the smaller model that a computer without a GPU builds
batches   the batch that decides the memory
gauges    the worst moment of a piece of work
measuring from a config to the figures
"""

from engine.train.fitcheck.measuring import check

__all__ = ["check"]
