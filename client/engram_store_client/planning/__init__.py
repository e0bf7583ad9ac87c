"""What a training run takes before it starts: VRAM, memory and disk, part by part.

Works without torch: a config.json and the sizes of the tables are enough.
"""

from engram_store_client.planning.check import check_fits, fitting_text
from engram_store_client.planning.machine import Limits, parse_size
from engram_store_client.planning.models import ModelShape, model_of_config, read_model
from engram_store_client.planning.plan import DISK, MEMORY, VRAM, Line, Plan, make_plan
from engram_store_client.planning.search import alternatives
from engram_store_client.planning.setup import Setup
from engram_store_client.planning.tables import TableShape, tables_of, tables_of_store

__all__ = [
    "DISK",
    "MEMORY",
    "VRAM",
    "Limits",
    "Line",
    "ModelShape",
    "Plan",
    "Setup",
    "TableShape",
    "alternatives",
    "check_fits",
    "fitting_text",
    "make_plan",
    "model_of_config",
    "parse_size",
    "read_model",
    "tables_of",
    "tables_of_store",
]
