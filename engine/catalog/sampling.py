"""How a model's makers say it should be asked: temperature, top_p and the longest answer.

Apart from `cards` because a card has two sets, one for thinking, and which of them counts depends
on the repository and on what is asked.
"""

from engine.catalog.cards import Sampling, find_model, find_repository, model_names

GREEDY = Sampling(temperature=0.0, top_p=1.0)


def official_sampling(base_model: str, reasoning_effort: str | None = None) -> Sampling:
    """The official settings for an answer of a catalog name or hub id; greedy where none are known.

    A model that thinks on request thinks unless the effort is absent or `none`; of one that comes
    in two variants the reasoning one thinks. Only `max_tokens` may be None in what is returned.
    """
    if base_model in model_names():
        card = find_model(base_model)
        variant = card.repositories[0].variant if card.repositories else "instruct"
    elif found := find_repository(base_model):
        card, variant = found[0], found[1].variant
    else:
        return GREEDY
    thinks = variant == "reasoning"
    if card.thinking == "effort":
        thinks = reasoning_effort not in (None, "none")
    answering, thinking = card.sampling.get("answering"), card.sampling.get("thinking")
    said = (thinking or answering if thinks else answering or thinking) or GREEDY
    if said.temperature is None:
        return Sampling(0.0, 1.0, said.max_tokens)
    return Sampling(said.temperature, said.top_p or 1.0, said.max_tokens)
