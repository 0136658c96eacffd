"""What is kept on disk. The one idea: a run's state is small and named, so a file is readable.

Tensors go into safetensors files, everything else into JSON, which a safetensors file carries in
its header: one file, renamed into place, is one consistent state at any moment. Nothing here can
execute code when it is read.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transferkit import __version__, distributed, optim, show
from transferkit.data import content_hash

FORMAT = 2
# a file must not choose what code runs
LOADERS = ("transferkit.models.load", "transferkit.peft.rebuild", "transferkit.adapt.rebuild")
LAST = "last.safetensors"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once, under their first name.

    Example:
        >>> tensors = tk.checkpoint.tensors_of(nn.BatchNorm1d(3))
        >>> list(tensors)
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    found: dict[object, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        found.setdefault(place if tensor.numel() else name, (name, tensor))
    return dict(found.values())


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of the values of named tensors.

    Example:
        >>> one, two = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
        >>> tk.checkpoint.weights_hash(one) == tk.checkpoint.weights_hash(two)
        False
    """
    return content_hash(*(tensors[name] for name in sorted(tensors)))[:16]


def fill(model: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy stored tensors into a model of the same architecture.

    Raises:
        ValueError: names or shapes differ; the first differences are named.

    Example:
        >>> one, two = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> tk.checkpoint.fill(two, tk.checkpoint.tensors_of(one), "the first model")
        >>> torch.equal(one.weight, two.weight)
        True
    """
    own = tensors_of(model)
    check(own, tensors, origin)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Raise what `fill` raises, if the stored tensors do not fit a model's own.

    Example:
        >>> own, other = (tk.checkpoint.tensors_of(nn.Linear(4, size)) for size in (2, 3))
        >>> tk.checkpoint.check(own, other, "the file")
        Traceback (most recent call last):
            ...
        ValueError: the file does not fit the model: 2 tensors differ in name or shape, ...
    """
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if wrong:
        few = f"{len(wrong)} tensors differ in name or shape, the first {', '.join(wrong[:3])}"
        raise ValueError(f"{origin} does not fit the model: {few}; build it as it was then")


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able dictionary to one safetensors file, all or nothing.

    Raises:
        OSError: the disk is full or cannot be written to; the file of before is as it was.

    Example:
        >>> from pathlib import Path
        >>> tk.checkpoint.write(Path("ones.safetensors"), {"ones": torch.ones(2)}, {"step": 3})
        >>> Path("ones.safetensors").is_file()
        True
    """
    solid = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **about}, default=_plain)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(solid, unfinished, metadata={"json": text})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # whole before it gets its name, even if the power fails
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise _unwritable(path, error) from error


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of NumPy, say an np.int64 as the number of epochs
        return value.item()
    raise TypeError(f"{value!r} cannot be written as JSON: use plain numbers and strings")


def _unwritable(path: Path, error: Exception) -> OSError:
    text = (
        f"cannot write {path} ({error}): make room there or choose another directory; states "
        "that were stored before are whole, and fit goes on from them"
    )
    number = getattr(error, "errno", None)
    return OSError(text) if number is None else OSError(number, text)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the dictionary of a file that `write` made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no checkpoint of this library's format.

    Example:
        >>> from pathlib import Path
        >>> tk.checkpoint.write(Path("ones.safetensors"), {"ones": torch.ones(2)}, {"step": 3})
        >>> tensors, about = tk.checkpoint.read(Path("ones.safetensors"))
        >>> tensors["ones"], about["step"]
        (tensor([1., 1.]), 3)
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the folder's name")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["json"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ValueError(
            f"{path} is a safetensors file that transferkit did not write: copy its tensors into a "
            "model with load_state_dict, or give its folder to tk.models.load"
        ) from error
    except Exception as error:
        remedy = "it is damaged or of another kind; copy it again, or delete it"
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}): {remedy}") from error
    if about.get("format") != FORMAT:
        remedy = "read it with the version of transferkit that wrote it, or delete it"
        raise ValueError(f"{path} has format {about.get('format')}, not {FORMAT}: {remedy}")
    return tensors, about


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, whole, as `name of the parameter @ name of the moment`.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = tk.optim.build(tk.layers.groups(model), lr=0.1)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(tk.checkpoint.moments(optimizer))[:3]
        ['bias@exp_avg', 'bias@exp_avg_sq', 'bias@step']
    """
    states = [(n, optimizer.state.get(p, {})) for n, p in optim.named(optimizer).items()]
    return {f"{name}@{kind}": distributed.whole(value) for name, state in states
            for kind, value in state.items() if isinstance(value, Tensor)}  # fmt: skip


def fill_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give a new optimizer the tensors that `moments` returned.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = tk.optim.build(tk.layers.groups(model), lr=0.1, optimizer="sgd")
        >>> tk.checkpoint.fill_moments(optimizer, {"bias@momentum_buffer": torch.ones(2)})
        >>> optimizer.state[model.bias]["momentum_buffer"]
        tensor([1., 1.])
    """
    parameters = optim.named(optimizer)
    for key, value in tensors.items():
        name, kind = key.rsplit("@", 1)
        # the step count of the fused kernels, too, lives where the parameter does
        optimizer.state[parameters[name]][kind] = distributed.divided_like(value, parameters[name])


def save_run(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None,
    about: Mapping[str, Any], best: Mapping[str, Tensor], average: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Store a run's state so that it can go on from here. Of several ranks the first one writes.

    Args:
        about: counters, history, and what identifies the run. `about["best_file"]` names the file
            of the best weights; older ones are removed only when the new state stands.
        best: these weights, written first; empty if the file stands already.
        average: the moving averages of the parameters, empty if there are none.

    Example:
        >>> from pathlib import Path
        >>> about = {"identity": {"seed": 0}, "labels": None}
        >>> tk.checkpoint.save_run(Path("run"), nn.Linear(4, 2), None, about, best={}, average={})
        >>> [path.name for path in Path("run").iterdir()]
        ['last.safetensors']
    """
    best_file = about.get("best_file")
    tensors = {f"model/{name}": tensor for name, tensor in tensors_of(model).items()}
    if optimizer is not None:
        tensors |= {f"moments/{name}": tensor for name, tensor in moments(optimizer).items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.items()}
    if distributed.rank() == 0:
        if best:
            write(directory / about["best_file"], best, {"labels": about["labels"]})
        write(directory / LAST, tensors, about)
        for path in directory.glob("best-*.safetensors"):
            if path.name != best_file:
                path.unlink(missing_ok=True)
    distributed.wait()  # whoever reads next finds it


def load_run(directory: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Weights, moments, averages, best weights and `about` of `save_run`; None if nothing is there.

    Raises:
        ValueError: the directory holds another run; what differs is named.
        OSError: the directory cannot be written to: better known now than after the first epoch.

    Example:
        >>> from pathlib import Path
        >>> about = {"identity": {"seed": 0}, "labels": None}
        >>> tk.checkpoint.save_run(Path("run"), nn.Linear(4, 2), None, about, best={}, average={})
        >>> weights, *others, told = tk.checkpoint.load_run(Path("run"), {"seed": 0})
        >>> sorted(weights), told["identity"]
        (['bias', 'weight'], {'seed': 0})
        >>> tk.checkpoint.load_run(Path("run"), {"seed": 1})
        Traceback (most recent call last):
            ...
        ValueError: run holds another run (seed: 0 → 1): ...
    """
    if not (directory / LAST).exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise _unwritable(directory, error) from error
        return None
    tensors, about = read(directory / LAST)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "moments": {}, "average": {}}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parts[kind][name] = tensor
    stored, wanted = about["identity"], json.loads(json.dumps(identity, default=_plain))
    if wanted.get("weights") == weights_hash(parts["model"]):
        wanted["weights"] = stored["weights"]  # the very model that was interrupted
    changes = [f"{k}: {stored.get(k)!r} → {v!r}" for k, v in wanted.items() if stored.get(k) != v]
    if changes:
        raise ValueError(
            f"{directory} holds another run ({'; '.join(changes)}): go on with the model, data and "
            "settings of then, or choose another directory, or delete it to start again"
        )
    best = read(directory / about["best_file"])[0] if "best_file" in about else {}
    return *parts.values(), best, about


def save_model(
    directory: str | Path, model: nn.Module, result: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write weights, a description from which `load` rebuilds the model, and a model card.

    Args:
        result: what to say of the training: the best epoch, the plan, the settings, the data.
        notes: what a person adds, by the heading of the card it belongs under.

    Example:
        >>> folder = tk.checkpoint.save_model("my-model", nn.Linear(4, 2), {})
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'model.json', 'model.safetensors']
    """
    directory = Path(directory)
    about = {
        "labels": getattr(model, "labels", None),
        "name": getattr(model, "name", "") or type(model).__name__,
        "recipe": getattr(model, "recipe", None),
        "weights_hash": getattr(model, "weights_hash", ""),
        "result": result,
        "notes": dict(notes or {}),
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transferkit": __version__,
        },
    }
    write(directory / "model.safetensors", tensors_of(model), about)
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (directory / "model.json").write_text(text, encoding="utf-8")
    size = sum(parameter.numel() for parameter in model.parameters())
    (directory / "README.md").write_text(show.card(about, size), encoding="utf-8")
    return directory


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that `Run.save` stored, in eval mode.

    Args:
        model: the same architecture, for a model that `transferkit` did not build itself.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: the file is damaged, or the model does not fit, or is needed and not given.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> run = tk.fit(nn.Linear(4, 2), tk.classification(), data, plan=tk.finetune(1))
        >>> folder = run.save("my-model")
        >>> model = tk.load("my-model", nn.Linear(4, 2))
        >>> torch.equal(model.weight, run.model.weight)
        True
    """
    path = Path(directory) / "model.safetensors"
    tensors, about = read(path)
    if model is None:
        model = build(about["recipe"], path)
    fill(model, tensors, path)
    if about["labels"] is not None:
        model.labels = about["labels"]
    return model.eval()


def build(recipe: Mapping[str, Any] | None, origin: str | Path) -> nn.Module:
    """The architecture that a recipe describes, with fresh weights.

    Raises:
        ValueError: there is no recipe, or its loader is not one of `LOADERS`.

    Example:
        >>> tk.checkpoint.build({"loader": "os.system", "arguments": {}}, "the file")
        Traceback (most recent call last):
            ...
        ValueError: the file does not say how to build its model: ...
    """
    recipe = recipe or {}
    loader = recipe.get("loader", "")
    if loader not in LOADERS:
        remedy = "pass the same architecture as tk.load(directory, model=...)"
        raise ValueError(f"{origin} does not say how to build its model: {remedy}")
    arguments = dict(recipe["arguments"])
    arguments |= {"pretrained": False} if "pretrained" in arguments else {}  # weights: the file's
    module, _, name = loader.rpartition(".")
    return cast(nn.Module, getattr(importlib.import_module(module), name)(**arguments))
