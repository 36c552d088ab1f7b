"""From files of rows to the arrays that training reads.

`sources` reads rows, `rows` renders them, `checkup` reports on them, `prepare` writes them as
memory-mapped arrays, `pack` puts them into bins, `worker` serves all of it to the wizard from a
process of its own.
"""
