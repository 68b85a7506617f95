"""What it takes to talk to a model: the right tokenizer, template and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.errors import AdapterMismatch, InputError, NotAModel
from fourbit.generate import Origin, Sampling, generate, load_for_generation

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

OWN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


@pytest.fixture
def adapter(stories_model: Path, tmp_path: Path) -> Path:
    """An adapter far from zero, with a tokenizer that has a template of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_model_without_a_template_is_given_one(stories_model: Path) -> None:
    loaded = load_for_generation(stories_model)
    (sentence,) = loaded.sentences
    assert sentence.endswith(".")
    assert loaded.tokenizer.chat_template
    assert loaded.weights == {"format": "nf4", "block_size": 64, "double_quant": True, "dtype": "float32"}
    assert not loaded.model.training


def test_the_template_it_was_trained_with(stories_model: Path, adapter: Path) -> None:
    loaded = load_for_generation(stories_model, adapter=adapter)
    assert loaded.sentences == ()
    assert loaded.tokenizer.chat_template == OWN
    asked = [[{"role": "user", "content": "Hello"}]]
    settings = Sampling(max_new_tokens=20)
    (with_it,) = generate(loaded.model, loaded.tokenizer, asked, settings=settings)
    without = load_for_generation(stories_model)
    (plain,) = generate(without.model, loaded.tokenizer, asked, settings=settings)
    assert with_it.ids != plain.ids


def test_an_adapter_without_a_tokenizer(stories_model: Path, adapter: Path) -> None:
    for path in adapter.glob("*token*"):
        path.unlink()
    (adapter / "chat_template.jinja").unlink()
    tokenizer, sentences = Origin(model=stories_model, adapter=adapter).load_tokenizer()
    assert tokenizer.chat_template != OWN
    assert sentences


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"format": "none"}, {"format": "none", "block_size": None, "double_quant": None, "dtype": "float32"}),
        (
            {"format": "fp4", "block_size": 32, "double_quant": False, "dtype": "bfloat16"},
            {"format": "fp4", "block_size": 32, "double_quant": False, "dtype": "bfloat16"},
        ),
    ],
)
def test_weights(settings: dict[str, Any], found: dict[str, Any], stories_model: Path) -> None:
    loaded = Origin(model=stories_model, **settings).load()
    assert loaded.weights == found
    assert loaded.model.dtype == getattr(torch, found["dtype"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"format": "nf5"}, "nf5"),
        ({"block_size": 48}, "48"),
        ({"format": "none", "block_size": 64}, "none quantizes nothing"),
        ({"format": "none", "double_quant": True}, "none quantizes nothing"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Origin(model="nowhere", **settings)


def test_an_unknown_template(stories_model: Path) -> None:
    with pytest.raises(InputError, match="no-such-template"):
        Origin(model=stories_model, chat_template="no-such-template").load_tokenizer()


def test_an_adapter_of_another_model(stories_model: Path, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.4", "layers.40"): each for name, each in load_file(path).items()}, path)
    with pytest.raises(AdapterMismatch, match=r"has no model\.layers\.40"):
        load_for_generation(stories_model, adapter=adapter)
    with pytest.raises(NotAModel, match="no adapter"):
        load_for_generation(stories_model, adapter=stories_model)


def test_no_tokenizer(stories_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stories_model / name, tmp_path / name)
    with pytest.raises(NotAModel, match="holds no tokenizer"):
        load_for_generation(tmp_path)


def test_fingerprints_tell_weights_apart(stories_model: Path, adapter: Path) -> None:
    origin = Origin(model=stories_model, adapter=adapter)
    first = origin.fingerprints()
    assert first == origin.fingerprints()
    assert Origin(model=stories_model).fingerprints() == first | {"adapter_files": None}
    path = adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = origin.fingerprints()
    assert second["model_files"] == first["model_files"]
    assert second["adapter_files"] != first["adapter_files"]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert origin.fingerprints()["adapter_files"] != second["adapter_files"]


def test_the_context(stories_model: Path) -> None:
    assert Origin(model=stories_model).context_length() == 512
