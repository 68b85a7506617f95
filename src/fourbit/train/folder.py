"""The folder of a run: whose it is, how far the run came, and what is in it.

fourbit.json            that this is a run of ours, what it learns from, and whether it finished
config.yaml             what it was told
checkpoint-N/           see `checkpoints`
adapter_model.safetensors, adapter_config.json, tokenizer files: once it finished
metrics.json, history.jsonl, report.html: likewise
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fourbit import __version__
from fourbit.errors import InputError, OutputExists, RunExists
from fourbit.files import replace_file
from fourbit.train import checkpoints, values
from fourbit.train.config import TrainConfig
from fourbit.train.lock import LOCK_FILE, FolderLock

__all__ = [
    "CONFIG_FILE",
    "HISTORY_FILE",
    "METRICS_FILE",
    "REPORT_FILE",
    "RESULT_KEYS",
    "SAMPLES_FILE",
    "RunFolder",
    "read_marker",
    "read_metrics",
]

MARKER_FILE = "fourbit.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
HISTORY_FILE = "history.jsonl"
REPORT_FILE = "report.html"
SAMPLES_FILE = "samples.json"
RESULT_KEYS = (
    "steps",
    "tokens",
    "train_loss",
    "eval_loss",
    "tokens_per_second",
    "peak_bytes",
    "planned_bytes",
    "resumed_from",
)
"""Keys of the metrics that a result repeats."""

_KIND = "training run"

MAY_CHANGE = frozenset(
    {
        "activation_offloading",
        "dataloader_num_workers",
        "eval_on_start",
        "eval_steps",
        "force",
        "gradient_checkpointing",
        "logging_steps",
        "max_skipped_steps",
        "max_steps",
        "memory",
        "mmlu",
        "mmlu_limit",
        "mmlu_shots",
        "num_train_epochs",
        "optim_device_budget",
        "optim_folder",
        "optim_host_budget",
        "optim_page_elements",
        "output",
        "per_device_eval_batch_size",
        "report_to",
        "run_name",
        "sample_tokens",
        "samples",
        "save_steps",
        "save_total_limit",
    }
)
"""Keys that may differ when a run is taken up: the folder may have moved, the run be longer, more be shown or kept."""

NAMED_BY_PLACE = frozenset({"model", "adapter", "data", "eval_data"})
"""Keys that say where something lies; what lies there is compared in its stead, see `RunFolder.check_contents`."""

CONTENTS = {
    "model_files": "the files of the model",
    "adapter_files": "the files of the adapter it went on with",
    "examples": "the examples to train on",
    "eval_examples": "the examples to evaluate on",
}
"""What is compared by its content, in words; `material.contents` gives a hash of each."""

_OWN_NAMES = (
    LOCK_FILE,
    MARKER_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    HISTORY_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    "checkpoint-*",
    ".*.unfinished",
    "runs",  # tensorboard's
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer*",
)


@dataclass
class RunFolder:
    """The output of a run, checked but not touched before `begin`.

    Attributes:
        path: where.
        checkpoint: the one to go on from.
        finished: whether the run that is asked for lies there already.
        sentence: what there is to say about it.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    sentence: str | None = None
    _seen: dict[str, Any] | None = None
    _foreign: frozenset[str] = frozenset()
    _contents: dict[str, str | None] | None = None
    _lock: FolderLock | None = None

    @classmethod
    def look(cls, config: TrainConfig, *, resume: bool, overwrite: bool) -> RunFolder:
        """Decide what to do with the output that a config names.

        Raises:
            OutputExists: it holds what we did not write, or a run that may not be replaced.
            InputError: the run there was told something else.
        """
        path = Path(config.output).expanduser()
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputExists(f"{path} exists and is no folder; choose another output.")
        if not path.exists() or all(entry.name == LOCK_FILE for entry in path.iterdir()):
            sentence = f"There is no run in {path} to resume, so it starts anew." if resume else None
            return cls(path, sentence=sentence)
        marker = read_marker(path)
        if marker is None:
            raise OutputExists(f"{path} holds files that no training run of fourbit wrote; choose another output.")
        FolderLock(path).check()
        if overwrite:
            _check_only_ours(path, marker)
            return cls(path, _seen=marker)
        if not resume:
            raise RunExists(
                f"{path} holds a training run already; --resume goes on with it, --overwrite starts anew, or choose"
                " another output."
            )
        return cls._take_up(path, config, marker)

    @classmethod
    def _take_up(cls, path: Path, config: TrainConfig, marker: dict[str, Any]) -> RunFolder:
        before, now = marker["config"], config.to_full_dict()
        free = MAY_CHANGE | (NAMED_BY_PLACE if marker.get("contents") else frozenset())
        changed = [key for key in {**before, **now} if key not in free and _value(now, key) != _value(before, key)]
        checkpoint, damaged = checkpoints.find_newest(path)
        passed_over = "".join(f"{fault}; it is passed over. " for fault in damaged)
        if checkpoint is None and not marker["finished"]:
            sentence = f"{passed_over}There is no complete checkpoint in {path}, so the run starts anew."
            return cls(path, sentence=sentence, _seen=marker)
        if changed:
            told = ", ".join(f"`{key}` {_value(before, key)!r} (now {_value(now, key)!r})" for key in changed)
            raise InputError(
                f"The run in {path} began with {told}; give what it began with, or start anew with --overwrite."
            )
        length = ("max_steps", "num_train_epochs")
        if marker["finished"] and (checkpoint is None or all(now[key] == before.get(key) for key in length)):
            return cls(path, finished=True, sentence=f"The run in {path} finished already; nothing is left to do.")
        assert checkpoint is not None
        step = checkpoints.step_of(checkpoint)
        sentence = f"{passed_over}The run goes on from its checkpoint after step {step}."
        return cls(path, checkpoint, sentence=sentence, _seen=marker)

    def check_contents(self, contents: dict[str, str | None]) -> None:
        """Refuse to go on with a run that learned from something else.

        Args:
            contents: see `material.contents`; kept for whoever takes this run up.

        Raises:
            InputError: names what is not the same.
        """
        self._contents = contents
        if self.checkpoint is None or self._seen is None:
            return
        before = self._seen.get("contents") or contents
        changed = [words for name, words in CONTENTS.items() if contents[name] != before.get(name)]
        if changed:
            raise InputError(
                f"The run in {self.path} cannot go on: {' and '.join(changed)} changed since it began; put back what"
                " was there, or start anew with --overwrite."
            )

    def begin(self, config: TrainConfig) -> None:
        """Make the folder ours. Whatever can be wrong with the input must have been checked before.

        Raises:
            OutputExists: another run is writing there, or did since `look`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path)
        lock.acquire()
        marker = read_marker(self.path)
        if marker != self._seen:
            lock.release()
            raise OutputExists(f"Another run wrote into {self.path} just now; choose another output.")
        self._lock = lock
        # A person's own, beside a run that is taken up: they stay, and are never called ours.
        self._foreign = frozenset(entry.name for entry in self.path.iterdir() if not _is_ours(entry, marker or {}))
        if self.checkpoint is None:
            for path in self.path.iterdir():
                if path.name not in self._foreign and path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        checkpoints.sweep(self.path)
        self._mark(config, finished=False)
        replace_file(self.path / CONFIG_FILE, config.to_yaml())

    def leave(self) -> None:
        """Let another run write there, and leave nothing half-written. A killed process is swept up after later."""
        if self._lock is not None:
            checkpoints.sweep(self.path)
            self._lock.release()
            self._lock = None

    def finish(self, config: TrainConfig) -> None:
        """Say that everything is there."""
        self._mark(config, finished=True)

    def _mark(self, config: TrainConfig, *, finished: bool) -> None:
        marker = {
            "written_by": f"fourbit {__version__}",
            "kind": _KIND,
            "finished": finished,
            "files": sorted(self._written()) if finished else [],
            "contents": self._contents,
            "config": config.to_full_dict(),
        }
        replace_file(self.path / MARKER_FILE, json.dumps(marker, indent=1) + "\n")

    def _written(self) -> set[str]:
        return {entry.name for entry in self.path.iterdir()} - self._foreign - {LOCK_FILE}


def _value(config: dict[str, Any], key: str) -> Any:
    """What a config says of a key, which is the default where it says nothing."""
    if key in config:
        return config[key]
    known = {item.name: item.default for item in fields(TrainConfig)}
    return known[key] if key in known else values.sft_default(key)


def _check_only_ours(path: Path, marker: dict[str, Any]) -> None:
    """Refuse to replace a folder into which somebody put a file of their own."""
    for entry in sorted(path.iterdir()):
        if not _is_ours(entry, marker):
            raise OutputExists(f"{path} holds {entry.name}, which fourbit did not write; choose another output.")


def _is_ours(entry: Path, marker: dict[str, Any]) -> bool:
    return entry.name in marker.get("files", ()) or any(fnmatch(entry.name, name) for name in _OWN_NAMES)


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics of a finished run.

    Raises:
        InputError: they are missing or damaged.
    """
    try:
        metrics = json.loads((path / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = None
    if not isinstance(metrics, dict) or not metrics.keys() >= set(RESULT_KEYS):
        raise InputError(
            f"The run in {path} finished, but its {METRICS_FILE} is missing or damaged; start anew with --overwrite, or"
            " choose another output."
        )
    return metrics


def read_marker(path: Path) -> dict[str, Any] | None:
    """What a folder says of the run in it; None if it holds none of ours."""
    try:
        marker = json.loads((path / MARKER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = (
        isinstance(marker, dict)
        and marker.get("kind") == _KIND
        and isinstance(marker.get("finished"), bool)
        and isinstance(marker.get("config"), dict)
    )
    return marker if sound else None
