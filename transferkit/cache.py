"""Features of the frozen part of a model, computed once. The one idea: cut where training begins.

In a phase that trains only the last layer groups, everything before them gives the same output for
the same item in every epoch. That output is computed once for each item, and for each view where
there are finitely many, and kept in a memory-mapped file whose name is a hash of all that it
depends on: weights, data, precision, cut. A second run finds it; a changed weight does not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from transferkit import checkpoint, data, distributed, layers

_FORMAT = 3
State = Tensor | dict[str, Tensor]  # at the cut
About = dict[str, Any]  # what JSON says of the files
Compute = Callable[[nn.Module, data.Batch], State]

_KEPT_AS = {torch.bfloat16: torch.int16}  # numpy has no such type: its bits are kept


def directory() -> Path:
    """Where transferkit keeps what it can make again: TRANSFERKIT_CACHE or ~/.cache/transferkit.

    Example:
        >>> (tk.cache.directory() / "features").name  # where features are kept
        'features'
    """
    return Path(os.environ.get("TRANSFERKIT_CACHE") or Path.home() / ".cache" / "transferkit")


class Features:
    """A source whose inputs are the stored states at the cut.

    Attributes:
        seconds: what computing them took, when they were computed.

    Example:
        >>> source = tk.data.tensors(torch.randn(6, 4), [0, 1] * 3)
        >>> prefix = nn.Linear(4, 2).eval().requires_grad_(False)
        >>> features = tk.cache.cached(prefix, source, lambda part, batch: part(batch.inputs))
        >>> len(features), features.views, features.fetch([0, 1], None, 0).inputs.shape
        (6, 1, torch.Size([2, 2]))
    """

    sizes: np.ndarray | None = None

    def __init__(self, folder: Path, source: data.Source, views: int, labels: Tensor | None):
        try:
            about = json.loads((folder / "about.json").read_text())
            self._parts = {part["name"]: _map(folder, part, "c") for part in about["parts"]}
        except (OSError, ValueError) as error:
            remedy = "delete this folder, and they are computed again"
            raise ValueError(f"the features in {folder} are damaged ({error}): {remedy}") from error
        self.labels, self.lengths, self.views = labels, source.lengths, views
        self.seconds, self._count, self._single = about["seconds"], len(source), about["single"]
        self._tokens = _token_table(source, views) if about["ragged"] else None

    def __len__(self) -> int:
        return self._count

    def fetch(
        self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int
    ) -> data.Batch:
        index = torch.as_tensor(indices)
        rows = index if self.views == 1 else index + (epoch or 0) % self.views * self._count
        if self._tokens is None:
            state = {name: part[rows] for name, part in self._parts.items()}
            for name, part in state.items():  # in the layout that convolutions hand on
                if part.dim() == 4:
                    state[name] = part.contiguous(memory_format=torch.channels_last)
        else:
            real, place = data.ragged(*self._tokens, rows.numpy(), self.sizes)
            state = {}
            for name, part in self._parts.items():
                state[name] = part.new_zeros(*real.shape, *part.shape[1:])
                state[name][real] = part[place]
        labels = None if self.labels is None else self.labels[index]
        return data.Batch(state["state"] if self._single else state, labels, index)

    def fingerprint(self) -> None:
        return None

    def rounded(self) -> Features:
        """The same features, those of tokens in batches that are padded to a few lengths."""
        twin = copy(self)
        twin.sizes = None if self.lengths is None else data.few_lengths(self.lengths)
        return twin


def _token_table(source: data.Source, views: int) -> tuple[np.ndarray, np.ndarray]:
    assert source.lengths is not None  # where states have tokens
    lengths = np.tile(source.lengths, views)  # lengths and ends, as `data.ragged` takes them
    return lengths, np.cumsum(lengths)


def _map(folder: Path, part: About, mode: Literal["c", "w+"]) -> Tensor:
    # mode "c" reads: pages are loaded on demand and shared, and what is written stays private
    dtype = getattr(torch, part["dtype"])
    kept = _KEPT_AS.get(dtype)
    kind = torch.empty(0, dtype=kept or dtype).numpy().dtype
    array = np.memmap(folder / f"{part['name']}.bin", kind, mode, shape=tuple(part["shape"]))
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if kept else tensor


def refuse(objective: object, model: nn.Module, source: data.Source) -> None:
    """Say why features cannot be cached, if they cannot.

    Raises:
        ValueError: the objective acts below the cut, nothing is frozen at the input side, or the
            data look different in every epoch.
        TypeError: the model cannot be cut.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> source = tk.data.tensors(torch.randn(6, 4), [0, 1] * 3)
        >>> tk.cache.refuse(tk.classification(), model, source)
        Traceback (most recent call last):
            ...
        ValueError: nothing before the first trained layer group is frozen, ...
        >>> tk.freeze(model, "0")
        >>> tk.cache.refuse(tk.classification(), model, source)
    """
    live = "or train live with cache=False"
    if getattr(objective, "acts_below_head", True):
        raise ValueError(
            f"the objective {type(objective).__name__} changes what the frozen layers see, so "
            f"their features cannot be cached: use another one, {live}"
        )
    boundary = layers.frozen_prefix(model)
    found = layers.groups(model)
    if not any(group.parameters for group in found[:boundary]):
        raise ValueError(
            "nothing before the first trained layer group is frozen, so there are no features to "
            f"cache: freeze the input side, {live}"
        )
    try:
        layers.split(model, boundary)
    except TypeError as error:
        raise TypeError(f"{error}, {live}") from None
    if source.views is None:
        raise ValueError(
            "the training data look different in every epoch, so their features cannot be cached: "
            f"give the source views=k, {live}"
        )


def cached(
    prefix: nn.Module, source: data.Source,
    compute: Callable[[nn.Module, data.Batch], Tensor | dict[str, Tensor]],
    about: str = "", seed: int = 0, augmented: bool = False, batch_size: int = 64,
) -> Features:  # fmt: skip
    """The source of the outputs of `prefix`, found on disk or computed now.

    Args:
        prefix: the frozen first part of a model, in eval mode.
        compute: calls it on a batch.
        about: what else the outputs depend on: precision, device.
        seed, augmented: store every view of each item as training with `seed` sees it, or each item
            once, as evaluation does.

    Raises:
        OSError: the disk has no room for the features or cannot be written to.
        ValueError: the state at the cut has no storable form, or stored features are damaged.

    Example:
        >>> source = tk.data.tensors(torch.randn(6, 4), [0, 1] * 3)
        >>> prefix = nn.Linear(4, 2).eval().requires_grad_(False)
        >>> features = tk.cache.cached(prefix, source, lambda part, batch: part(batch.inputs))
        >>> torch.allclose(features.fetch([1, 4], None, 0).inputs, prefix(source.inputs[[1, 4]]))
        True
    """
    views = source.views if augmented else 1
    assert views is not None  # `refuse` saw to it
    base = directory() / "features"
    scratch = _scratch(base)
    fill = (Path(scratch.name), prefix, source, compute, views, seed, augmented, batch_size)
    content = None if source.labels is None else source.fingerprint()
    if content is None:  # nobody knows what the data are: for this run only
        features = Features(fill[0], source, views, _fill(*fill))
        weakref.finalize(features, scratch.cleanup)
        return features
    with scratch, distributed.in_turn():  # the other ranks find what the first one made
        drawn = (views, seed if augmented and views > 1 else 0)
        made_by = (_FORMAT, torch.__version__, about, repr(prefix))
        key = data.content_hash(made_by, *_says(prefix, source, compute), content, drawn)
        folder = base / key[:32]
        if not folder.exists():
            _fill(*fill)
            try:
                os.rename(fill[0], folder)
            except OSError:  # another process may have been faster: its features are the same
                if not folder.exists():
                    raise
    return Features(folder, source, views, source.labels)


def _scratch(base: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        base.mkdir(parents=True, exist_ok=True)
        for old in base.glob("part-*"):  # of a process that was killed
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
        return tempfile.TemporaryDirectory(dir=base, prefix="part-", ignore_cleanup_errors=True)
    except OSError as error:
        remedy = "point TRANSFERKIT_CACHE to a folder of yours, or train with cache=False"
        raise OSError(error.errno, f"cannot keep features in {base} ({error}): {remedy}") from error


def _says(prefix: nn.Module, source: data.Source, compute: Compute) -> list[Tensor]:
    # The weights, and what the layers make of a few items: attributes and code decide that, too.
    few = np.unique(np.linspace(0, len(source) - 1, 4).astype(np.int64))
    state = compute(prefix, source.fetch(few, None, 0))
    parts = [state] if isinstance(state, Tensor) else list(state.values())
    return [*checkpoint.tensors_of(prefix).values(), *parts]


def _fill(
    folder: Path, prefix: nn.Module, source: data.Source, compute: Compute, views: int, seed: int,
    augmented: bool, batch_size: int,
) -> Tensor | None:  # fmt: skip
    # Writes one file for each tensor of the state, then about.json; returns the labels it met.
    started = time.monotonic()
    files: dict[str, Tensor] = {}
    batches = data.in_sequence(len(source), batch_size, source.lengths)
    labels = []
    for view in range(views):
        for items in batches:
            batch = source.fetch(items, view if augmented else None, seed)
            state = compute(prefix, batch)
            parts = {"state": state} if isinstance(state, Tensor) else state
            if not files:
                about = _describe(parts, isinstance(state, Tensor), source, views)
                _make_room(folder, about)
                files = {part["name"]: _map(folder, part, "w+") for part in about["parts"]}
                tokens = _token_table(source, views) if about["ragged"] else None
            rows = batch.index + view * len(source)
            if tokens is not None:
                real, rows = data.ragged(*tokens, rows.numpy())
            for name, file in files.items():
                part = parts[name].cpu()
                file[rows] = part if tokens is None else part[real]
            if view == 0 and batch.labels is not None:
                labels.append(batch.labels)
    about["seconds"] = time.monotonic() - started
    (folder / "about.json").write_text(json.dumps(about))
    if not labels:
        return None
    return torch.cat(labels)[torch.from_numpy(np.argsort(np.concatenate(batches)))]


def _describe(parts: dict[str, Tensor], single: bool, source: data.Source, views: int) -> About:
    # What the files look like, from the first batch, which holds the longest item.
    lengths = source.lengths
    longest = None if lengths is None else int(lengths.max())
    by_token = [part.dim() > 1 + single and part.shape[1] == longest for part in parts.values()]
    if any(by_token) and (single or not all(by_token)):
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise ValueError(
            f"the state at the cut is {shapes}, but a dictionary of tensors (batch, length, "
            "...), or none with a length, is expected: freeze up to the pooling stage, or train "
            "live with cache=False"
        )
    ragged = all(by_token)
    rows = views * (len(source) if lengths is None or not ragged else int(lengths.sum()))
    described = []
    for name, part in parts.items():
        shape, dtype = [rows, *part.shape[1 + ragged :]], str(part.dtype).removeprefix("torch.")
        described.append({"name": name, "dtype": dtype, "shape": shape})
    return {"single": single, "ragged": ragged, "parts": described}


def _make_room(folder: Path, about: About) -> None:
    sizes = [math.prod(p["shape"]) * getattr(torch, p["dtype"]).itemsize for p in about["parts"]]
    need, free = sum(sizes), shutil.disk_usage(folder).free
    if need > 0.9 * free:
        raise OSError(
            f"the features need {need / 2**30:.1f} GiB, but {folder.parent} has {free / 2**30:.1f} "
            "free: point TRANSFERKIT_CACHE elsewhere, freeze more, or train with cache=False"
        )
