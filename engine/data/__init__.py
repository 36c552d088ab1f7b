"""From files of rows to the arrays that training reads.

`sources` finds the files of a dataset, in a folder by `folders`, and reads their rows by `formats`:
`content` opens them, `json_rows` and `tables` know two of the formats; rows of the hub come through
a worker. `rows` renders them with their images, `shape` and `checkup` report on them and `preview`
shows them. `prepare` writes them as the memory-mapped arrays that `prepared` opens, selects from
and packs into bins. `worker` answers the `requests` of the wizard in a process of its own.
"""
