"""`quantize_folder`: a 16-bit model folder into a 4-bit one, holding about one tensor at a time.

Which tensors are weights of linear layers is asked of transformers: it loads the folder onto the meta device, where
nothing is read and nothing is held, and our quantizer notes which key each weight comes from. The names in the new
folder are those of the old one. Where transformers would cut a weight out of a larger tensor, or put it together from
several, there is no such key; a folder of that kind is loaded in 4 bits as a whole and saved.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from fourbit.errors import InputError, NonFiniteWeight
from fourbit.formats import NESTED_BLOCK_SIZE, block_count, packed_size
from fourbit.models.checkpoint import INDEX_FILE, PICKLES, Checkpoint, Entry
from fourbit.models.folders import CONFIG_FILE, MANIFEST_FILE, check_output, disk_problem, locate, new_folder
from fourbit.models.loading import DTYPES, Source, load_folder, open_folder, outline, parameter_keys
from fourbit.models.process import peak_resident_bytes
from fourbit.models.reading import Reader
from fourbit.models.values import holds_nan, is_finite
from fourbit.models.writing import Planned, SafetensorsWriter
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["QuantizeReport", "quantize_folder"]

Progress = Callable[[str, int, int], None]

_WEIGHTS = ("*.safetensors", *PICKLES, "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json")
_LONGEST_NUMBER = -1.2345678901234567e-300
"""No float has more characters in JSON."""


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_folder` did, or would do.

    Attributes:
        parameters: elements of all tensors of the model.
        bytes_before, bytes_after: of the safetensors' tensors in the old and the new folder.
        bits_per_parameter: of the whole new model, embeddings included.
        seconds: it took.
        peak_rss_bytes: the largest resident size of the process so far.
    """

    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_parameter: float
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class _Plan:
    """How each tensor of a folder is written.

    Attributes:
        reader: of the old folder.
        config: with everything settled; what quantizes.
        weights: the keys that are quantized; True where the tensor is stored transposed.
        parameters: the keys of other parameters.
        model: without memory; carries the new config.json.
        dtype: that weights are cast to before they are quantized, as loading the folder would.
        divided: a weight that has no key of its own, or None.
    """

    reader: Reader
    config: QuantConfig
    weights: Mapping[str, bool]
    parameters: Set[str]
    model: PreTrainedModel
    dtype: torch.dtype
    divided: str | None


def quantize_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a model folder with its linear layers in 4 bits, in bitsandbytes' layout.

    Tensors that stay in 16 bits, the tokenizer and the other small files are copied as they are. The folder appears
    whole or not at all.

    Args:
        source: a folder or hub name, in 16 or 32 bits.
        output: the folder to write. It must not exist, unless it is empty.
        config: NF4 with double quantization by default.
        overwrite: replace a folder that this function wrote, and that holds nothing else.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub.
        dry_run: check everything but the values, and write nothing.
        progress: called with what is being done, the bytes read so far, and all that there are.

    Memory: about one tensor.

    Raises:
        NotAModel, BrokenCheckpoint, NonFiniteWeight, OutputExists, InputError.
    """
    start, output = time.perf_counter(), Path(output)
    check_output(output, overwrite=overwrite)
    folder = locate(source, revision=revision)
    with open_folder(folder, config, trust_remote_code=trust_remote_code) as opened:
        checkpoint = opened.reader.checkpoint
        plan = _plan(opened)
        size = sum(tensor.nbytes for entry in checkpoint.entries.values() for tensor in _results(plan, entry).values())
        if not dry_run:
            with new_folder(output, overwrite=overwrite) as unfinished:
                if plan.divided is None:
                    size = _write_tensors(plan, unfinished, progress)
                    _write_config(plan, unfinished)
                else:
                    size = _load_and_save(plan, unfinished, trust_remote_code=trust_remote_code)
                _copy_rest(folder, unfinished)
    parameters = sum(entry.numel() for entry in checkpoint.entries.values())
    return QuantizeReport(
        parameters=parameters,
        bytes_before=checkpoint.nbytes,
        bytes_after=size,
        bits_per_parameter=8 * size / parameters,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_resident_bytes(),
    )


def _plan(source: Source) -> _Plan:
    """Find out which keys are weights of linear layers, by loading the folder onto the meta device."""
    if source.in_four_bits:
        raise InputError(f"{source.folder} is in 4 bits already.")
    entries, dtype = source.reader.checkpoint.entries, source.model_config.dtype
    if not isinstance(dtype, torch.dtype):
        dtype = _first_dtype(source.reader.checkpoint)
    if dtype not in DTYPES:
        raise InputError(
            f"{source.folder}/{CONFIG_FILE} says that the model is in {str(dtype).removeprefix('torch.')}; it must be"
            f" one of {', '.join(str(each).removeprefix('torch.') for each in DTYPES)}."
        )
    model = outline(source, dtype)
    quantizer = model.hf_quantizer
    keys = {name: quantizer.sources.get(f"{name}.weight") for name in quantizer.target_names}
    divided = next((name for name, key in keys.items() if key not in entries), None)
    weights = {key: name in quantizer.transposed for name, key in keys.items() if key is not None}
    parameters = parameter_keys(model, entries) - weights.keys()
    return _Plan(source.reader, source.config, weights, parameters, model, dtype, divided)


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    dtypes = (entry.dtype for entry in checkpoint.entries.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def _results(plan: _Plan, entry: Entry) -> dict[str, Planned]:
    """What is written for one tensor of the old folder."""
    if entry.name not in plan.weights:
        return {entry.name: Planned(entry.dtype, entry.shape)}
    config, elements = plan.config, entry.numel()
    blocks = block_count(elements, config.block_size)
    nested = config.double_quant
    with torch.device("meta"):
        packed = torch.empty(packed_size(elements), dtype=torch.uint8)
        absmax = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32)
        nested_absmax = torch.empty(block_count(blocks, NESTED_BLOCK_SIZE)) if nested else None
    offset = torch.tensor(_LONGEST_NUMBER, dtype=torch.float64) if nested else None
    shape = torch.Size(entry.shape)
    outline = QuantizedTensor(
        packed, absmax, nested_absmax, offset, shape, plan.dtype, config.format, config.block_size
    )
    return {
        key: Planned(tensor.dtype, tuple(tensor.shape), exact=".quant_state." not in key)
        for key, tensor in outline.state_dict(entry.name).items()
    }


def _write_tensors(plan: _Plan, folder: Path, progress: Progress | None) -> int:
    """Write every file of the old folder anew, and the index of them; returns the bytes of the tensors."""
    checkpoint = plan.reader.checkpoint
    done, size = 0, 0
    places: dict[str, str] = {}
    for path in checkpoint.files:
        entries = checkpoint.in_file(path)
        planned = {name: tensor for entry in entries for name, tensor in _results(plan, entry).items()}
        writer = SafetensorsWriter(folder / path.name, planned)
        try:
            for entry in entries:
                if progress is not None:
                    progress("quantizing", done, checkpoint.nbytes)
                for name, tensor in _written(plan, entry).items():
                    writer.write(name, tensor)
                    size += tensor.nbytes
                done += entry.nbytes
            writer.finish()
        finally:
            writer.close()
        places |= dict.fromkeys(planned, path.name)
    if progress is not None:
        progress("quantizing", done, checkpoint.nbytes)
    if len(checkpoint.files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return size


def _written(plan: _Plan, entry: Entry) -> dict[str, Tensor]:
    """The tensors that take the place of one."""
    tensor = plan.reader.read(entry)
    if entry.name not in plan.weights:
        # A buffer may well hold infinity: some models store their causal mask.
        if not is_finite(tensor) if entry.name in plan.parameters else holds_nan(tensor):
            raise NonFiniteWeight(f"The tensor {entry.name} in {entry.path} holds NaN or infinity.")
        return {entry.name: tensor}
    weight = tensor.t() if plan.weights[entry.name] else tensor
    try:
        return quantize(weight.to(plan.dtype).contiguous(), plan.config).state_dict(entry.name)
    except NonFiniteWeight as error:
        raise NonFiniteWeight(
            f"The tensor {entry.name} in {entry.path} holds NaN or infinity and cannot be quantized."
        ) from error


def _write_config(plan: _Plan, folder: Path) -> None:
    config = plan.model.config
    config.dtype = str(plan.dtype).removeprefix("torch.")
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(folder)


def _load_and_save(plan: _Plan, folder: Path, *, trust_remote_code: bool) -> int:
    source = plan.reader.checkpoint.folder
    model = load_folder(source, plan.config, dtype=plan.dtype, device="cpu", trust_remote_code=trust_remote_code)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        raise problem from error
    return Checkpoint.open(folder).nbytes


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy what is no weight: tokenizer, chat templates, generation settings, licence, code."""
    for path in sorted(source.iterdir()):
        target = folder / path.name
        weights = any(path.match(pattern) for pattern in _WEIGHTS)
        if path.is_file() and not (weights or path.name.startswith(".") or path.name in (CONFIG_FILE, MANIFEST_FILE)):
            shutil.copyfile(path, target)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target)
