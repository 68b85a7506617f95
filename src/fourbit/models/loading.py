"""`fourbit.load`: a language model in 4 bits from any folder, adapter included.

transformers does the loading, so that its rules for names, tied weights and missing tensors hold for every
architecture. What it is given differs: a state dict whose tensors are read one at a time into reused memory (see
`reading`), so that quantizing a folder never holds more than one tensor in full precision.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourbit.errors import BrokenCheckpoint, InputError, UnsupportedDtype
from fourbit.models import adapters
from fourbit.models.architecture import explain_failure, find_class, read_config
from fourbit.models.checkpoint import Checkpoint
from fourbit.models.folders import CONFIG_FILE, locate
from fourbit.models.reading import Reader
from fourbit.nn import QuantLinear
from fourbit.quant import QuantConfig, layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["DTYPES", "Source", "build", "load", "load_folder", "open_folder", "outline", "parameter_keys"]

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(
    path: str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model in 4 bits.

    Args:
        path: a folder or hub name: in 16 or 32 bits (quantized while it is read), or in 4 bits by bitsandbytes or us.
        config: how to quantize; NF4 with double quantization by default. A folder in 4 bits already keeps what it has:
            leave it out there, or give the same; only `compute_dtype` is free.
        adapter: a folder or hub name with a PEFT adapter to put on the model, which is then a `PeftModel`.
        dtype: of everything that is not in 4 bits, and of computing. Weights are cast to it before they are quantized.
        device: where to put it: by default the GPU where there is one; "auto" spreads it over all devices.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub.

    Returns:
        the model, in evaluation mode.

    Memory: the 4-bit model and about one tensor in full precision.

    Raises:
        NotAModel, BrokenCheckpoint, NonFiniteWeight, AdapterMismatch, UnsupportedDtype, InputError (a config that
        contradicts the folder): each names the file or the tensor.
    """
    folder = locate(path, revision=revision)
    model = load_folder(folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    if adapter is None:
        return model
    return adapters.attach(model, locate(adapter, kind="adapter"))


def load_folder(
    folder: Path,
    config: QuantConfig | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """`load` for a local folder without an adapter."""
    if dtype not in DTYPES:
        raise UnsupportedDtype(f"A model cannot compute in {dtype}; give {', '.join(map(str, DTYPES))}.")
    with open_folder(folder, config, trust_remote_code=trust_remote_code) as source:
        outline(source, dtype)  # a broken folder is refused before memory is spent on it
        model = build(
            source.model_class,
            source.model_config,
            source.reader.tensors(),
            folder=folder,
            dtype=dtype,
            device_map=_device_map(device),
            quantization_config=source.quantization_config,
        )
    _take_generation_config(model, folder)
    return model


@dataclass(frozen=True)
class Source:
    """An opened model folder.

    Attributes:
        folder: where it is.
        reader: of its tensors.
        model_config, model_class: what its config.json says.
        config: how its weights are or will be quantized.
        in_four_bits: whether they are already.
    """

    folder: Path
    reader: Reader
    model_config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    config: QuantConfig
    in_four_bits: bool

    @property
    def quantization_config(self) -> QuantConfig | None:
        """What `from_pretrained` is given; for a folder in 4 bits it stands in the model's config."""
        return None if self.in_four_bits else self.config


@contextmanager
def open_folder(folder: Path, config: QuantConfig | None, *, trust_remote_code: bool) -> Iterator[Source]:
    """Read everything about a model folder but the values of its tensors.

    Raises:
        NotAModel, BrokenCheckpoint, InputError (a config that contradicts the folder).
    """
    model_config = read_config(folder, trust_remote_code=trust_remote_code)
    model_class = find_class(model_config, folder, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    _check_depth(model_config, checkpoint)
    with Reader(checkpoint) as reader:
        settled, in_four_bits = _settle(config, model_config, reader)
        if in_four_bits:
            model_config.quantization_config = {"quant_method": settled.quant_method, **asdict(settled)}
        yield Source(folder, reader, model_config, model_class, settled, in_four_bits)


def outline(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, with every tensor's name and shape checked, and not a byte read.

    Raises:
        BrokenCheckpoint: a tensor is missing or has the wrong shape or dtype. InputError: there is nothing to quantize.
    """
    model = build(
        source.model_class,
        source.model_config,
        source.reader.outlines(),
        folder=source.folder,
        dtype=dtype,
        device_map={"": "meta"},
        quantization_config=source.quantization_config,
    )
    entries = source.reader.checkpoint.entries
    weights = {key for key in model.hf_quantizer.sources.values() if key in entries}
    for entry in (entries[key] for key in weights | parameter_keys(model, entries)):
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise BrokenCheckpoint(
                f"The tensor {entry.name} in {entry.path} holds {entry.dtype}, and no 16-bit weight."
            )
    return model


def parameter_keys(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """The keys of a folder that are floating parameters of the model and stay as they are.

    With or without the prefix of the model below a head, as folders have either. A key that transformers renames is
    not found.
    """
    prefix = f"{model.base_model_prefix}."
    kept = {
        name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.is_floating_point() and not (isinstance(module, QuantLinear) and parameter is module.weight)
    }
    return {key for key in keys if key in kept or prefix + key in kept or key.removeprefix(prefix) in kept}


def build(
    model_class: type[PreTrainedModel],
    model_config: PreTrainedConfig,
    tensors: Mapping[str, Any],
    *,
    folder: Path,
    **arguments: Any,
) -> PreTrainedModel:
    """Have transformers make a model from a state dict, and check that nothing was missing or misshapen.

    Args:
        tensors: see `Reader.tensors`.
        arguments: for `from_pretrained`.

    Raises:
        BrokenCheckpoint, NonFiniteWeight, InputError.
    """
    try:
        with _without_report():
            model, found = model_class.from_pretrained(
                None,
                config=model_config,
                state_dict=dict(tensors),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one sentence
                **arguments,
            )
    except InputError:
        raise
    except Exception as error:
        reason = explain_failure(model_class, model_config, folder)
        raise reason or error from error
    _check(found, folder)
    return model


def _check_depth(model_config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse a number of layers that the folder cannot have: building them could take forever."""
    layers = getattr(model_config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(checkpoint.entries):
        raise BrokenCheckpoint(
            f"{checkpoint.folder / CONFIG_FILE} describes {layers:,} layers, and there are only"
            f" {len(checkpoint.entries)} tensors."
        )


def _settle(config: QuantConfig | None, model_config: PreTrainedConfig, reader: Reader) -> tuple[QuantConfig, bool]:
    """How the weights are or will be quantized, and whether they are already.

    Raises:
        InputError: the folder is quantized in another way than `config` asks for, or than we can read.
    """
    folder, stored = reader.checkpoint.folder, reader.checkpoint.quantized
    settings = getattr(model_config, "quantization_config", None)
    if settings is None:
        settings = getattr(model_config.get_text_config(decoder=True), "quantization_config", None)
    if settings is None:
        if stored:
            raise BrokenCheckpoint(
                f"{folder} holds weights in 4 bits, but its {CONFIG_FILE} has no quantization_config."
            )
        return config or QuantConfig(), False
    try:
        found = QuantConfig.from_dict(settings if isinstance(settings, dict) else settings.to_dict())
    except InputError as error:
        raise type(error)(f"{folder} cannot be loaded: {error}") from error
    if not stored:
        raise BrokenCheckpoint(f"The {CONFIG_FILE} of {folder} says that it is in 4 bits, but no tensor in it is.")
    found = replace(found, **_stored_settings(reader, min(stored)))
    if config is None:
        return replace(found, compute_dtype=None), True
    _refuse_conflict(config, found, folder)
    return replace(found, compute_dtype=config.compute_dtype), True


def _stored_settings(reader: Reader, name: str) -> dict[str, Any]:
    """What a tensor in 4 bits says of itself; a config.json of bitsandbytes does not know the block size."""
    entries = reader.checkpoint.entries
    keys = [key for key in entries if key.startswith(f"{name}.quant_state.")]
    state = layout.read_state({key: reader.read(entries[key]) for key in keys}, name)
    return {
        "format": state["quant_type"],
        "block_size": state["blocksize"],
        "double_quant": "nested_offset" in state,
    }


def _refuse_conflict(config: QuantConfig, found: QuantConfig, folder: Path) -> None:
    same = (config.format, config.block_size, config.double_quant) == (
        found.format,
        found.block_size,
        found.double_quant,
    )
    if not same:
        raise InputError(
            f"{folder} is in 4 bits already, as {_describe(found)}, and {_describe(config)} was asked for;"
            " leave the config out, or quantize the 16-bit model anew."
        )
    if config.skip is not None and set(config.skip) != set(found.skip or ()):
        raise InputError(
            f"{folder} is in 4 bits already, so which modules are left out is settled; leave `skip` out of the config."
        )


def _describe(config: QuantConfig) -> str:
    scales = "double quantization" if config.double_quant else "fp32 scales"
    return f"{config.format} in blocks of {config.block_size} with {scales}"


def _check(found: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of which transformers had to make up a part."""
    for name, given, expected in sorted(found["mismatched_keys"]):
        raise BrokenCheckpoint(
            f"The tensor {name} in {folder} has the shape {list(given)}; the model that {CONFIG_FILE} describes needs"
            f" {list(expected)}."
        )
    if missing := sorted(found["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BrokenCheckpoint(f"The tensor {missing[0]}{more} is missing in {folder}; {CONFIG_FILE} asks for it.")
    if unexpected := sorted(found["unexpected_keys"]):
        logger.warning(
            "%s: %d tensors, such as %s, belong to no part of the model and are left.",
            folder,
            len(unexpected),
            unexpected[0],
        )


def _device_map(device: torch.device | str | None) -> str | dict[str, Any] | None:
    if device is None:
        return {"": torch.device("cuda")} if torch.cuda.is_available() else None
    if device == "auto":
        return "auto"
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"There is no device {str(device)!r} that torch can use here; cpu always is.") from error
    return {"": torch.device(device)}


def _take_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Take over the folder's settings for generation, as `from_pretrained` does when it is given a folder."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name=CONFIG_FILE, _from_model_config=True
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Drop transformers' table of what did not fit: we say it in one sentence."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
