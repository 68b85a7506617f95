"""`quantize_folder`: the folder that loading and saving would give, without holding the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import InputError, OutputExists
from fourbit.models.streaming import QuantizeReport, quantize_folder

Make = Callable[[str], Any]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    one, other = tensors_in(first), tensors_in(second)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_it_writes_what_loading_and_saving_would(architecture: Any, tmp_path: Path) -> None:
    quantize_folder(architecture.folder, tmp_path / "streamed")
    model = architecture.model_class.from_pretrained(
        architecture.folder, quantization_config=fourbit.QuantConfig(), dtype="auto"
    )
    model.save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "streamed", tmp_path / "saved")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "saved")]
    assert configs[0] == configs[1]
    assert torch.equal(architecture.output(fourbit.load(tmp_path / "streamed")), architecture.output(model))


def test_a_weight_that_is_cut_out_of_a_larger_tensor(tiny: Make) -> None:
    """The test above means little for this model unless its folder has the two in one."""
    names = load_file(tiny("dinov2_with_registers").folder / "model.safetensors").keys()
    assert any("weights_in" in name for name in names)
    model = fourbit.load(tiny("dinov2_with_registers").folder)
    assert any("gate_proj" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_format(stories_model: Path, tmp_path: Path, format: str, double_quant: bool) -> None:
    config = fourbit.QuantConfig(format, 32, double_quant)
    quantize_folder(stories_model, tmp_path / "streamed", config)
    fourbit.load(stories_model, config, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "streamed", tmp_path / "saved")


def test_the_dtype_of_the_config_decides(tiny: Make, tmp_path: Path) -> None:
    """Weights in fp32 under a config that says bf16: they are cast as loading casts them. Other tensors stay."""
    source = tmp_path / "source"
    shutil.copytree(tiny("llama").folder, source)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in tensors_in(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_folder(source, tmp_path / "out")
    expected = tiny("llama").output(fourbit.load(source, dtype=torch.bfloat16))
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path / "out", dtype=torch.bfloat16)), expected)
    assert torch.equal(tensors_in(tmp_path / "out")["lm_head.weight"], tensors["lm_head.weight"])


def test_shards_stay_shards(tiny: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("llama").model_class.from_pretrained(tiny("llama").folder).save_pretrained(source, max_shard_size="50KB")
    report = quantize_folder(source, tmp_path / "out")
    files = {path.name for path in source.glob("*.safetensors")}
    assert len(files) > 2
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == files
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == report.bytes_after
    expected = tiny("llama").output(fourbit.load(source))
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path / "out")), expected)


def test_everything_else_is_copied(stories_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stories_model, source, copy_function=shutil.copyfile)
    source.chmod(0o755)
    for name in ("chat_template.jinja", "LICENSE", "pytorch_model.bin", "optimizer.pt", ".gitattributes"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("tool")
    quantize_folder(source, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        "LICENSE",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "fourbit.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    listed = json.loads((tmp_path / "out/fourbit.json").read_text())["files"]
    assert listed["model.safetensors"] == (tmp_path / "out/model.safetensors").stat().st_size


def test_the_report(stories_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = quantize_folder(stories_model, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert report.parameters == 260_032
    assert report.bytes_before == 4 * 260_032
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors_in(tmp_path / "out").values())
    assert report.bits_per_parameter == 8 * report.bytes_after / report.parameters
    assert report.seconds > 0
    assert report.peak_rss_bytes > 1 << 20
    assert seen[0] == ("quantizing", 0, report.bytes_before)
    assert seen[-1] == ("quantizing", report.bytes_before, report.bytes_before)


def test_a_dry_run_writes_nothing_and_is_right(stories_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new/out"
    planned = quantize_folder(stories_model, output, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    report = quantize_folder(stories_model, output)
    assert (planned.parameters, planned.bytes_before) == (report.parameters, report.bytes_before)
    # only the number of digits of each weight's offset is not known beforehand: 24 characters at most, 35 weights
    assert 0 <= planned.bytes_after - report.bytes_after <= 24 * 35


def test_overwrite_leaves_what_the_user_put_in_place(stories_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize_folder(stories_model, output)
    (output / "model.safetensors").write_text("my own weights")
    with pytest.raises(OutputExists, match="did not write"):
        quantize_folder(stories_model, output, overwrite=True)
    assert (output / "model.safetensors").read_text() == "my own weights"


def test_the_current_folder_is_no_output(stories_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExists, match="name a folder in it"):
        quantize_folder(stories_model, ".")


def test_overwrite_replaces_only_what_it_wrote(stories_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize_folder(stories_model, output)
    with pytest.raises(OutputExists, match="--overwrite"):
        quantize_folder(stories_model, output)
    quantize_folder(stories_model, output, fourbit.QuantConfig("fp4"), overwrite=True)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="files that fourbit did not write"):
        quantize_folder(stories_model, output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_the_output(stories_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize_folder(stories_model, tmp_path / "out")
    fourbit.load(tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_old_folder(stories_model: Path, tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "out"
    quantize_folder(stories_model, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def stop(what: str, done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        quantize_folder(stories_model, output, overwrite=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_the_system_says_that_the_disk_is_full(stories_model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the same call fails, with another number."""
    code = (
        "import resource, signal, sys; from fourbit.errors import InputError;"
        "from fourbit.models.streaming import quantize_folder; import transformers, torch;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: quantize_folder(*sys.argv[1:])\n"
        "except InputError as error: sys.exit(str(error))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(stories_model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TQDM_DISABLE": "1"},
    )
    assert "could not be written: a file became larger than the system allows" in run.stderr
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys
from fourbit.models.process import peak_resident_bytes
from fourbit.models.streaming import quantize_folder

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

warmup, folder, output = sys.argv[1:]
quantize_folder(warmup, output + "-warmup")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident()
quantize_folder(folder, output)
print(peak_resident_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part needs Linux' /proc")
def test_it_holds_one_tensor_not_one_model(tiny: Make, tmp_path: Path) -> None:
    """A tensor of size T is held, its codes (T/4), and a block of T for the next one; 6 MiB are left for the rest.

    The file is one shard of 18 T, its 4-bit form 5 T, so holding either fails.
    """
    size = 1 << 23
    model_class = tiny("llama").model_class
    config = model_class.config_class(
        vocab_size=64, hidden_size=2048, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        outline = model_class(config)
    tensors = {name: torch.ones(p.shape, dtype=torch.bfloat16) for name, p in outline.named_parameters()}
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(source)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny("llama").folder), str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert int(run.stdout) < 2.25 * size + (6 << 20)


def test_report_is_a_plain_record() -> None:
    assert list(QuantizeReport.__dataclass_fields__) == [
        "parameters",
        "bytes_before",
        "bytes_after",
        "bits_per_parameter",
        "seconds",
        "peak_rss_bytes",
    ]


def test_skip_must_name_something(stories_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'haed'"):
        quantize_folder(stories_model, tmp_path / "out", fourbit.QuantConfig(skip=("haed",)))
    assert list(tmp_path.iterdir()) == []
