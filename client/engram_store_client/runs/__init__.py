"""Training runs that a file describes: `engram-store train CONFIG.yaml`."""

from engram_store_client.runs.reading import read_settings
from engram_store_client.runs.settings import RunSettings
from engram_store_client.runs.template import template_text

__all__ = ["RunSettings", "read_settings", "template_text"]
