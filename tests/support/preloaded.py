"""What the server of `trainers` imports, once, before it forks trainers.

Importing this takes eight seconds; a test never does. The calls fill caches that every trainer
would fill again.
"""

import bitsandbytes  # noqa: F401
from transformers import conversion_mapping
from transformers.models.ministral3 import modeling_ministral3  # noqa: F401

import engine.train.run  # noqa: F401
from engine.config import parse_config

conversion_mapping.get_checkpoint_conversion_mapping("ministral3")
parse_config("base_model: none\ndatasets: [{path: none.jsonl, type: chat_template}]")
