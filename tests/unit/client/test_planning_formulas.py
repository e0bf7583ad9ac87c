"""The plan's arithmetic against what real (tiny) models, gates, adapters and stores take."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import engram_store
from engram_store.engine.memory_plan import plan_memory
from engram_store.testing import MemorySession
from engram_store_client import GateConfig, GateKind, attach, build_gate
from engram_store_client.planning import (
    MEMORY,
    Limits,
    ModelShape,
    Setup,
    TableShape,
    formulas,
    make_plan,
    model_of_config,
    read_model,
    tables_of_store,
)
from tests.unit.client.live_bytes import LiveBytes

# peft 0.21 asks for a name that transformers 5.23 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
    "use_cache": False,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("Mistral", {}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"attention_bias": True}),
    ("Gemma", {}),
    ("Gemma2", {}),
    ("Gemma3Text", {}),
    # Of a family that has no formula: transformers counts it.
    ("Olmo2", {}),
]
TINY_TABLES = TableShape(layers=(0,), rows_per_head=50, dim=4, heads=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny models do nothing but wait for each other, on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(0)
    name = family.removesuffix("Text")
    return getattr(transformers, f"{name}ForCausalLM")(config)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "changes"), FAMILIES, ids=[f"{n}-{len(c)}" for n, c in FAMILIES]
)
def test_parameters_are_counted_exactly(family: str, changes: dict[str, Any]) -> None:
    """From the config alone, for every family that has a formula and one that has none."""
    model = build(family, **changes)
    shape = model_of_config(model.config.to_dict())
    assert shape.parameters == count(model)
    assert (shape.counted is None) == (family != "Olmo2")


def test_a_saved_model_is_counted_by_its_files(tmp_path: Path) -> None:
    """Headers of safetensors files are read, and agree with the formula; so does config.json."""
    model = build("Qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)

    shape = read_model(tmp_path)

    assert shape.counted == shape.parameters == count(model)
    assert shape == read_model(tmp_path / "config.json")
    assert model_of_config(model.config.to_dict()).parameters == shape.counted


def test_a_released_config_without_its_defaults_is_understood() -> None:
    """Qwen3-4B's sizes as its config.json names them give its 4.02 billion parameters."""
    config = {
        "model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728,
        "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    shape = model_of_config(config)
    assert shape.parameters == 4_022_468_096
    assert shape == model_of_config({"text_config": config, "model_type": "a_multimodal_wrapper"})
    sizes = "hidden=2560,layers=36,heads=32,kv_heads=8,head_dim=128,intermediate=9728"
    parsed = ModelShape.parse(f"{sizes},vocabulary=151936,tied=true,qk_norm=true")
    assert parsed.parameters == shape.parameters


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("kind", GateKind)
def test_gates_are_counted_exactly(kind: GateKind, streams: int) -> None:
    gate = build_gate(GateConfig(kind=kind, hidden_size=24, row_width=40, streams=streams))
    counted = formulas.gate_parameters(str(kind), hidden=24, row_width=40, streams=streams)
    assert counted == count(gate)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj")])
def test_lora_is_counted_exactly(targets: tuple[str, ...]) -> None:
    model = build("Llama")
    shape = model_of_config(model.config.to_dict())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=[*targets]))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert formulas.lora_parameters(shape, 4, targets) == trained


def saved_bytes(model: nn.Module, **inputs: Any) -> int:
    """Bytes of everything that autograd keeps of a forward pass, parameters aside."""
    own = [*model.parameters(), *model.buffers()]
    ignored = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in ignored:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", GateKind)
def test_what_a_gate_keeps_for_its_backward_pass(kind: GateKind, dtype: torch.dtype) -> None:
    """Within 5 %, for one stream and for three."""
    for streams in (1, 3):
        hidden, time = 192, 64
        tables = TableShape(layers=(0,), rows_per_head=50, dim=16)
        gate = build_gate(
            GateConfig(kind=kind, hidden_size=hidden, row_width=tables.row_width, streams=streams)
        ).to(dtype)
        rows = torch.randn(2, time, tables.row_width, dtype=dtype, requires_grad=True)
        shape = (2, time, hidden) if kind == GateKind.ENGRAM_PEFT else (2, time, streams, hidden)
        states = torch.randn(shape, dtype=dtype, requires_grad=True)
        name = str(dtype).removeprefix("torch.")
        setup = make_setup(dtype=name, tables=tables, gate=str(kind), streams=streams,
                           model=ModelShape(hidden=hidden, layers=1, heads=1, kv_heads=1,
                                            head_dim=8, intermediate=8, vocabulary=8))  # fmt: skip
        kept = saved_bytes(gate, rows=rows, hidden=states) / (2 * time)
        assert kept == pytest.approx(formulas.gate_activation_bytes(setup), rel=0.05)


def make_setup(**values: Any) -> Setup:
    common: dict[str, Any] = {"tables": TINY_TABLES, "device": "cpu", "batch": 2, "time": 64}
    return Setup(**common | values)


@pytest.mark.parametrize(
    ("family", "how", "checkpointing", "dtype"),
    [
        ("Llama", "frozen", False, torch.bfloat16),
        ("Llama", "full", False, torch.float32),
        ("Llama", "lora", False, torch.bfloat16),
        ("Llama", "frozen", True, torch.float32),
        ("Qwen3", "frozen", False, torch.float32),
        ("Qwen3", "full", False, torch.bfloat16),
        ("Qwen3", "lora", True, torch.float32),
        ("Qwen3", "full", True, torch.bfloat16),
        ("Gemma2", "frozen", False, torch.bfloat16),
    ],
)
def test_the_peak_of_a_pass_is_what_the_plan_says(
    family: str, how: str, checkpointing: bool, dtype: torch.dtype
) -> None:
    """Activations, logits and gradients, against every tensor that lives at the worst moment.

    Within 5 %, or 25 % too much where layers are computed again.
    """
    model = build(family, num_hidden_layers=4).to(dtype)
    shape = model_of_config(model.config.to_dict())
    if how == "lora":
        trained: nn.Module = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    else:
        trained = model.requires_grad_(how == "full")
        if how == "frozen":  # as a gate below the first layer does
            embedding = model.get_input_embeddings()
            embedding.register_forward_hook(lambda *call: call[2].requires_grad_())
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers >= 5.23
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    tokens = torch.randint(0, 512, (2, 256))
    with LiveBytes([*trained.parameters(), *trained.buffers(), tokens]) as live:
        output = trained(input_ids=tokens, labels=tokens)
        output.loss.backward()

    name = str(dtype).removeprefix("torch.")
    mode = "full" if how == "full" else "preserve_trainable"
    setup = make_setup(model=shape, dtype=name, mode=mode, checkpointing=checkpointing, time=256,
                       lora_rank=4 * (how == "lora"))  # fmt: skip
    planned = peak_without_gates(setup)
    assert 0.95 * live.peak < planned < (1.25 if checkpointing else 1.05) * live.peak


def peak_without_gates(setup: Setup) -> int:
    """Of the plan's parts, those that a model without gates has too."""
    gates = setup.tokens * formulas.gate_activation_bytes(setup)
    kept = formulas.kept_activation_bytes(setup) - gates * (not setup.checkpointing)
    work = formulas.backward_work_bytes(setup) - gates * setup.checkpointing
    trained = formulas.trained_bytes(setup)[1:]
    gradients = sum(number * size for _, number, size in trained)
    return max(kept + max(formulas.logits_bytes(setup), work), gradients + work)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_an_attached_model_takes_what_the_plan_says(layer: int, checkpointing: bool) -> None:
    """Gates, rows and gradients included; a frozen base keeps nothing below the first table."""
    tables = TableShape(layers=(layer,), rows_per_head=200, heads=4, dim=16, dtype="float32")
    recipe = tables.make_recipe(token_map=np.arange(512), pad_id=0, vocabulary=512, eos_id=0)
    rows = {spec.layer: np.ones((spec.rows, spec.dim), np.float32) for spec in tables.specs}
    session = MemorySession(recipe, {spec.layer: spec for spec in tables.specs}, rows)
    model = build("Qwen3", num_hidden_layers=4)
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    memory = attach(model, session)
    tokens = torch.randint(0, 512, (2, 256))
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as live:
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()

    setup = make_setup(
        model=model_of_config(model.config.to_dict()), tables=tables, dtype="float32", time=256,
        mode="engram_only", checkpointing=checkpointing,
    )  # fmt: skip
    left_out = ("weights", "optimiser", "ring", "trainer", "store", "page cache")
    parts = [
        line.bytes
        for line in make_plan(setup, Limits()).lines
        if line.resource == MEMORY and not any(word in line.part for word in left_out)
    ]
    assert 0.95 * live.peak < sum(parts) < 1.25 * live.peak
    memory.detach()


def disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_table_takes_the_disk_that_the_plan_says(tmp_path: Path) -> None:
    """Once all rows were trained and folded: the base exactly, and never more than the bound."""
    shape = TableShape(layers=(0, 1), rows_per_head=3_000, heads=2, dim=16, optimizer="adam")
    recipe = shape.make_recipe(token_map=np.arange(400), pad_id=0, vocabulary=400, eos_id=0)
    path = tmp_path / "a.engram"
    engram_store.create(path, recipe, dim=16, optimizer="adam")
    assert tables_of_store(path).specs == tuple(engram_store.inspect(path).metadata.tables.values())
    steps, time, most = 12, 4_096, 0
    rng = np.random.default_rng(0)
    memtables = tmp_path / "memtables"
    with engram_store.open(path, "train", memtable_dir=memtables, memory_bytes=256 << 20) as store:
        for step in range(steps):
            window = store.announce(rng.integers(0, 400, (1, time)), step)
            for layer in store.tables:
                rows, _ = window.rows(layer)
                window.push(layer, np.ones(rows.shape, np.float32))
            store.commit(step, 0.1)
            if step % 4 == 3:
                store.snapshot()
            most = max(most, disk_bytes(path))
        store.fold()
        most = max(most, disk_bytes(path))
    setup = make_setup(
        model=ModelShape(hidden=8, layers=2, heads=1, kv_heads=1, head_dim=8, intermediate=8,
                         vocabulary=8),
        tables=shape, batch=1, time=time, steps=steps, snapshots=4,
    )  # fmt: skip
    capacity = plan_memory(shape.specs, 256 << 20).capacity
    uses = [formulas.disk_use(setup, spec, capacity) for spec in shape.specs]
    for spec, use in zip(shape.specs, uses, strict=True):
        base = path / "layers" / str(spec.layer) / "base"
        newest = max(base.glob("g*"))
        written = sum(file.stat().st_size for file in newest.rglob("c/*/*"))
        assert written == use.base
    bound = sum(use.base + use.segments + use.fold + use.snapshots for use in uses)
    assert most < bound


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_take_what_the_plan_says(bits: str) -> None:
    """Of a real model's matrices, by bitsandbytes on the CPU: within 2 %, scales included."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shape = ModelShape.parse("hidden=256,layers=1,heads=4,intermediate=512,vocabulary=16")
    taken = 0
    for inputs, outputs in shape.linear_sizes().values():
        if bits == "8bit":
            layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, False, has_fp16_weights=False)
        else:
            options = {"compress_statistics": False, "quant_type": "nf4"}  # transformers' own
            layer = bitsandbytes.nn.Linear4bit(inputs, outputs, False, **options)
        layer.weight.data = torch.randn(outputs, inputs)
        layer = layer.to("cpu")
        layer(torch.randn(1, inputs))
        state = getattr(layer.weight, "quant_state", None)
        scales = layer.state.SCB if state is None else state.absmax
        taken += sum(part.numel() * part.element_size() for part in (layer.weight, scales))
    setup = make_setup(model=shape, dtype="bfloat16", quantization=bits)
    others = shape.parameters - shape.matrix_parameters
    assert formulas.base_bytes(setup) - 2 * others == pytest.approx(taken, rel=0.02)
    with_lora = make_setup(model=shape, dtype="bfloat16", quantization=bits,
                           mode="preserve_trainable", lora_rank=2)  # fmt: skip
    assert formulas.base_bytes(with_lora) == formulas.base_bytes(setup) + 2 * others
