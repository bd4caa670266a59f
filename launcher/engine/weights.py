"""Loads weights from files into a model, and matches names with different prefixes and tied weights.

Files may come from DDP (`module.`), `torch.compile` (`_orig_mod.`), a model that contains this model (`model.net.`), or
a part of this model. Names are compared unchanged, without the usual prefixes, and with one prefix removed from or
added to all of them; the best match is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from launcher.engine.checkpoint.uploads import downloaded
from launcher.errors import CheckpointError
from launcher.runs.storage import is_uri

_USUAL = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
_NAMED = 5  # names of each kind in a message


@dataclass(frozen=True)
class Fit:
    """A match between the names of a file and those of a model.

    Attributes:
        names: {name in the model: name in the file} of the tensors with the same shape.
        missing, unexpected, misshapen: the names that do not match. A tied weight may have any of its names.
        renamed: description of the change of the file's names, for messages; empty for unchanged names.
    """

    names: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    renamed: str = ""

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def describe(self) -> str:
        """Return the names that do not match, for a message."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("another shape", self.misshapen))
        return "; ".join(
            f"{kind}: {', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"
            for kind, names in kinds
            if names
        )


def on_this_machine(place: str | None) -> str | None:
    """Return the local path of weights; download them from an object store first if `place` is a URI."""
    return str(downloaded(place)) if place is not None and is_uri(place) else place


def load_weights_into(model: nn.Module, weights: Mapping[str, Tensor], source: str, strict: bool = True) -> str:
    """Load weights into the model. Return remarks about renamed, missing and unused names, or an empty text.

    Raises:
        CheckpointError: see `check_weights`.
    """
    fit = check_weights(model, weights, source, strict)
    own = model.state_dict()
    chosen = {name: weights[stored] for name, stored in fit.names.items()}
    if any(hasattr(value, "device_mesh") for value in own.values()):
        from launcher.engine.checkpoint.training import sharded_like

        chosen = {name: sharded_like(own.get(name), value) for name, value in chosen.items()}
    model.load_state_dict(chosen, strict=False)
    left = [f"{len(names)} {kind}" for kind, names in (("missing", fit.missing), ("unused", fit.unexpected)) if names]
    key = getattr(weights, "key", None)
    under = [f'found under "{key}"'] if key else []
    return ", ".join([*under, *([fit.renamed] if fit.renamed else []), *left])


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str, strict: bool = True) -> Fit:
    """Return the best match between weights and the model, by names and shapes only.

    Raises:
        CheckpointError: nothing matches, shapes differ, or names differ and `strict`.
    """
    found = {name: tuple(value.shape) for name, value in weights.items()}
    fits = []
    for fit in _fits(model, found):
        if fit.is_whole:
            return fit
        fits.append(fit)
    best = max(fits, key=_quality)
    what = f"The weights of {source} do not fit the model ({best.describe()}"
    what += f"; compared {best.renamed})" if best.renamed else ")"
    alike = [fit.renamed for fit in fits if _quality(fit) == _quality(best) and fit.renamed]
    if best.renamed and len(alike) > 1 and not strict:
        raise CheckpointError(f"{what}, and match equally well {' and '.join(alike)}. Save only the intended part.")
    if best.misshapen or strict or not best.names:
        lenient = best.names and not best.misshapen
        raise CheckpointError(
            f"{what}. Choose the model that they were saved from"
            + (", or load what matches with checkpoint.load_strict=false." if lenient else ", or other weights.")
        )
    return best


def _quality(fit: Fit) -> tuple[int, int]:
    return len(fit.names), len(fit.misshapen)


def _fits(model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> Iterator[Fit]:
    """Yield the matches between the names of a file and the model, the simplest change of names first."""
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    own = {name: tuple(value.shape) for name, value in tensors.items()}
    tied: dict[int, list[str]] = {}
    for name, value in tensors.items():
        tied.setdefault(id(value), []).append(name)
    also = {name: tied[id(value)] for name, value in tensors.items()}

    plain = {name: name for name in found}  # name in the model -> name in the file
    usual = {_USUAL.sub("", name): name for name in found}
    starts = [(plain, "")]
    if len(usual) == len(found) and usual.keys() != plain.keys():
        prefixes = sorted({prefix for name in found for prefix in _USUAL.findall(name)})
        starts.append((usual, f"without the prefix {_quoted(prefixes)}"))
    for names, renamed in starts:
        yield _fit(own, also, found, names, renamed)
    for names, renamed in starts:
        shapes = {name: found[stored] for name, stored in names.items()}
        for prefix in _prefixes(shapes, own):
            off = {(name.removeprefix(prefix) if name.startswith(prefix) else name): at for name, at in names.items()}
            if len(off) == len(names):
                yield _fit(own, also, found, off, f"{renamed or 'without the prefix'} {_quoted([prefix])}")
        for prefix in _prefixes(own, shapes):
            before = {prefix + name: stored for name, stored in names.items()}
            yield _fit(own, also, found, before, f"{renamed}{', ' * bool(renamed)}with the prefix {_quoted([prefix])}")


def _prefixes(long: Mapping[str, tuple[int, ...]], short: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the prefixes by which names of `long` differ from names of `short`, the most frequent first."""
    counted: Counter[str] = Counter()
    for name, shape in long.items():
        for at in (match.end() for match in re.finditer(r"\.", name)):
            if short.get(name[at:]) == shape:
                counted[name[:at]] += 1
    return [prefix for prefix, _ in counted.most_common(2)]


def _fit(
    own: Mapping[str, tuple[int, ...]],
    also: Mapping[str, list[str]],
    found: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    renamed: str,
) -> Fit:
    stored = {name: names[name] for name in own if name in names}
    misshapen = [
        f"{name} {found[at]} instead of {own[name]}" for name, at in sorted(stored.items()) if found[at] != own[name]
    ]
    missing = sorted(name for name in own if not any(other in stored for other in also[name]))
    unexpected = sorted(at for name, at in names.items() if name not in own)
    fitting = {name: at for name, at in stored.items() if found[at] == own[name]}
    return Fit(fitting, missing, unexpected, misshapen, renamed)


def _quoted(prefixes: list[str]) -> str:
    return " and ".join(f'"{prefix}"' for prefix in prefixes)
