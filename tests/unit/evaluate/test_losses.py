"""The loss of each token: by which way it is computed, and that the logits are never whole in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fourbit.evaluate import losses
from fourbit.evaluate.losses import IGNORED, TokenLosses


def batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, dims=1)
    targets[0, 7:], targets[1, :3], targets[2, :] = IGNORED, IGNORED, IGNORED
    targets[2, 11] = 5
    return ids, targets


def expected(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """From the model's own logits, in float64."""
    with torch.no_grad():
        logits = model(ids).logits.double().flatten(0, 1)
    scored = targets.flatten() != IGNORED
    return cross_entropy(logits[scored], targets.flatten()[scored], reduction="none")


def architectures() -> dict[str, Any]:
    """Models whose logits are the head's output, and models that change it afterwards."""
    import transformers as t

    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    gpt2 = t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
    return {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**small, **heads), True),
        "gpt2": (t.GPT2LMHeadModel, gpt2, True),
        "gemma2, capped": (t.Gemma2ForCausalLM, t.Gemma2Config(**small, **heads, final_logit_softcapping=0.5), False),
        "cohere, scaled": (t.CohereForCausalLM, t.CohereConfig(**small, num_attention_heads=4, pad_token_id=0), False),
    }


@pytest.mark.parametrize("name", list(architectures()))
@pytest.mark.parametrize("piece", [1, 200, 1 << 24])
def test_they_equal_the_models_own(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 and logits below 16: the head on other rows rounds its sums of 32 terms anew, 32 * 2^-24 * 16 at most."""
    monkeypatch.setattr(losses, "PIECE_ELEMENTS", piece)
    model_class, config, head_alone = architectures()[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    ids, targets = batch(99)
    score = TokenLosses(model)
    assert (score._hidden_states(ids, model.get_output_embeddings()) is not None) == head_alone
    for _ in range(2):  # the way is chosen in the first call
        torch.testing.assert_close(score(ids, targets).double(), expected(model, ids, targets), rtol=0, atol=4e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_logits_are_never_whole_in_fp32(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    heads: list[int] = []

    def counting(logits: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        rows.append(len(logits))
        return cross_entropy(logits, *arguments, **keywords)

    monkeypatch.setattr(losses, "PIECE_ELEMENTS", 258 * 4)
    monkeypatch.setattr(losses, "cross_entropy", counting)
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, out: heads.append(out.shape[:-1].numel()))
    ids, targets = batch(258)
    assert len(TokenLosses(tiny_llama)(ids, targets)) == sum(rows) == int((targets != IGNORED).sum())
    assert max(rows) == 4
    assert max(heads) == 4  # nor is the head applied to more at a time, nor to what is not scored
    assert sum(heads) == sum(rows) + 2 * len(ids)  # twice the last position, to see whether the head is all


def test_nothing_to_score(tiny_llama: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert TokenLosses(tiny_llama)(ids, torch.full_like(ids, IGNORED)).shape == (0,)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_under_an_adapter_that_also_adapts_the_head(tiny_llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_llama, adapter).eval()
    ids, targets = batch(258)
    score = TokenLosses(model)
    assert score._hidden_states(ids, model.get_output_embeddings()) is not None
    torch.testing.assert_close(score(ids, targets).double(), expected(model, ids, targets), rtol=0, atol=2e-5)
