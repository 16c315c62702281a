"""The weight files that were published: what each is called, where it lies, and what it says besides its tensors.

Names are those of the files, without hash and extension. Sources: the authors' repository of DPT (release 1_0) and that of MiDaS
(releases v2_1 and v3), whose file names carry the first eight digits of the file's SHA-256, and their published inference code
for the scales, shifts and sizes of the metric models.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch

from accelerated.configs import CONFIGS, MIDAS, Config

_DPT = "https://github.com/isl-org/DPT/releases/download/1_0/"
_MIDAS = "https://github.com/AlexeyAB/MiDaS/releases/download/midas_dpt/"

# Depth in metres is 1 / max(scale * output + shift, 1e-8); a PNG of 16 bits holds it times png_scale, as the benchmark does.
_KITTI: Config = {
    "network_size": [352, 1216],
    "metric_scale": 0.00006016,
    "metric_shift": 0.00579,
    "metric_png_scale": 256,
}
_NYU: Config = {
    "network_size": [480, 640],
    "metric_scale": 0.000305,
    "metric_shift": 0.1378,
    "metric_png_scale": 1000,
}


class Published(NamedTuple):
    """One weight file: the model of `create_model` it is for, its task, its SHA-256's first digits, its place, its settings."""

    model: str
    task: str
    sha256: str
    url: str
    settings: Config

    def describes(self, config: Config) -> bool:
        """Whether `config` is that of this model as far as its name goes: the same network, task, and metres or none."""
        metric = (config.get("metric_scale"), config.get("metric_shift"))
        own = (self.settings.get("metric_scale"), self.settings.get("metric_shift"))
        return (config["name"], config["task"], metric) == (self.model, self.task, own)


def _published(model: str, task: str, file: str, place: str, settings: Config | None = None) -> Published:
    return Published(model, task, file.removesuffix(".pt").rpartition("-")[2], place + file, settings or {})


PUBLISHED: dict[str, Published] = {
    "dpt_hybrid-midas": _published("dpt_hybrid", "depth", "dpt_hybrid-midas-501f0c75.pt", _DPT),
    "dpt_large-midas": _published("dpt_large", "depth", "dpt_large-midas-2f21e586.pt", _DPT),
    "dpt_hybrid_kitti": _published("dpt_hybrid", "depth", "dpt_hybrid_kitti-cb926ef4.pt", _DPT, _KITTI),
    "dpt_hybrid_nyu": _published("dpt_hybrid", "depth", "dpt_hybrid_nyu-2ce69ec7.pt", _DPT, _NYU),
    "dpt_hybrid-ade20k": _published("dpt_hybrid", "segmentation", "dpt_hybrid-ade20k-53898607.pt", _DPT),
    "dpt_large-ade20k": _published("dpt_large", "segmentation", "dpt_large-ade20k-b12dca68.pt", _DPT),
    "midas_v21": _published("midas_v21", "depth", "midas_v21-f6b98070.pt", _MIDAS),
    "midas_v21_small": _published("midas_v21_small", "depth", "midas_v21_small-70d6b9c8.pt", _MIDAS),
}

# Later releases of MiDaS hold the same models under names of their own.
ALIASES = {
    "dpt_hybrid_384": "dpt_hybrid-midas",
    "dpt_large_384": "dpt_large-midas",
    "midas_v21_384": "midas_v21",
    "midas_v21_small_256": "midas_v21_small",
}

# The relative models, which is what the names of create_model mean for files that could be several.
_PLAIN = {
    "dpt_hybrid": "dpt_hybrid-midas",
    "dpt_large": "dpt_large-midas",
    "midas_v21": "midas_v21",
    "midas_v21_small": "midas_v21_small",
}


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a model of `create_model` or a published file's name without hash and extension."""
    known = [*CONFIGS, *MIDAS, *(name for name in [*PUBLISHED, *ALIASES] if name not in MIDAS)]
    if name not in known:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(known)}")


def agrees(config: Config, name: str) -> bool:
    """Whether a model of `config` may be called `name`, a name that `check_name` accepts."""
    if name in CONFIGS | MIDAS:
        return config["name"] == name
    return PUBLISHED[ALIASES.get(name, name)].describes(config)


def candidates(config: Config) -> list[str]:
    """The published models whose network and task are those of `config`: files that their keys and shapes cannot tell apart."""
    return [name for name, entry in PUBLISHED.items() if (entry.model, entry.task) == (config["name"], config["task"])]


def by_hash(path: Path, among: Iterable[str]) -> str | None:
    """The name, of those `among`, whose file has the SHA-256 of the file at `path`, or None."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next((name for name in among if digest.startswith(PUBLISHED[name].sha256)), None)


def by_file_name(path: Path, among: Iterable[str]) -> str | None:
    """The name, of those `among`, that the file at `path` bears, with or without a hash, or None."""
    bare = re.sub(r"-[0-9a-f]{8}$", "", path.stem)
    name = ALIASES.get(bare, bare)
    return name if name in among else None


def plain(name: str) -> str | None:
    """The published relative model that a name of `create_model` means, or None."""
    return _PLAIN.get(name)


def published_file(name: str) -> Path:
    """Return the weight file of a published model: from the folder where torch.hub keeps such files, else by fetching it there.

    A fetched file is compared with its SHA-256 before it gets its name. Raises ValueError for a name without a published file,
    ConnectionError where the file is neither there nor can be fetched.
    """
    check_name(name)
    known = ALIASES.get(name, name)
    known = known if known in PUBLISHED else plain(known) or known
    if known not in PUBLISHED:
        raise ValueError(
            f"no weights of {name} were published: give a weight file, or one of {', '.join([*PUBLISHED, *ALIASES])}"
        )
    url = PUBLISHED[known].url
    folder = Path(torch.hub.get_dir(), "checkpoints")
    names = [url.rpartition("/")[2], *(f"{alias}.pt" for alias, of in ALIASES.items() if of == known)]
    for file in names:
        if (folder / file).is_file():
            return folder / file
    target = folder / names[0]
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), PUBLISHED[known].sha256)
    except (
        URLError,
        TimeoutError,
        ConnectionError,
        HTTPException,
        RuntimeError,
    ) as error:  # RuntimeError: another hash than its own
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"{url} cannot be fetched ({reason}): fetch it by other means into {folder}, or give its path"
        ) from None
    return target
