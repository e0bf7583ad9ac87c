"""The package's surface: names, imports, addresses, model structure."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import engram_store_client
from engram_store.errors import ConfigError
from engram_store_client.structure import find_decoder
from engram_store_client.transport import connect, local_path


def test_importing_the_package_loads_no_torch() -> None:
    """The command line of the core imports it before it knows whether torch is there."""
    code = "import sys, engram_store_client; assert 'torch' not in sys.modules, 'torch'"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_loaded_whatever_was_imported_before() -> None:
    """`__all__` is sorted and complete, and no submodule shadows a name."""
    names = engram_store_client.__all__

    assert names == sorted(names)
    for name in names:
        assert not isinstance(getattr(engram_store_client, name), type(sys)), name
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        engram_store_client.other  # noqa: B018


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("my.engram", "my.engram"),
        ("/data/my.engram", "/data/my.engram"),
        ("file:/data/my%20store", "/data/my store"),
        ("file:///data/x", "/data/x"),
    ],
)
def test_paths_and_file_urls_name_a_directory(address: str, path: str) -> None:
    """Both ways to write a local store."""
    assert local_path(address) == Path(path)


@pytest.mark.parametrize("address", ["http://host:7070", "file://host/x"])
def test_other_addresses_are_refused_with_what_is_allowed(address: str) -> None:
    """Nothing is opened."""
    with pytest.raises(ConfigError, match="a path or a file: URL of this machine"):
        connect(address)


class Layer(nn.Module):
    """Looks like a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(2, 2)


def tower(*, embeds: bool) -> nn.Module:
    """Two decoder layers, with or without a token embedding beside them."""
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    if embeds:
        model.embed_tokens = nn.Embedding(3, 2)
    return model


def test_decoder_layers_are_found_through_wrappers_and_beside_other_towers() -> None:
    """The tower that embeds tokens is the language model."""
    inner = nn.Module()
    inner.vision, inner.text = tower(embeds=False), tower(embeds=True)
    outer = nn.Module()
    outer.wrapped = inner

    decoder = find_decoder(outer)

    assert decoder.path == "wrapped.text.layers"
    assert decoder.backbone is inner.text
    assert decoder.layer(1) is decoder.layers[1]


def test_a_layer_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    """Negative numbers do not count from the end."""
    decoder = find_decoder(tower(embeds=True))

    for number in (2, -1):
        with pytest.raises(ConfigError, match=rf"no layer {number}: 'layers' holds layers 0 to 1"):
            decoder.layer(number)


def test_a_model_without_or_with_two_decoders_is_refused_naming_what_was_found() -> None:
    """The message says which lists there are."""
    plain = nn.Sequential(nn.Linear(2, 2))
    two = nn.Module()
    two.a, two.b = tower(embeds=True), tower(embeds=True)

    with pytest.raises(ConfigError, match="no ModuleList"):
        find_decoder(plain)
    with pytest.raises(ConfigError, match=r"a\.layers.*b\.layers"):
        find_decoder(two)
