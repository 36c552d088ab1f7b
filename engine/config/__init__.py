"""What to do, in one file: Axolotl's YAML keys, checked before anything runs.

It is the left hand of the only hand-over into a run (`config.yml`); `events.py` is the right one.
"""

from engine.config.axolotl import SHARDED_OPTIMIZERS, require_supported, unsupported
from engine.config.document import Document
from engine.config.finding import ConfigError, Finding
from engine.config.keys import SECTIONS, DatasetConfig, section_title
from engine.config.reading import (
    FULL,
    NONE,
    ConfigFile,
    assignment,
    override,
    parse_config,
    read_config,
    spell,
)
from engine.config.rules import RunConfig
from engine.config.schema import config_schema, section_of
from engine.config.writing import write_config
