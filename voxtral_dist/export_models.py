"""Exports of a whole model, what was trained merged into the base's weights.

merged     a Hugging Face folder by the names on disk, which transformers before and after 5.10 load
mistral    consolidated.safetensors, params.json and tekken.json, for vLLM
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from voxtral_dist import mistral_names
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.export_file import Spec, read_file, write_file
from voxtral_dist.export_weights import INDEX, Job
from voxtral_dist.mistral_names import EMBED_POSITIONS

CONSOLIDATED, PARAMS, TEKKEN = "consolidated.safetensors", "params.json", "tekken.json"

COPIED = (
    *"generation_config.json processor_config.json preprocessor_config.json tekken.json tokenizer.json".split(),
    *"tokenizer_config.json special_tokens_map.json chat_template.jinja chat_template.json".split(),
)
"""Files of a Hugging Face folder besides config and weights, as far as the base has them."""


def write_merged(job: Job, folder: Path) -> None:
    """The base's files with the trained weights in them."""
    _check_room(job, folder)
    with tqdm(job.specs, desc="merge", unit="tensor", leave=False) as bar:
        for file in dict.fromkeys(job.base.files.values()):
            specs = {name: job.specs[name] for name, where in job.base.files.items() if where == file}
            write_file(folder / file, specs, job.weight, bar.update)
    job.trained.check_all_used()
    for name in COPIED:
        if (job.base.folder / name).is_file():
            shutil.copyfile(job.base.folder / name, folder / name)
    _write_json(folder / "config.json", _config(job))
    if (job.base.folder / INDEX).is_file():
        index = json.loads((job.base.folder / INDEX).read_text("utf-8"))
        _write_json(folder / INDEX, index | {"metadata": {"total_size": _bytes(job.specs)}})


def load_merged(job: Job, folder: Path) -> Any:
    """As a user does."""
    from transformers import VoxtralForConditionalGeneration

    loaded, info = VoxtralForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    _check_loaded(info)
    return loaded


def _check_loaded(info: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise VoxtralDistError(
                f"the export has {len(info[kind])} {kind.replace('_', ' ')}: {min(info[kind])}"
            )


def _config(job: Job) -> dict[str, Any]:
    """config.json with the type of the weights, and the rotary base where transformers before 5.0 looks for it."""
    values: dict[str, Any] = json.loads((job.base.folder / "config.json").read_text("utf-8"))
    if job.dtype is not None:
        known = [name for name in ("dtype", "torch_dtype") if name in values] or ["dtype"]
        values |= dict.fromkeys(known, str(job.dtype).removeprefix("torch."))
    text = values.get("text_config", {})
    theta = (text.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        text.setdefault("rope_theta", theta)
    return values


def _bytes(specs: Mapping[str, Spec]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())


def _check_room(job: Job, folder: Path) -> None:
    needed, free = _bytes(job.specs), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--out {folder.parent}: the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_mistral(job: Job, folder: Path) -> None:
    """One file by Mistral's names and in its order of query and key rows; the base's ``params.json`` if it has one."""
    _check_room(job, folder)
    tekken = job.base.folder / TEKKEN
    if not tekken.is_file():
        raise UserError(
            f"--format mistral: {job.base.folder} has no {TEKKEN}; copy it from the original model"
        )
    text = job.config.text_config
    try:
        names = {mistral_names.to_mistral(name): name for name in job.specs if _is_stored(job, name)}
    except KeyError as error:
        raise UserError(
            f"--format mistral: the base has weights that Mistral's format has no name for: {error}"
        ) from error

    def tensor(name: str) -> torch.Tensor:
        weight, heads = job.weight(names[name]), mistral_names.rotary_heads(names[name], text)
        return mistral_names.interleaved(weight, heads) if heads else weight

    specs = {new: job.specs[old] for new, old in names.items()}
    with tqdm(specs, desc="merge", unit="tensor", leave=False) as bar:
        write_file(folder / CONSOLIDATED, specs, tensor, bar.update)
    job.trained.check_all_used()
    shutil.copyfile(tekken, folder / TEKKEN)
    if (job.base.folder / PARAMS).is_file():
        shutil.copyfile(job.base.folder / PARAMS, folder / PARAMS)
    else:
        audio = json.loads(tekken.read_text("utf-8"))["audio"]
        _write_json(folder / PARAMS, mistral_names.params(job.config, audio))


def _is_stored(job: Job, name: str) -> bool:
    """Whether a weight is in the file: all are but encoder positions that readers compute themselves.

    Two devices compute them up to 1e-4 apart, because a position of 1500 is multiplied by a rounded frequency.
    """
    if name != EMBED_POSITIONS:
        return True
    there = job.base.read(name).float()
    return not torch.allclose(there, mistral_names.sinusoids(*there.shape), rtol=0, atol=2e-4)


def load_mistral(job: Job, folder: Path) -> Any:
    """Names and rows turned back, as transformers' conversion script does, into the base's architecture."""
    from transformers import VoxtralForConditionalGeneration

    text, encoder = job.config.text_config, job.config.audio_config
    positions = mistral_names.sinusoids(encoder.max_source_positions, encoder.hidden_size)
    state = {EMBED_POSITIONS: positions}
    for name, tensor in read_file(folder / CONSOLIDATED):
        old = mistral_names.from_mistral(name)
        heads = mistral_names.rotary_heads(old, text)
        state[old] = mistral_names.in_halves(tensor, heads) if heads else tensor
    loaded, info = VoxtralForConditionalGeneration.from_pretrained(
        None, config=job.config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    _check_loaded(info)
    return loaded
