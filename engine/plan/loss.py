"""How a run computes its loss: in chunks of logits, and how large, or by cut-cross-entropy.

Planner and trainer both read it, so that what is counted is what runs.
"""

from engine.config import RunConfig

MIB = 2**20
CHUNK_BYTES = (512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB)
"""Float32 logits of one chunk, the best first: 1,024 rows at 131,072 words. Each chunk reads the
whole head twice, so 128 rows keep a card waiting for its memory; 512 rows keep it computing."""
SMALLEST_CHUNK_BYTES = CHUNK_BYTES[-1]
"""Where room is short, on a CPU, and of every evaluation, whose figures thus depend on no plan. On
two cores 8 MiB took 1.5 times as long and 128 MiB 0.92 times (336 learned tokens, width 128)."""
PLUGIN = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"

PRICE = (
    "gradients of the states are added up in bfloat16: off by 2.2 % instead of 0.2 %, and not"
    " repeatable"
)
"""Of cut-cross-entropy, simulated in torch at 131,072 words and a width of 1,024: it rounds each of
1,024 additions to a number, in an order that locks decide."""


def names_cut_loss(config: RunConfig) -> bool:
    """Whether `config` asks for cut-cross-entropy, which Axolotl's plugin of that name is."""
    if config.cut_cross_entropy is not None:
        return config.cut_cross_entropy
    return any(name.rpartition(".")[2] == "CutCrossEntropyPlugin" for name in config.plugins or ())


def chunk_rows(chunk_bytes: int, vocabulary: int) -> int:
    """States whose float32 logits one chunk holds; one at least."""
    return max(1, chunk_bytes // (4 * vocabulary))
