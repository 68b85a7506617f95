"""From a model folder's config.json to the class that can hold its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.errors import BrokenCheckpoint, InputError, NotAModel
from fourbit.models.checkpoint import read_json
from fourbit.models.folders import CONFIG_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["explain_failure", "find_class", "read_config"]

ADAPTER_CONFIG_FILE = "adapter_config.json"


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        NotAModel: there is none, or its architecture is unknown or needs the folder's own code.
        BrokenCheckpoint: it cannot be read.
    """
    import transformers

    path = folder / CONFIG_FILE
    if not path.is_file():
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            raise NotAModel(f"{folder} is an adapter; give the folder of its base model, and this one as the adapter.")
        raise NotAModel(f"{folder} is no model folder: it holds no {CONFIG_FILE}.")
    raw = read_json(path)
    model_type, own_code = raw.get("model_type"), isinstance(raw.get("auto_map"), dict)
    if not isinstance(model_type, str) or not model_type:
        raise NotAModel(f"{path} names no model_type, so what kind of model it describes is not known.")
    known = model_type in transformers.CONFIG_MAPPING
    if not known and not own_code:
        raise NotAModel(
            f"{path} describes a model of type {model_type!r}, which transformers {transformers.__version__} does not"
            " know; a newer version may."
        )
    if not known and not trust_remote_code:
        raise NotAModel(_needs_code(folder))
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise BrokenCheckpoint(f"{path} does not describe a {model_type} model: {_first_line(error)}") from error
    return config


def find_class(config: PreTrainedConfig, folder: Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that the folder's weights were saved from, or else the language model of its type.

    Raises:
        NotAModel: there is none, or it is the folder's own code and that is not trusted.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto

    listed = config.architectures if isinstance(config.architectures, (list, tuple)) else ()
    names = [name for name in listed if isinstance(name, str)]
    own_code = {reference.rpartition(".")[2]: (auto, reference) for auto, reference in _own_classes(config).items()}
    for name in names:
        if trust_remote_code and name in own_code:
            auto, reference = own_code[name]
            model_class = get_class_from_dynamic_module(reference, folder)
            model_class.register_for_auto_class(auto)
            return model_class  # type: ignore[no-any-return]
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            if getattr(model_class, "config_class", None) is None:
                raise NotAModel(f"{folder}/config.json names {name} as its architecture, which is no model by itself.")
            return model_class
    if any(name in own_code for name in names):
        raise NotAModel(_needs_code(folder))
    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        if not names and type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    raise NotAModel(
        f"{folder / CONFIG_FILE} asks for the architecture {', '.join(names) or 'of ' + config.model_type}, which"
        f" transformers {transformers.__version__} does not have."
    )


def explain_failure(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> InputError | None:
    """Why a model cannot even be built from its configuration; None where it can."""
    import torch

    try:
        with torch.device("meta"):
            model_class(config)
    except Exception as error:
        return BrokenCheckpoint(
            f"{folder / CONFIG_FILE} describes a {model_class.__name__} that cannot be built: {_first_line(error)}"
        )
    return None


def _own_classes(config: PreTrainedConfig) -> dict[str, str]:
    """The classes that come with the folder's own code, by the auto class that would load them."""
    auto_map: dict[str, Any] = getattr(config, "auto_map", None) or {}
    return {auto: ref for auto, ref in auto_map.items() if auto.startswith("AutoModel") and isinstance(ref, str)}


def _needs_code(folder: Path) -> str:
    return (
        f"The model in {folder} needs Python code that comes with it; read that code first, and if you trust it pass"
        " trust_remote_code=True (--trust-remote-code)."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
