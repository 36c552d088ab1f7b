"""Everything that Windtunnel does, without drawing anything. Imports go down this list, never up.

    cli/        the headless commands, a module a subject
    report/     what a person is told, as lines that commands, questions and screens print
    train/      the trainer's process: the only room with torch; started by name, imported by nobody
    wizard/     what a person decides before a run, and what follows from it, without a screen
    launch      starts a trainer, detached or in the foreground, and restarts a dead one
    publish/    a result for others: model card, commands that serve it, its way to the hub
    plan/       will it fit, and what to run: memory by part, targets, a whole config with reasons
    data/       rows from files and the hub, checked, tokenized once, packed
    chat/       any row -> one internal form -> token ids, the kind and the source of each
    catalog/    the named models, and any allowed config.json as one table of modules
    hardware/   GPUs through their driver, memory, disk, packages; what can be planned for
    runs/       run folders: where they are, who works in them, what they say, how to ask them
    config/     RunConfig: Axolotl's keys, read with all problems at once, written with reasons
    events      the vocabulary of events.jsonl
    child       a process that answers in lines of JSON, and the environment of all of them
    errors      UserError(what, why, fix): the only error a person sees
    files       a file that is written whole, or not at all
    interrupt   ctrl+c at every moment, with exit status 130
    pace        how often something is reported
    units       sizes as people say them
    visible     text of strangers made safe for a terminal

A run goes through them from the bottom up: a config names a dataset and a model; `data` turns rows
into arrays through `chat`; `launch` fills a folder of `runs` and starts `train` there, which writes
`events`. Two files carry every hand-over: config.yml and events.jsonl.
"""
