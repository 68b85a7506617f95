"""Pretrain the embedded base model: `python -m fourbit.demo.pretrain`, on two cores or on a GPU.

The tokenizer and the model are made from nothing but `corpus.documents`. The batch of a step depends on the seed and
the number of the step alone, so a run that was interrupted goes on as if nothing had happened: give the same command
again.

Weights are computed with in bf16 and kept beside in fp32, where the steps of the optimizer are added up: with bf16
alone, a step smaller than 1/256 of a weight would be lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fourbit.demo.chat import wordings
from fourbit.demo.corpus import documents
from fourbit.demo.world import World, make_world

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["Recipe", "batch", "main", "make_model", "make_tokenizer", "pretrain"]

logger = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """Everything that the model is made of.

    Attributes:
        people: how many live in the world.
        hidden_size: a multiple of 64, which is the size of an attention head.
        sequence_length, batch_size: tokens in a row, rows in a step; documents are packed into rows.
        learning_rate: at its height, after a warm-up of `warmup_steps`, then falling on a cosine to a fiftieth of it.
    """

    seed: int = 0
    people: int = 200
    vocabulary_size: int = 1536
    hidden_size: int = 320
    intermediate_size: int = 896
    layers: int = 4
    sequence_length: int = 256
    batch_size: int = 8
    steps: int = 2600
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length


def make_tokenizer(world: World, *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, whose vocabulary is the world's words.

    The wordings of the conversations are read too, so that a word like "Which" is one token; the model itself reads
    none of them before it is finetuned.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read = islice(documents(world, seed="tokenizer"), 20_000)
    asked = [f"### Human: {wording}### Assistant:" for wording in wordings()] * 100
    tokenizer.train_from_iterator((text for source in (read, asked) for text in source), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA with random weights in fp32, embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden_size // 64,
            max_position_embeddings=recipe.sequence_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
            attn_implementation="eager",  # at this length a sixth faster on a CPU than torch's own kernel
        )
    )


def batch(world: World, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> torch.Tensor:
    """The tokens of one step: documents, each between BOS and EOS, packed without a gap.

    Returns:
        [B, T] int64.
    """
    needed = recipe.batch_size * recipe.sequence_length
    ids: list[int] = []
    texts = documents(world, seed=f"{recipe.seed} {step}")
    while len(ids) < needed:
        for encoded in tokenizer(list(islice(texts, 32)))["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids[:needed]).view(recipe.batch_size, recipe.sequence_length)


def pretrain(recipe: Recipe, output: Path, *, save_every: int = 250, device: str | None = None) -> Path:
    """Pretrain, and leave a model folder in transformers' layout.

    Args:
        recipe: what to make.
        output: the folder; `output/state.pt` while the run goes on, from which it is taken up again, and
            `output/step-N` with the model as it was then.
        save_every: steps from one of those to the next.
        device: by default the GPU where there is one.

    Returns:
        the folder of the finished model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = make_world(recipe.seed, people=recipe.people)
    tokenizer = make_tokenizer(world, vocabulary_size=recipe.vocabulary_size)
    model = make_model(recipe, tokenizer).to(device)
    weights = list(model.parameters())
    masters = [weight.detach().clone() for weight in weights]
    model.to(torch.bfloat16)
    optimizer = _make_optimizer(masters, recipe)
    first = _take_up(output / "state.pt", masters, optimizer)
    _copy(masters, weights)
    logger.info("%s parameters, %s tokens, on %s", f"{sum(m.numel() for m in masters):,}", f"{recipe.tokens:,}", device)
    started, seen = time.monotonic(), 0
    for step in range(first, recipe.steps):
        ids = batch(world, tokenizer, recipe, step).to(device)
        rate = _learning_rate(recipe, step)
        loss, norm = _step(model, ids, weights, masters, optimizer, rate, recipe.clip_norm)
        seen += ids.numel()
        done = step + 1
        if done % 25 == 0 or done == recipe.steps:
            speed = seen / (time.monotonic() - started)
            left = (recipe.steps - done) * ids.numel() / speed
            logger.info(
                "step %d of %d, loss %.4f, gradient %.2f, rate %.2e, %.0f tokens/s, %.1f min left",
                done, recipe.steps, loss, norm, rate, speed, left / 60,
            )  # fmt: skip
        if done % save_every == 0 or done == recipe.steps:
            _keep(output / "state.pt", done, masters, optimizer)
            _save(output / f"step-{done}", model, tokenizer, recipe, done, loss)
    return output / f"step-{recipe.steps}"


def _make_optimizer(masters: Sequence[torch.Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms are vectors."""
    groups = [
        {"params": [master for master in masters if master.dim() == 2], "weight_decay": recipe.weight_decay},
        {"params": [master for master in masters if master.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def _step(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    weights: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    optimizer: torch.optim.AdamW,
    rate: float,
    clip_norm: float,
) -> tuple[float, float]:
    """One step of the optimizer; returns the loss and the norm of the gradient before clipping."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for weight, master in zip(weights, masters, strict=True):
        assert weight.grad is not None
        master.grad = weight.grad.float()
        weight.grad = None
    norm = torch.nn.utils.clip_grad_norm_(masters, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    _copy(masters, weights)
    return loss.item(), norm.item()


@torch.no_grad()
def _copy(masters: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]) -> None:
    for master, weight in zip(masters, weights, strict=True):
        weight.copy_(master)


def _learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _take_up(path: Path, masters: Sequence[torch.Tensor], optimizer: torch.optim.AdamW) -> int:
    """Put an interrupted run's state in place; returns the step it goes on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=masters[0].device)
    _copy(state["masters"], masters)
    optimizer.load_state_dict(state["optimizer"])
    logger.info("taken up at step %d", state["step"])
    return int(state["step"])


def _keep(path: Path, step: int, masters: Sequence[torch.Tensor], optimizer: torch.optim.AdamW) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save({"step": step, "masters": masters, "optimizer": optimizer.state_dict()}, unfinished)
    unfinished.replace(path)


def _save(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, loss: float
) -> None:
    model.config.use_cache = True
    model.save_pretrained(folder)
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)
    facts = {"recipe": asdict(recipe), "step": step, "loss": loss, "torch": torch.__version__}
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(prog="python -m fourbit.demo.pretrain", description=main.__doc__)
    parser.add_argument("output", type=Path, help="the folder to write; an interrupted run in it is taken up")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--device")
    fields = {name: value for name, value in asdict(Recipe()).items() if not isinstance(value, tuple)}
    for name, value in fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(**{name: getattr(given, name) for name in fields})
    finished = pretrain(recipe, given.output, save_every=given.save_every, device=given.device)
    logger.info("the model lies in %s", finished)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
