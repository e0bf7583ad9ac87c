"""What tests of stores that are made over the wire ask for."""

import json
from typing import Any

from engram_store import wire
from engram_store.recipes import Recipe
from engram_store.v1 import store_pb2 as pb


def request_of(recipe: Recipe, name: str = "new", **options: Any) -> pb.CreateStoreRequest:
    assert recipe.token_map is not None
    return pb.CreateStoreRequest(
        store=name,
        recipe_json=json.dumps(recipe.to_json()),
        token_map=wire.encode_array(recipe.token_map),
        options_json=json.dumps({"dim": 16, **options}),
    )
