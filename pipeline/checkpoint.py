"""Where a model's files are, whether they are an Ovis-Image checkpoint, and which one exactly.

It exists so that a wrong folder is named as such before gigabytes are read. It knows files only: no tensor is loaded
here, and torch is not imported.

Invariants: whatever ``locate`` returns, ``check`` accepts; nothing but safetensors is ever read (a ``.bin`` may run
code when it is opened).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError

PIPELINE_CLASS = "OvisImagePipeline"
WEIGHTED = ("transformer", "text_encoder", "vae")
COMPONENTS = (*WEIGHTED, "tokenizer", "scheduler")
TINY = "tiny"

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SAMPLES = 16
_SAMPLE_BYTES = 65_536


@dataclass(frozen=True)
class Checkpoint:
    """Files that hold an Ovis-Image model."""

    folder: Path
    name: str  # as it was asked for
    revision: str  # the hub's commit, or `fingerprint` of a folder


def locate(name: str, *, revision: str | None, offline: bool, models_dir: Path) -> Checkpoint:
    """Find the checkpoint ``name``: ``tiny``, a folder, or ``owner/name`` on the hub.

    ``revision`` pins a hub name to a commit, tag or branch; for a folder it is the fingerprint the folder must have.
    Raises CheckpointError, which says what was found and what to do.
    """
    if name == TINY:
        from pipeline.tiny.checkpoint import ensure_tiny

        return _from_folder(ensure_tiny(models_dir), name, revision)
    folder = Path(name).expanduser()
    if folder.exists():
        return _from_folder(folder, name, revision)
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name, revision, offline)
    raise CheckpointError(
        f"there is no folder {name!r}: give a folder that holds an {PIPELINE_CLASS} checkpoint, a hub name such as "
        f"'AIDC-AI/Ovis-Image-7B', or '{TINY}'"
    )


def check(folder: Path) -> None:
    """Raise CheckpointError unless ``folder`` is laid out as an Ovis-Image checkpoint in safetensors."""
    index = folder / "model_index.json"
    if not folder.is_dir() or not index.is_file():
        raise CheckpointError(
            f"{folder} holds no model_index.json, so it is no diffusers checkpoint: give the folder that "
            f"{PIPELINE_CLASS}.save_pretrained wrote, not one of its parts"
        )
    found = _json_object(index).get("_class_name")
    if found != PIPELINE_CLASS:
        raise CheckpointError(f"{folder} is a checkpoint of {found}, and only {PIPELINE_CLASS} can be drawn with")
    for component in COMPONENTS:
        if not (folder / component).is_dir():
            raise CheckpointError(f"{folder} has no folder {component}: the checkpoint is incomplete")
    for component in WEIGHTED:
        _check_weights(folder / component)


def fingerprint(folder: Path) -> str:
    """Which model a folder holds, cheaply: ``sha256-`` and 16 hexadecimal digits.

    Hashed are all JSON and template files in full, and of each safetensors file its name, its size, its header
    (names, shapes and types of all tensors) and 16 evenly spaced samples of 64 KiB: other weights of the same shape
    differ there.
    """
    digest = hashlib.sha256()
    patterns = ("*.json", "*/*.json", "*/*.jinja", "*/*.safetensors")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        for part in _samples(path) if path.suffix == ".safetensors" else [path.read_bytes()]:
            digest.update(part)
    return f"sha256-{digest.hexdigest()[:16]}"


def _from_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    check(folder)
    found = fingerprint(folder)
    if revision is not None and revision != found:
        raise CheckpointError(f"{folder} is at revision {found}, not at {revision}: correct one of the two")
    return Checkpoint(folder, name, found)


def _from_hub(name: str, revision: str | None, offline: bool) -> Checkpoint:
    import httpx
    from diffusers import OvisImagePipeline

    from pipeline.quiet import quiet

    try:
        with quiet():
            downloaded = OvisImagePipeline.download(
                name, revision=revision, use_safetensors=True, local_files_only=offline
            )
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        raise CheckpointError(_unreachable(name, revision, offline, error)) from error
    folder = Path(downloaded)
    check(folder)
    return Checkpoint(folder, name, folder.name)  # the hub's cache names a snapshot by its commit


def _unreachable(name: str, revision: str | None, offline: bool, error: Exception) -> str:
    what = f"{name} at revision {revision}" if revision else name
    if offline:
        return f"{what} is not in this machine's cache, and offline was asked for: download it first, or give a folder"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"{what} could not be fetched from the hub: be online and check the name and the revision, or give a folder "
        f"that holds the checkpoint ({reason})"
    )


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: the checkpoint is incomplete")
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(dict(_json_object(index).get("weight_map", {})).values())  # type: ignore[call-overload]
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}: download the checkpoint again")
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    found = f"only {', '.join(others)}" if others else "no weights"
    raise CheckpointError(
        f"{folder} holds {found}; weights are read from safetensors alone: save the model again with "
        "safe_serialization=True"
    )


def _json_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _samples(path: Path) -> list[bytes]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        parts = [file.read(min(header_bytes, size_bytes))]
        for sample in range(_SAMPLES):
            file.seek(8 + len(parts[0]) + (size_bytes - 8 - len(parts[0])) * sample // _SAMPLES)
            parts.append(file.read(_SAMPLE_BYTES))
    return parts
