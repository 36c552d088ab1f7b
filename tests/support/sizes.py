"""Sizes that the tests of the catalog expect."""

# Billions of parameters: the classes of transformers 5.23 instantiated on the meta device.
BILLIONS = {
    "ministral-3-3b": 3.849,
    "ministral-3-8b": 8.918,
    "ministral-3-14b": 13.945,
    "magistral-small-2506": 23.572,
    "magistral-small-2507": 23.572,
    "magistral-small-2509": 24.011,
    "mistral-small-3.2": 24.011,
    "mistral-small-4": 119.401,
    "mistral-medium-3.5": 127.704,
    # The demo's own figure: 17.2 million, nearly all of them the vocabulary.
    "demo-tiny": 0.017,
    "demo-tiny-vision": 0.017,
}
