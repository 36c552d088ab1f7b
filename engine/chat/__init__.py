"""From a dataset's row to token ids whose every label is known.

`messages` reads any row into one internal form, `tokenizer` opens a Tekken tokenizer, `render`
joins the two into ids, the kind of each token and the message that it came from. Preview and
training read the same arrays.
"""
