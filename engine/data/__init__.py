"""From files of rows to the arrays that training reads.

`sources` reads rows (`readers` by file format, `samples` by name, `hub` through a child), `rows`
renders them, `shape` and `checkup` report on them and `preview` shows them. `prepare` writes them
with `array_writer` as the memory-mapped arrays that `prepared` opens; `pack` puts those into bins.
`worker` answers the `requests` of the wizard in a process of its own.
"""
