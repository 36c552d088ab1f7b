"""From a dataset's row to token ids whose every label is known.

`row` reads any row, and `message` each of its messages, into the one form of `conversation`;
`tokenizer` opens a Tekken tokenizer, `render` joins the two, by the `rules` of its version, into
ids, the kind of each token and the message that it came from. Preview and training read the same
arrays.
"""
