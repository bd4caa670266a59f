"""Batches of any type keep their type when they are moved, pinned, converted, sliced and joined."""

from __future__ import annotations

from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from launcher.engine.batches import channels_last, cut, join, leaves, move, pin, rows, tree_map
from launcher.errors import DataError

META = torch.device("meta")


class Encoding(UserDict[str, Any]):
    """Like the result of a tokenizer: its items are also attributes, and it has further attributes."""

    def __init__(self, data: dict[str, Any], encodings: Any) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Pair(NamedTuple):
    x: Tensor
    y: Any


class Titled(namedtuple("Base", "x y")):
    """A named tuple with another constructor and a further attribute."""

    def __new__(cls, title: str, x: Any, y: Any) -> Titled:
        titled = super().__new__(cls, x, y)
        vars(titled)["title"] = title
        return titled


class Items(list[Any]):
    title = ""


@dataclass
class Graph:
    x: Tensor
    edges: Any = None
    size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.size += 1


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    name: str


class Moves:
    """An object with a method `to`, like graphs and images of other libraries."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Moves:
        return Moves(self.x.to(device))


class MovesInPlace(Moves):
    def to(self, device: Any) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


class Opaque:
    def __init__(self) -> None:
        self.x = torch.ones(2)


class Labelled(Tensor):
    pass


def ones() -> Tensor:
    return torch.ones(2, 3)


def batches() -> Iterator[Any]:
    yield ones()
    yield [ones(), (ones(), {"deep": [ones(), None, "text", b"bytes", 3, 2.5]})]
    yield OrderedDict(b=ones(), a=ones())
    filled: Any = defaultdict(list, x=ones())
    yield filled
    yield Encoding({"input_ids": ones(), "text": ["a", "b"]}, encodings=["an encoding"])
    yield UserList([ones(), "text"])
    yield deque([ones()], maxlen=4)
    yield MappingProxyType({"x": ones()})
    yield Pair(ones(), [ones(), None])
    named = Titled("a title", ones(), 3)
    yield named
    items = Items([ones()])
    items.title = "a title"
    yield items
    yield Graph(ones(), {"i": ones()})
    yield Frozen(ones(), "name")
    yield SimpleNamespace(x=ones(), name="name")
    yield torch.max(ones(), 1)
    yield pack_sequence([torch.ones(3), torch.ones(2)])
    yield {"graph": Moves(ones()), "other": Graph(ones())}
    yield MovesInPlace(ones())
    yield {"x": ones().as_subclass(Labelled), "sparse": ones().to_sparse(), "array": np.ones(3)}


def form(value: Any, device: str) -> Any:
    """Return what a move must preserve: types, attributes and other values. Asserts that tensors are on `device`."""
    if isinstance(value, PackedSequence):
        assert value.data.device.type == device
        return type(value), value.batch_sizes.tolist()
    if isinstance(value, Tensor):
        assert value.device.type == device
        return type(value), tuple(value.shape), value.layout
    if isinstance(value, Mapping):
        own = vars(value) if isinstance(value, Encoding) else {}
        own = {name: each for name, each in own.items() if name != "data"}
        return type(value), {key: form(each, device) for key, each in value.items()}, own
    if isinstance(value, (list, tuple, UserList, deque)):
        own = {name: each for name, each in getattr(value, "__dict__", {}).items() if name != "data"}
        return type(value), [form(each, device) for each in value], own
    if isinstance(value, Frozen):
        return type(value), form(value.x, device), value.name
    if isinstance(value, (Graph, SimpleNamespace, Moves)):
        return type(value), {name: form(each, device) for name, each in vars(value).items()}
    return type(value), str(value)


@pytest.mark.parametrize("number", range(len(list(batches()))))
def test_a_batch_keeps_its_type_when_it_is_moved_to_a_device(number: int) -> None:
    batch = list(batches())[number]
    before = form(batch, "cpu")
    moved = move(batch, META)
    assert form(moved, "meta") == before
    if isinstance(batch, defaultdict):
        assert moved.default_factory is list
    if isinstance(batch, Encoding):
        assert moved.input_ids.device.type == "meta"


@pytest.mark.parametrize("number", range(len(list(batches()))))
def test_an_unchanged_batch_is_the_same_object(number: int) -> None:
    batch = list(batches())[number]
    assert channels_last(batch) is batch
    assert tree_map(lambda tensor: tensor, batch) is batch


def test_pinning_calls_pin_memory_of_objects_and_pins_every_plain_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a GPU: `pin_memory` of tensors is patched."""
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)

    class PinsItself:
        pinned = False

        def pin_memory(self) -> None:
            self.pinned = True

    special = PinsItself()
    sparse, labelled = ones().to_sparse(), ones().as_subclass(Labelled)
    batch = pin([Encoding({"x": ones()}, None), Frozen(ones(), "a"), special, sparse, labelled, "text", None])
    assert isinstance(batch[0], Encoding)
    assert [leaf.max() for leaf in leaves([batch[0], batch[1]])] == [2, 2]
    assert special.pinned
    assert batch[3] is sparse
    assert batch[4] is labelled


def test_only_images_are_converted_to_channels_last() -> None:
    picture = torch.zeros(2, 3, 4, 4)
    batch = channels_last(Encoding({"x": picture, "label": picture.long(), "sparse": picture.to_sparse()}, None))
    assert batch.x.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.is_contiguous()
    assert type(channels_last(picture.as_subclass(Labelled))) is Labelled


def test_a_mapping_that_cannot_be_rebuilt_is_reported_by_name() -> None:
    class Odd(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return ones()

        def __iter__(self) -> Iterator[str]:
            return iter("x")

        def __len__(self) -> int:
            return 1

    assert isinstance(channels_last(Odd()), Odd)
    with pytest.raises(DataError, match="Odd"):
        move(Odd(), META)
    assert isinstance(move(Opaque(), META), Opaque)  # without a method `to`, it is passed to the model unchanged


def test_slices_and_joined_batches_keep_their_type() -> None:
    def piece(*numbers: int) -> Any:
        texts = [f"text {number}" for number in numbers]
        return Encoding({"x": torch.tensor(numbers), "n": np.array(numbers), "text": texts, "lang": "en"}, None)

    whole = join([piece(0, 1, 2), piece(3, 4)])
    assert rows(whole) == 5
    some = cut(whole, 1, 4)
    assert isinstance(some, Encoding)
    assert (some.x.tolist(), some.n.tolist(), some.lang) == ([1, 2, 3], [1, 2, 3], "en")
    assert some.text == ["text 1", "text 2", "text 3"]
    assert rows(cut(whole, 4)) == 1
