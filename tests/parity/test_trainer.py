"""A stock trainer of trl on a prepared model: the losses of training and evaluation stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import fourbit

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytest.importorskip("trl.trainer.utils")

# peft uses the names that transformers has had longest
pytestmark = [
    pytest.mark.skipif(
        getattr(trl.trainer.utils, "_ChunkedLogProbFunction", True) is None,
        reason=f"trl {trl.__version__}'s own loss needs Triton, which is not here",
    ),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning"),
]

TEXTS = [
    "Once upon a time there was a girl. She liked dogs.",
    "The cat sat on a mat and it was a very nice day for all of the cats.",
    "Tom had a ball.",
]
STEPS = 3


def losses(folder: Path, output: Path, *, prepared: bool, **settings: Any) -> list[tuple[str, float]]:
    """What the trainer logged: the loss of each step, and of the evaluation after it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = fourbit.load(folder, dtype=torch.float32)
    if prepared:
        model = fourbit.prepare(model, gradient_checkpointing=False)
        assert model.fourbit_prepared.taken["loss"] == 1
    rows = datasets.Dataset.from_dict({"text": TEXTS * 4})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(output),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,  # so that the losses of later steps tell of the gradients
            max_length=48,
            gradient_checkpointing=False,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=1,
            **settings,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [(key, line[key]) for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothing"])
def test_a_stock_trainer_sees_the_same_losses(settings: dict[str, Any], stories_model: Path, tmp_path: Path) -> None:
    expected = losses(stories_model, tmp_path, prepared=False, **settings)
    found = losses(stories_model, tmp_path, prepared=True, **settings)
    names = [name for name, _ in expected]
    assert names.count("loss") == names.count("eval_loss") == STEPS
    assert [name for name, _ in found] == names
    # Both compute in fp32 and differ in the order of sums: 3e-7 of the loss was measured, after three steps of AdamW.
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert abs(expected[-1][1] - expected[1][1]) > 1e-2  # it did learn
