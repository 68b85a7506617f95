"""The tokenizer and the data of a run, ready for the trainer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from fourbit.data.prepare import prepare_data
from fourbit.data.templates import ensure_chat_template, ensure_pad_token
from fourbit.errors import InputError, MissingExtra
from fourbit.models.architecture import read_config
from fourbit.models.folders import locate
from fourbit.models.origin import ModelOrigin
from fourbit.models.tokenizer import VOCABULARY_FILES, load_tokenizer
from fourbit.train.config import USUAL_LENGTH, TrainConfig
from fourbit.train.events import OnEvent, Said
from fourbit.train.values import NOT_INSTALLED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fourbit.evaluate import Exam

__all__ = ["Material", "open_material", "pack_lengths", "settle_tokenizer"]


@dataclass(frozen=True)
class Material:
    """What a run trains on.

    Attributes:
        tokenizer: with a chat template and a pad token.
        train, evaluation: one example a row, with input_ids and labels.
        packed_train, packed_evaluation: the same, several examples a row; None where they are not to be packed.
        dropped: records that could not be used.
        sentences: what there is to say about the data.
        max_length: tokens of a row.
        exam: questions to be asked at every evaluation.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset | None
    packed_train: Dataset | None
    packed_evaluation: Dataset | None
    dropped: int
    sentences: tuple[str, ...]
    max_length: int
    exam: Exam | None = None

    def unpacked(self) -> Material:
        """The same with one example a row."""
        return replace(self, packed_train=None, packed_evaluation=None)

    @property
    def rows(self) -> Dataset:
        """What the trainer takes its batches from."""
        return self.train if self.packed_train is None else self.packed_train

    @property
    def eval_rows(self) -> Dataset | None:
        """What it evaluates on."""
        return self.evaluation if self.packed_evaluation is None else self.packed_evaluation

    def places(self, rows: Sequence[int]) -> list[str]:
        """Where the records in some of the `rows` were read."""
        examples: Iterable[int] = rows
        if self.packed_train is not None:
            # Packing looks at lengths alone, so the numbers of the examples are packed as their tokens were.
            numbers = [[number] * len(ids) for number, ids in enumerate(self.train["input_ids"])]
            packed = _pack(self.train.remove_columns("labels").add_column("labels", numbers), self.max_length)
            examples = (number for row in rows for number in dict.fromkeys(packed[row]["labels"]))
        return [str(self.train[number]["place"]) for number in examples]

    def contents(self, config: TrainConfig) -> dict[str, str | None]:
        """A hash of each thing that the run learns from, and None of what it has not; see `folder.CONTENTS`.

        A model or file that only lies elsewhere gives the same.
        """
        origin = ModelOrigin(model=config.model, adapter=config.adapter, revision=config.revision)
        evaluation = None if self.evaluation is None else _hash(self.evaluation)
        return {**origin.fingerprints(), "examples": _hash(self.train), "eval_examples": evaluation}

    def steps(self, config: TrainConfig) -> int:
        """Optimizer steps of the whole run, as the Trainer counts them."""
        if config.max_steps > 0:
            return config.max_steps
        batches = math.ceil(len(self.rows) / config.per_device_train_batch_size)
        return math.ceil(config.num_train_epochs * max(1, math.ceil(batches / config.gradient_accumulation_steps)))


def open_material(config: TrainConfig, *, on_event: OnEvent) -> Material:
    """Read, recognise, split, tokenize, mask and pack.

    Raises:
        InputError: there is no tokenizer, the data cannot be used, or a row would be longer than the model allows.
    """
    _check_libraries()
    tokenizer, max_length, settled = settle_tokenizer(config)
    prepared = prepare_data(
        config.data,
        tokenizer,
        max_length=max_length,
        loss_on=config.loss_on,
        eval_source=config.eval_data,
        eval_size=config.eval_size,
        seed=config.data_seed,
        split=config.split,
        limit=config.limit,
    )
    sentences = [*settled, *prepared.sentences]
    for sentence in sentences:
        on_event(Said(sentence))
    packed = _pack(prepared.train, max_length) if config.packing else None
    if packed is not None:
        count, rows = len(prepared.train), len(packed)
        on_event(Said(f"Packed {count:,} examples into {rows:,} rows of up to {max_length} tokens."))
    packs_evaluation = config.packing and prepared.evaluation is not None
    return Material(
        tokenizer=tokenizer,
        train=prepared.train,
        evaluation=prepared.evaluation,
        packed_train=packed,
        packed_evaluation=_pack(prepared.evaluation, max_length) if packs_evaluation else None,
        dropped=prepared.dropped,
        sentences=tuple(sentences),
        max_length=max_length,
        exam=_read_exam(config, evaluates=prepared.evaluation is not None),
    )


def _read_exam(config: TrainConfig, *, evaluates: bool) -> Exam | None:
    if config.mmlu is None:
        return None
    from fourbit.evaluate import read_exam
    from fourbit.evaluate.mmlu import check_shots

    if not evaluates:
        raise InputError("`mmlu` is asked at every evaluation, and there is none; give `eval_size` or `eval_data`.")
    exam = read_exam(config.mmlu, limit=config.mmlu_limit)
    check_shots(exam, config.mmlu_shots)
    return exam


def settle_tokenizer(config: TrainConfig) -> tuple[PreTrainedTokenizerBase, int, tuple[str, ...]]:
    """The tokenizer with a chat template and a pad token, the tokens of a row at most, and what there is to say.

    Raises:
        InputError: there is no tokenizer, or a row would be longer than the model allows.
    """
    tokenizer = _open_tokenizer(config)
    max_length = _settle_length(config)
    settled = (ensure_chat_template(tokenizer, name=config.chat_template), ensure_pad_token(tokenizer))
    return tokenizer, max_length, tuple(filter(None, settled))


def _check_libraries() -> None:
    try:
        import datasets
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(NOT_INSTALLED) from error
    datasets.disable_progress_bars()


def _open_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the adapter to go on with, whose template it was trained with, or the model's."""
    if config.adapter is not None:
        folder = locate(config.adapter, kind="adapter")
        if any(found for name in VOCABULARY_FILES for found in folder.glob(name)):
            return load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
    return load_tokenizer(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)


def _settle_length(config: TrainConfig) -> int:
    folder = locate(config.model, revision=config.revision)
    settings = read_config(folder, trust_remote_code=config.trust_remote_code).get_text_config(decoder=True)
    longest = getattr(settings, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return config.max_length or USUAL_LENGTH
    if config.max_length is None:
        return min(USUAL_LENGTH, longest)
    if config.max_length > longest:
        raise InputError(
            f"`max_length` is {config.max_length}, and {config.model} was made for {longest} tokens; give {longest} or"
            " less."
        )
    return config.max_length


def _hash(rows: Dataset) -> str:
    """Of the tokens and labels, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for table in rows.with_format("arrow").iter(batch_size=1024):
        for name in ("input_ids", "labels"):
            lists = cast(Any, table).column(name).combine_chunks()
            for array in (lists.value_lengths(), lists.flatten()):
                digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def pack_lengths(lengths: Sequence[int], max_length: int) -> dict[str, float]:
    """How examples of such lengths would be packed: `packed_rows`, and `packed_share`, how full they would be."""
    from datasets import Dataset

    _check_libraries()
    ids = [[0] * length for length in lengths]
    rows = len(_pack(Dataset.from_dict({"input_ids": ids, "labels": ids}), max_length))
    return {"packed_rows": rows, "packed_share": sum(lengths) / (rows * max_length)}


def _pack(data: Dataset, max_length: int) -> Dataset:
    """Several examples a row, best fit first; `seq_lengths` says where each ends, so that none sees another."""
    from trl import pack_dataset

    columns: Any = data.select_columns(["input_ids", "labels"])
    return pack_dataset(columns, max_length, "bfd")
