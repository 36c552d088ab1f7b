"""A run on a cluster: the script that Slurm takes, what has to be there before it is sent, and the
same job for NeMo AutoModel, which cuts a model along its layers too.

Only text is made here: a job is started by Slurm, and each of its nodes by the same `windtunnel
train` as a desk.
"""
