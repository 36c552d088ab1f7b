"""What a person decides before a run, and what follows from it, without a screen."""
