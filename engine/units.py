"""Sizes of memory as people say them.

Apart from those who measure (`hardware`), predict (`plan`) and draw (`tui`), who all say them.
"""

GIB = 2**30


def gib(size: int) -> str:
    """A size in bytes as people say it: 19.8 GiB, and MiB below a quarter of one."""
    return f"{size / GIB:,.1f} GiB" if abs(size) >= GIB // 4 else f"{size / 2**20:,.1f} MiB"
