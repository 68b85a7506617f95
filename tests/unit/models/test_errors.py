"""What bad folders get: one sentence that names what is wrong, from `load` and `quantize_folder`, and nothing left."""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fourbit
from fourbit.errors import (
    BrokenCheckpoint,
    InputError,
    InvalidBlockSize,
    NonFiniteWeight,
    NotAModel,
    OutputExists,
    UnknownFormat,
)
from fourbit.models import writing
from fourbit.models.streaming import quantize_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"

Use = Callable[[Path], object]


@pytest.fixture(params=["load", "quantize_folder"])
def use(request: pytest.FixtureRequest, tmp_path: Path) -> Use:
    """Each thing that takes a folder. The second must leave no trace of a failure."""
    if request.param == "load":
        return fourbit.load

    def quantize(folder: Path) -> None:
        beside = tmp_path / "beside"
        beside.mkdir(exist_ok=True)
        try:
            quantize_folder(folder, beside / "out")
        finally:
            assert list(beside.iterdir()) == []

    return quantize


@pytest.fixture
def folder(stories_model: Path, tmp_path: Path) -> Path:
    """A copy of the real model, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(stories_model, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    return copy


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])


def shard(folder: Path) -> list[Path]:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[:20], names[20:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sorted(folder.glob("*.safetensors"))


def test_no_such_folder(use: Use, tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match=r"There is no folder .*nowhere"):
        use(tmp_path / "nowhere")


def test_a_hub_name_that_cannot_be_reached(use: Use) -> None:
    with pytest.raises(NotAModel, match=r"no-such-org/no-such-model .*the hub cannot be reached"):
        use("no-such-org/no-such-model")  # type: ignore[arg-type]


def test_a_file_in_place_of_a_folder(use: Use, folder: Path) -> None:
    with pytest.raises(NotAModel, match=r"model\.safetensors is a file; a model is a folder"):
        use(folder / WEIGHTS)


def test_a_folder_that_is_no_model(use: Use, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(NotAModel, match=r"photos is no model folder: it holds no config\.json"):
        use(tmp_path / "photos")


def test_an_adapter_in_place_of_a_model(use: Use, folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(NotAModel, match="is an adapter; give the folder of its base model"):
        use(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_broken_config(use: Use, folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BrokenCheckpoint, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        use(folder)


def test_a_config_that_is_no_text(use: Use, folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(BrokenCheckpoint, match=r"config\.json is not valid JSON"):
        use(folder)


@pytest.mark.parametrize("model_type", [None, 7, ""])
def test_a_config_without_a_type(use: Use, folder: Path, model_type: object) -> None:
    edit(folder, model_type=model_type)
    with pytest.raises(NotAModel, match=r"config\.json names no model_type"):
        use(folder)


def test_a_config_in_another_type(folder: Path, tmp_path: Path) -> None:
    edit(folder, dtype="int8")
    with pytest.raises(InputError, match=r"says that the model is in int8; it must be one of bfloat16"):
        quantize_folder(folder, tmp_path / "out")


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="There is no device 'cuda:99'"):
        fourbit.load(folder, device="cuda:99")


def test_a_base_class_as_architecture(use: Use, folder: Path) -> None:
    edit(folder, architectures=["PreTrainedModel"])
    with pytest.raises(NotAModel, match="names PreTrainedModel as its architecture, which is no model by itself"):
        use(folder)


def test_an_unknown_architecture(use: Use, folder: Path) -> None:
    edit(folder, model_type="llama17")
    with pytest.raises(NotAModel, match=r"type 'llama17', which transformers .* does not know"):
        use(folder)


def test_an_architecture_that_transformers_lacks(use: Use, folder: Path) -> None:
    edit(folder, architectures=["LlamaForWeather"])
    with pytest.raises(NotAModel, match="asks for the architecture LlamaForWeather"):
        use(folder)


def test_code_of_the_folder_is_not_run(use: Use, folder: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(folder, model_type="own", auto_map=auto_map, architectures=["Model"])
    with pytest.raises(NotAModel, match=r"needs Python code that comes with it.*--trust-remote-code"):
        use(folder)
    edit(folder, model_type="llama")
    with pytest.raises(NotAModel, match=r"needs Python code that comes with it.*--trust-remote-code"):
        use(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "large"},
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_act": "no_such_function"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense(use: Use, folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(BrokenCheckpoint, match=r"config\.json"):
        use(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 176}, r"mlp\.\w+_proj\.weight .*has the shape .* needs"),
        ({"vocab_size": 1 << 40}, r"embed_tokens\.weight .*has the shape \[512, 64\]"),
        ({"num_hidden_layers": 6}, r"The tensor model\.layers\.5\..* is missing"),
        ({"num_hidden_layers": 10**9}, "describes 1,000,000,000 layers, and there are only 47 tensors"),
        ({"attention_bias": True}, r"k_proj\.bias \(and 19 more\) is missing"),
    ],
    ids=str,
)
def test_a_config_whose_sizes_disagree(use: Use, folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(BrokenCheckpoint, match=message):
        use(folder)


def test_only_a_pickle(use: Use, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(NotAModel, match=r"only as a pickle \(pytorch_model\.bin\)"):
        use(folder)


def test_no_weights_at_all(use: Use, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(NotAModel, match=r"holds no model\.safetensors"):
        use(folder)


def test_an_empty_file(use: Use, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is empty"):
        use(folder)


@pytest.mark.parametrize("size", [5, 100, 20_000, 1_044_991])
def test_a_truncated_file(use: Use, folder: Path, size: int) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    assert size < len(raw)
    (folder / WEIGHTS).write_bytes(raw[:size])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is truncated"):
        use(folder)


def test_bytes_that_belong_to_nothing(use: Use, folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(BrokenCheckpoint, match="4 bytes at its end belong to no tensor"):
        use(folder)


@pytest.mark.parametrize("raw", [b"GIF89a" * 100, struct.pack("<Q", 20) + b"[" * 20, struct.pack("<Q", 2) + b"[]"])
def test_a_file_of_another_kind(use: Use, folder: Path, raw: bytes) -> None:
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        use(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "F7", "has the dtype 'F7'; known are"),
        ("dtype", "F16", r"has 44,032 bytes; F16 \[172, 64\] needs 22,016"),
        ("dtype", None, "has the dtype None"),
        ("dtype", [], r"has the dtype \[\]"),
        ("shape", [172, 65], "needs 44,720"),
        ("shape", [-172, -64], "a size is no whole number"),
        ("shape", [0, 1 << 70], "beyond all bounds"),
        ("shape", "big", "corrupt at the tensor|a size is no whole number"),
        ("shape", None, "corrupt at the tensor"),
        ("data_offsets", [0], "corrupt at the tensor"),
        ("data_offsets", [0, 44032], "does not start where it must"),
        ("data_offsets", [1 << 62, (1 << 62) + 44032], "does not start where it must"),
    ],
)
def test_a_header_that_lies(use: Use, folder: Path, field: str, value: object, message: str) -> None:
    edit_header(folder, lambda header: header[UP].update({field: value}))
    with pytest.raises(BrokenCheckpoint, match=message):
        use(folder)


def test_a_missing_tensor(use: Use, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(BrokenCheckpoint, match=rf"The tensor {UP} is missing"):
        use(folder)


def test_a_missing_tensor_by_the_standard_call(folder: Path) -> None:
    """transformers would make it up, and say so in a table; a head that is new is another matter."""
    edit_tensors(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(BrokenCheckpoint, match=rf"The tensor {UP} is missing"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=fourbit.QuantConfig())


def test_a_head_that_is_new(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=fourbit.QuantConfig())
    assert torch.isfinite(model(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2)).logits).all()


@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_tensor_of_the_wrong_shape(use: Use, folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(BrokenCheckpoint, match=rf"The tensor {name} .*has the shape"):
        use(folder)


@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight"])
def test_nan(use: Use, folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(NonFiniteWeight, match=rf"The tensor {name} .*holds NaN"):
        use(folder)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity(use: Use, folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[UP].view(-1)[5].fill_(value))
    with pytest.raises(NonFiniteWeight, match=rf"The tensor {UP} .*holds NaN or infinity"):
        use(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_infinity_in_what_stays_in_16_bits(use: Use, folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[5].fill_(float("inf")))
    with pytest.raises(NonFiniteWeight, match=rf"The tensor {name} .*holds NaN or infinity"):
        use(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_no_16_bit_weight(use: Use, folder: Path, name: str, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(BrokenCheckpoint, match=rf"{name} .* holds {dtype}, and no 16-bit weight"):
        use(folder)


def test_a_missing_shard(use: Use, folder: Path) -> None:
    shard(folder)[1].unlink()
    with pytest.raises(BrokenCheckpoint, match=r"The shard model-00002-of-00002\.safetensors is missing"):
        use(folder)


def test_a_missing_index(use: Use, folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(NotAModel, match=r"holds shards such as .* but no model\.safetensors\.index\.json"):
        use(folder)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(use: Use, folder: Path, index: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(index)
    with pytest.raises(BrokenCheckpoint, match=r"index\.json"):
        use(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_that_leads_elsewhere(use: Use, folder: Path, file: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {UP: file}}))
    with pytest.raises(BrokenCheckpoint, match=r"must be a safetensors file beside"):
        use(folder)


def test_a_shard_without_what_the_index_places_there(use: Use, folder: Path) -> None:
    first, second = shard(folder)
    shutil.copyfile(first, second)
    with pytest.raises(BrokenCheckpoint, match=r"lacks the tensor|is both in"):
        use(folder)


def test_weights_of_another_method(use: Use, folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantized by gptq"):
        use(folder)


def test_a_config_that_promises_four_bits(use: Use, folder: Path) -> None:
    edit(folder, quantization_config=fourbit.QuantConfig().to_dict())
    with pytest.raises(BrokenCheckpoint, match="says that it is in 4 bits, but no tensor in it is"):
        use(folder)


@pytest.fixture
def in_four_bits(folder: Path, tmp_path: Path) -> Path:
    quantize_folder(folder, tmp_path / "four")
    return tmp_path / "four"


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_a_weight_in_four_bits_that_lacks_a_part(in_four_bits: Path, part: str) -> None:
    edit_tensors(in_four_bits, lambda tensors: tensors.pop(f"{UP}.{part}"))
    with pytest.raises(BrokenCheckpoint, match=UP):
        fourbit.load(in_four_bits)


def test_a_weight_in_four_bits_of_the_wrong_shape(in_four_bits: Path) -> None:
    other = fourbit.quantize(torch.ones(172, 32)).state_dict(UP)
    edit_tensors(in_four_bits, lambda tensors: tensors.update(other))
    with pytest.raises(BrokenCheckpoint, match=rf"The tensor {UP} has the shape \[172, 32\]"):
        fourbit.load(in_four_bits)


def test_codes_in_four_bits_under_a_plain_config(in_four_bits: Path) -> None:
    config = json.loads((in_four_bits / "config.json").read_text())
    del config["quantization_config"]
    (in_four_bits / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenCheckpoint, match="has no quantization_config"):
        fourbit.load(in_four_bits)


def test_scales_that_are_not_numbers(in_four_bits: Path) -> None:
    edit_tensors(in_four_bits, lambda tensors: tensors[f"{UP}.nested_absmax"].fill_(float("nan")))
    with pytest.raises(NonFiniteWeight, match=rf"The scales of the tensor {UP}"):
        fourbit.load(in_four_bits)


def test_a_folder_in_four_bits_is_not_quantized_again(in_four_bits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in 4 bits already"):
        quantize_folder(in_four_bits, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_unknown_format() -> None:
    with pytest.raises(UnknownFormat, match="no 4-bit format named 'nf5'"):
        fourbit.QuantConfig(format="nf5")


@pytest.mark.parametrize("block_size", [0, -64, 63, 16, 8192])
def test_a_bad_block_size(block_size: int) -> None:
    with pytest.raises(InvalidBlockSize, match="power of two"):
        fourbit.QuantConfig(block_size=block_size)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_an_output_that_is_not_ours(folder: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    if name == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "diary.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        for dry_run in (False, True):
            with pytest.raises(OutputExists, match=str(output)):
                quantize_folder(folder, output, overwrite=overwrite, dry_run=dry_run)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_model_itself_is_no_output(folder: Path) -> None:
    with pytest.raises(OutputExists):
        quantize_folder(folder, folder, overwrite=True)


@pytest.mark.parametrize("after", [0, 3, 40])
def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    write, calls = writing.SafetensorsWriter._write_at, []

    def fail(self: writing.SafetensorsWriter, place: int, data: memoryview) -> None:
        calls.append(place)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, place, data)

    monkeypatch.setattr(writing.SafetensorsWriter, "_write_at", fail)
    with pytest.raises(InputError, match="could not be written: the disk is full"):
        quantize_folder(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_adapter_folder_without_an_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAModel, match=r"empty is no adapter: it holds no adapter_config\.json"):
        fourbit.load(folder, adapter=tmp_path / "empty")


def test_an_adapter_in_a_pickle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(NotAModel, match=r"holds no adapter_model\.safetensors"):
        fourbit.load(folder, adapter=tmp_path)
