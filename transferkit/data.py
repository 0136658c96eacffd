"""Which items a step sees, and as what. The one idea: order and augmentation are pure functions.

The order of an epoch follows from (seed, epoch), the augmentation of an item from
(seed, epoch, index). Nothing is kept in a generator's state, so a run that resumes in mid-epoch
draws the very batches it would have drawn, without reading those before, with any number of worker
processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

Augmentation = Callable[[Tensor, torch.Generator], Tensor]

_POOL = 64  # batches that are sorted by length together


@dataclass(slots=True)
class Batch:
    """Some items of a source, ready for the model.

    Attributes:
        inputs: tensor `(batch, ...)`, or a dictionary of such tensors.
        labels: tensor `(batch, ...)`, or None where the items have none.
        index: the items' numbers in their source, int64 `(batch,)`.

    Example:
        >>> source = tk.data.tensors(torch.randn(5, 4), [0, 1, 0, 1, 0])
        >>> batch = source.fetch([3, 1], None, 0)
        >>> len(batch), batch.labels, batch.index
        (2, tensor([1, 1]), tensor([3, 1]))
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs, labels = self.inputs, self.labels
        if isinstance(inputs, Tensor):
            inputs = change(inputs)
        else:
            inputs = {name: change(part) for name, part in inputs.items()}
        return Batch(inputs, None if labels is None else change(labels), self.index)

    def item(self, at: int) -> Batch:
        """One item of the batch, as a batch of its own."""
        part = self._map(lambda tensor: tensor[at : at + 1])
        part.index = self.index[at : at + 1]
        return part

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. The index stays where it is: only the host asks for it."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, from where a copy to the device waits for nothing.

        What lies on a device already stays there.
        """
        return self._map(lambda part: part.pin_memory() if part.device.type == "cpu" else part)


class Source(Protocol):
    """What the engine asks of data: many items at once, as a pure function of the arguments.

    Attributes:
        labels: the labels of all items as one tensor, or None if they are only known when fetched.
        lengths: tokens of each item, int64 `(n,)`, or None: batches then mix all lengths.
        rounded: optional, needed by compiled models if there are lengths: a method that returns the
            same items as batches padded to a few lengths, such as those of `few_lengths`.
        views: in how many ways an item can look: 1 without augmentation, k where epoch e shows view
            e mod k, None where every epoch shows a new one.

    Example:
        >>> class Numbers:
        ...     labels = lengths = None
        ...     views = 1
        ...     def __len__(self):
        ...         return 3
        ...     def fetch(self, indices, epoch, seed):
        ...         index = torch.as_tensor(indices)
        ...         return tk.data.Batch(index.float().unsqueeze(1), None, index)
        ...     def fingerprint(self):
        ...         return None
        >>> tk.predict(nn.Identity(), Numbers()).logits.tolist()
        [[0.0], [1.0], [2.0]]
    """

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def lengths(self) -> np.ndarray | None: ...

    @property
    def views(self) -> int | None: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        """The items `indices` as they look in `epoch`; `epoch=None` means unaugmented."""

    def fingerprint(self) -> str | None:
        """A hash of the inputs that `fetch` returns, or None if it cannot be known."""


def mix(*numbers: int) -> int:
    """Hash whole numbers into one seed of 63 bits (the finaliser of splitmix64, Steele 2014).

    Example:
        >>> tk.data.mix(0, 1) == tk.data.mix(0, 1), tk.data.mix(0, 1) == tk.data.mix(1, 0)
        (True, False)
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def randomness(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator for the augmentation of one item in one epoch.

    Example:
        >>> one, two = (tk.data.randomness(seed=0, epoch=3, index=17) for _ in range(2))
        >>> torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=two))
        True
    """
    return torch.Generator().manual_seed(mix(seed, epoch, index))


def order(
    count: int, batch_size: int, seed: int, epoch: int, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """The batches of one epoch: every item once, shuffled, the last batch perhaps smaller.

    With `lengths`, items of similar length share a batch: the shuffled items are cut into pools of
    64 batches, each pool is sorted by length and cut into batches, and the batches are shuffled, so
    that little is padded and the order is still random.

    The result is one int64 array of item numbers a batch.

    Example:
        >>> batches = tk.data.order(10, batch_size=4, seed=0, epoch=0)
        >>> [len(items) for items in batches], sorted(np.concatenate(batches).tolist())
        ([4, 4, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    random = np.random.default_rng(mix(seed, epoch, count))
    items = random.permutation(count)
    cuts = [*range(0, count, batch_size), count]
    if batch_size > 2 and len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1  # two items, for BatchNorm cannot train on one
    if lengths is None:
        return [items[start:end] for start, end in pairwise(cuts)]
    for first in range(0, len(cuts) - 1, _POOL):
        pool = items[cuts[first] : cuts[min(first + _POOL, len(cuts) - 1)]]
        pool[:] = pool[np.argsort(lengths[pool], kind="stable")]
    batches = [items[start:end] for start, end in pairwise(cuts)]
    return [batches[at] for at in random.permutation(len(batches))]


def in_sequence(count: int, batch_size: int, lengths: np.ndarray | None) -> list[np.ndarray]:
    """Batches for evaluation: every item once; the longest first, where lengths are known.

    Example:
        >>> [items.tolist() for items in tk.data.in_sequence(5, 2, np.array([3, 9, 4, 1, 5]))]
        [[1, 4], [2, 0], [3]]
    """
    items = np.arange(count) if lengths is None else np.argsort(-lengths, kind="stable")
    return [items[at : at + batch_size] for at in range(0, count, batch_size)]


class _Fetches(Dataset[Batch]):
    # One item of this data set is one batch, so that a worker fetches a whole batch at once.
    def __init__(self, source: Source, batches: Sequence[np.ndarray], epoch: int | None, seed: int):
        self.source, self.batches, self.epoch, self.seed = source, batches, epoch, seed

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: int) -> Batch:
        return self.source.fetch(self.batches[at], self.epoch, self.seed)


def stream(
    source: Source, batches: Sequence[np.ndarray], epoch: int | None, seed: int,
    workers: int = 0, pin: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """The given batches of a source, one after the other, fetched here or by worker processes.

    With `pin` they are in pinned memory, from where a copy to a GPU waits for nothing.

    Example:
        >>> source = tk.data.tensors(torch.arange(6.0))
        >>> [batch.inputs.tolist() for batch in tk.data.stream(source, [[0, 1], [4, 5]], None, 0)]
        [[0.0, 1.0], [4.0, 5.0]]
    """
    fetches = _Fetches(source, batches, epoch, seed)
    if not workers:
        fetched = map(fetches.__getitem__, range(len(batches)))
        return map(Batch.pin_memory, fetched) if pin else fetched
    # With a generator of its own: the loader's draw of a base seed must not move the run's.
    own = torch.Generator()
    return iter(DataLoader(fetches, None, num_workers=workers, pin_memory=pin, generator=own))


def content_hash(*parts: Any) -> str:
    """SHA-256 over tensors (type, shape, values) and the `repr` of anything else.

    Example:
        >>> flat, column = torch.ones(2), torch.ones(2, 1)
        >>> tk.data.content_hash(flat) == tk.data.content_hash(column)
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(part.numpy().data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _labels_for(count: int, labels: Any) -> Tensor | None:
    if count < 1:
        raise ValueError("the data are empty, but at least one item is expected: check the split")
    found = None if labels is None else _tensor(labels)
    if found is not None and len(found) != count:
        raise ValueError(f"there are {count} items but {len(found)} labels: pass one for each")
    return found


def _tensor(values: Any) -> Tensor:
    # Arrays and lists come as numpy and Python make them; a tensor is meant to be what it is.
    tensor = values if isinstance(values, Tensor) else _of_numbers(values)
    if not tensor.dim():
        raise ValueError("one number was passed, but one entry an item is expected: pass a list")
    return tensor


def _of_numbers(values: Any) -> Tensor:
    try:
        array = np.asarray(values)
        # torch takes neither negative strides nor a foreign order of bytes
        array = np.require(array, array.dtype.newbyteorder("="), "C")
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError) as error:
        what = f"a {type(values).__name__} is no table of numbers ({error}), but numbers in rows"
        raise TypeError(
            f"{what} of one length are expected: number the classes of labels, make texts a "
            "source with tk.data.texts, dictionaries one with tk.data.examples"
        ) from error
    if array.dtype.kind in "iu":
        return tensor.long()
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def few_lengths(lengths: np.ndarray) -> np.ndarray:
    """At most eight lengths that batches are padded to, where each one costs a compilation.

    They are the eighths of all lengths, so that little is padded, in multiples of 8, which matrix
    units like, and end with the longest, beyond which a model may know no positions.

    Example:
        >>> tk.data.few_lengths(np.arange(1, 101)).tolist()
        [16, 32, 40, 56, 64, 80, 88, 100]
    """
    eighths = np.quantile(lengths, np.arange(1, 9) / 8, method="higher")
    return np.unique(np.minimum(-(-eighths // 8) * 8, lengths.max())).astype(np.int64)


def ragged(
    lengths: np.ndarray, ends: np.ndarray, rows: np.ndarray, sizes: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Where the tokens of some rows are, padded to a batch and in one long column of all tokens.

    Args:
        lengths, ends: of every row, in tokens; `ends` are the lengths summed up to and with it.
        sizes: lengths that a batch may have, ascending; any if None.

    Returns:
        bool `(batch, length)`, True for a token; int64, the places of these in the column.

    Example:
        >>> lengths = np.array([2, 1, 3])
        >>> real, place = tk.data.ragged(lengths, lengths.cumsum(), np.array([0, 2]))
        >>> real.tolist(), place.tolist()
        ([[True, True, False], [True, True, True]], [0, 1, 3, 4, 5])
    """
    length = lengths[rows][:, None]
    longest = length.max()
    place = np.arange(longest if sizes is None else sizes[np.searchsorted(sizes, longest)])
    real = place < length
    return torch.from_numpy(real), torch.from_numpy((ends[rows][:, None] - length + place)[real])


class Tensors:
    """A source of inputs `(n, ...)` and labels `(n, ...)`, tensors or arrays, held in memory.

    Of arrays, float64 becomes float32, and small whole numbers become int64; tensors stay.

    Raises:
        ValueError: there is no item, or the labels are not as many as the inputs.
        TypeError: the inputs or labels are not numbers.

    Example:
        >>> source = tk.data.tensors(np.eye(3), [0, 1, 1])
        >>> batch = source.fetch([2], None, 0)
        >>> batch.inputs, batch.labels
        (tensor([[0., 0., 1.]]), tensor([1]))
    """

    lengths = None
    views = 1

    def __init__(self, inputs: Any, labels: Any = None):
        self.inputs = _tensor(inputs)
        self.labels = _labels_for(len(self.inputs), labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        index = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[index]
        return Batch(self.inputs[index], labels, index)

    def fingerprint(self) -> str:
        return content_hash(self.inputs)


class Texts:
    """A source of texts, tokenised once, padded to the longest of each batch.

    Its inputs are `{"input_ids": int64 (batch, length), "attention_mask": int64 (batch, length)}`.

    Args:
        texts: n strings.
        labels: n labels, or None.
        tokenizer: one of transformers, or any callable that takes the texts with `truncation=True,
            max_length=...`, returns a mapping with a list of "input_ids" for each, and may have
            `pad_token_id` (else 0).
        max_length: tokens that are kept of each text, special ones included.

    Raises:
        ValueError: there is no text, one has no tokens, `max_length` is below 1, or the labels are
            not as many.
        TypeError: the texts are one string, or one of them is none.

    Example:
        >>> def words(texts, truncation, max_length):
        ...     return {"input_ids": [[len(word) for word in text.split()] for text in texts]}
        >>> source = tk.data.texts(["a fine film", "no"], [1, 0], words, max_length=8)
        >>> source.fetch([0, 1], None, 0).inputs["input_ids"]
        tensor([[1, 4, 4],
                [2, 0, 0]])
    """

    views = 1
    sizes: np.ndarray | None = None  # lengths of batches, if they are few

    def __init__(self, texts: Sequence[str], labels: Any, tokenizer: Any, max_length: int):
        if isinstance(texts, str):
            raise TypeError("the texts are one string, but a list of them is expected: pass [text]")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: give at least 1, such as 128")
        self.labels = _labels_for(len(texts), labels)
        strange = [at for at, text in enumerate(texts) if text is None or isinstance(text, float)]
        if strange:  # what is missing in a table comes as None or NaN
            what = f"text {strange[0]} is {texts[strange[0]]!r}, but a string is expected"
            raise TypeError(f"{what}: drop the items without a text, {len(strange)} in all")
        rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        self.lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if not self.lengths.all():
            remedy = "drop empty texts, or let the tokenizer add its special tokens"
            raise ValueError(f"text {self.lengths.argmin()} has no tokens: {remedy}")
        self._ends = np.cumsum(self.lengths)
        self.padding = getattr(tokenizer, "pad_token_id", None) or 0
        self.tokens = torch.tensor([token for row in rows for token in row])

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        index = torch.as_tensor(indices)
        real, place = ragged(self.lengths, self._ends, index.numpy(), self.sizes)
        ids = torch.full(real.shape, self.padding)
        ids[real] = self.tokens[place]
        labels = None if self.labels is None else self.labels[index]
        return Batch({"input_ids": ids, "attention_mask": real.long()}, labels, index)

    def fingerprint(self) -> str:
        return content_hash(self.tokens, self.lengths.tolist(), self.padding)

    def rounded(self) -> Texts:
        """The same texts in batches that are padded to a few lengths, see `few_lengths`."""
        twin = copy(self)
        twin.sizes = few_lengths(self.lengths)
        return twin


class Images:
    """A source of images, resized once, normalised when fetched: float32 `(batch, 3, size, size)`.

    Args:
        array: uint8, `(n, height, width)` grey or `(n, height, width, 3)`.
        labels: n labels, or None.
        size: height and width that the model sees, in pixels (bilinear, antialiased).
        mean, std: of the three channels, for values in [0, 1].
        augment: takes one image in [0, 1] as `(1, channels, size, size)`, one channel if grey, and
            a generator from which it must draw all its randomness; returns the same shape.
        views: with k, epoch e shows view e mod k of each image, so that features can be cached;
            None shows a new view in every epoch.

    Raises:
        ValueError: there is no image, the array is not uint8 of such a shape, the labels are not as
            many, or another argument is out of its range.

    Example:
        >>> pixels, half = np.zeros((4, 32, 32, 3), np.uint8), [0.5] * 3
        >>> source = tk.data.images(pixels, [0, 1, 0, 1], size=16, mean=half, std=half)
        >>> batch = source.fetch([0, 3], None, 0)
        >>> batch.inputs.shape, batch.inputs.unique()
        (torch.Size([2, 3, 16, 16]), tensor([-1.]))
    """

    lengths = None

    def __init__(
        self, array: np.ndarray, labels: Any, size: int, mean: Sequence[float],
        std: Sequence[float], augment: Augmentation | None = None, views: int | None = None,
    ):  # fmt: skip
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim < 3 or array.shape[3:] not in ((), (3,)):
            what = f"the images are {array.dtype} of shape {array.shape}, but uint8 (n, height, "
            raise ValueError(f"{what}width) or (n, height, width, 3) is expected: convert them")
        if size < 1 or (views is not None and views < 1):
            raise ValueError(f"size is {size} and views {views}: give at least 1, such as size=224")
        if len(mean) != len(std) or len(std) not in (1, 3) or not all(part > 0 for part in std):
            raise ValueError(
                f"mean is {tuple(mean)} and std {tuple(std)}, but one number a channel is "
                "expected, std above 0: take those the model was pre-trained with"
            )
        self.labels = _labels_for(len(array), labels)
        pixels = torch.from_numpy(np.ascontiguousarray(array))
        pixels = pixels.unsqueeze(1) if array.ndim == 3 else pixels.permute(0, 3, 1, 2)
        if pixels.shape[2:] != (size, size):
            pixels = torch.cat([_resize(chunk, size) for chunk in pixels.split(256)])
        self.pixels = pixels.contiguous()
        self.mean, self.std = (torch.tensor(part).float().view(-1, 1, 1) for part in (mean, std))
        self.augment, self.views = augment, views if augment else 1

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        index = torch.as_tensor(indices)
        images = self.pixels[index].float().div_(255)
        if self.augment is not None and epoch is not None:
            view = epoch if self.views is None else epoch % self.views
            each = zip(images.split(1), index.tolist(), strict=True)
            images = torch.cat([self.augment(one, randomness(seed, view, i)) for one, i in each])
            if images.shape != (len(index), *self.pixels.shape[1:]):
                what = f"the augmentation made {tuple(images.shape)} of {len(index)} images of "
                shape = tuple(self.pixels.shape[1:])
                raise ValueError(f"{what}{shape}: let it return the shape that it is given")
        # A grey image becomes three equal channels here, so that memory holds only one. Channels
        # last: convolutions of a processor run faster in this layout.
        images = images.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        return Batch(images, None if self.labels is None else self.labels[index], index)

    def fingerprint(self) -> str | None:
        # The text of an augmentation does not say what it closes over, so none is claimed.
        return None if self.augment else content_hash(self.pixels, self.mean, self.std)

    def augmented(self, augment: Augmentation, views: int | None = None) -> Images:
        """The same images with an augmentation."""
        twin = copy(self)
        twin.augment, twin.views = augment, views
        return twin


def _resize(pixels: Tensor, size: int) -> Tensor:
    resized = F.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class Examples:
    """A source around a torch data set whose items are `(input, label)`, dictionaries or tensors.

    Its random transforms must draw from torch's default generator, which is seeded for each item.

    Args:
        dataset: anything with `__len__` and `__getitem__`.
        views: 1 promises that an item always looks the same, so that its features can be cached.

    Raises:
        ValueError: the data set is empty.
        TypeError: when fetched, an item is none of these.

    Example:
        >>> items = [(torch.tensor([float(at)]), at % 2) for at in range(4)]
        >>> batch = tk.data.examples(items).fetch([1, 2], None, 0)
        >>> batch.inputs.tolist(), batch.labels.tolist()
        ([[1.0], [2.0]], [1, 0])
    """

    labels = lengths = None

    def __init__(self, dataset: Any, views: int | None = None):
        _labels_for(len(dataset), None)
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        epoch = 0 if epoch is None else epoch
        view = epoch if self.views is None else epoch % self.views
        index, rows, random = torch.as_tensor(indices), [], torch.get_rng_state()
        for item in index.tolist():
            # the default generator alone: `torch.manual_seed` visits all devices, 70 times slower
            torch.default_generator.manual_seed(mix(seed, view, item))
            rows.append(self.dataset[item])
        torch.set_rng_state(random)
        inputs, labels = default_collate(rows), None
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)
            labels = inputs.pop("labels", inputs.pop("label", None))
        elif not isinstance(inputs, Tensor):
            if len(inputs) != 2:
                expected = "(input, label), a dictionary with 'labels', or a tensor"
                raise TypeError(f"an item has {len(inputs)} parts: make it {expected}")
            inputs, labels = inputs
        return Batch(inputs, labels, index)

    def fingerprint(self) -> None:
        return None


tensors, texts, images, examples = Tensors, Texts, Images, Examples


def as_source(data: Any, model: nn.Module | None = None) -> Source:
    """Make a source of a source, a pair `(inputs, labels)`, inputs, a torch data set, or a split.

    Inputs alone are a tensor or an array. A split is prepared by the model, if that has a method
    `prepare(split)`.

    Raises:
        TypeError: the data are none of these, or the model cannot prepare a split.
        ValueError: the data are empty.

    Example:
        >>> source = tk.data.as_source((torch.randn(6, 4), [0, 1, 0, 1, 0, 1]))
        >>> type(source).__name__, len(source)
        ('Tensors', 6)
    """
    if hasattr(data, "fetch"):
        _labels_for(len(data), None)
        return cast(Source, data)
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if pair and (isinstance(data, tuple) or all(hasattr(part, "shape") for part in data)):
        return Tensors(*data)
    if isinstance(data, (Tensor, np.ndarray)):
        return Tensors(data)
    if hasattr(data, "kind") and hasattr(data, "inputs"):  # a split of transferkit.datasets
        prepare = getattr(model, "prepare", None)
        if prepare is None:
            raise TypeError(
                f"the model {type(model).__name__} cannot prepare a split: use a model of "
                "tk.models.load, or make a source with tk.data.texts, images or tensors"
            )
        prepared = prepare(data)
        prepared.name = getattr(data, "name", "")  # for the model card
        return cast(Source, prepared)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        return Examples(data)
    raise TypeError(
        f"the data are a {type(data).__name__}, but a split, a source, a pair (inputs, labels) or "
        "a torch data set is expected: see transferkit.data"
    )
