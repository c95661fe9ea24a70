"""What can be pruned of a network of traced latents, and what cannot, and why."""

from dataclasses import dataclass
import textwrap
from typing import Any

from flax import nnx
import jax.numpy as jnp

from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import path_name
from dhp_jax.errors import some_of
from dhp_jax.tracing.discovery import Discovery
from dhp_jax.tracing.generated import GeneratedArray, is_plain_param
from dhp_jax.tracing.rules_of_sums import TAPS
from dhp_jax.tracing.table import ADDED

COLUMNS = 80


@dataclass(frozen=True)
class Explanation:
    """What `dhp.explain` found; printed as text.

    Attributes:
      latents: by name how many entries it has, and the arrays and axes that they are in.
      fixed: by reason the arrays and axes that stay.
      notes: what else is to be known, in sentences.
    """

    latents: dict[str, tuple[int, list[str]]]
    fixed: dict[str, list[str]]
    notes: list[str]

    def __str__(self) -> str:
        lines = ["What can be pruned:"]
        for name, (size, places) in self.latents.items():
            layers = dict.fromkeys(_layer(place) for place in places)
            layers.pop(name, None)
            others = f", with {some_of(list(layers))}" if layers else ""
            lines += _wrapped(f"{name}: {size} entries{others}")
        windows = {why: places for why, places in self.fixed.items() if TAPS in why}
        others = {why: places for why, places in self.fixed.items() if why not in windows}
        lines.append("What stays:" if others else "Nothing else has an axis of channels.")
        for why, places in others.items():
            lines += _wrapped(f"{some_of(places)}: {why}")
        if windows:
            kernels = {_layer(place) for places in windows.values() for place in places}
            lines.append(f"  the windows of kernels: {len(kernels)}")
        return "\n".join([*lines, *(part for note in self.notes for part in _wrapped(note, ""))])

    __repr__ = __str__


def explain(net: nnx.Module) -> Explanation:
    """Tells what can be pruned of a network of traced latents, what cannot, and why.

    Args:
      net: from `dhp.with_latents(model, inputs)`.

    Returns:
      What is found, which prints as a table.

    Raises:
      ValueError: another network.

    Example:
      >>> print(dhp.explain(net))
    """
    table = architecture_of(net).axes if isinstance(net, nnx.Module) else None
    if table is None:
        raise ValueError(
            f"net: expected a network from with_latents(model, inputs), got a {type(net).__name__}"
        )
    names, found = list(table.sizes), {}
    for number, name in enumerate(names):
        places = [
            f"{array}[{k}]"
            for array, axes in table.places.items()
            for k, positions in axes.items()
            if (positions.owner == number).any()
        ]
        found[name] = (latents(net)[name].size, places)
    fixed = table.notes.get("fixed", {"the file that it is from tells no reasons": ["other axes"]})
    return Explanation(found, dict(fixed), _sentences(net, table))


def _sentences(net: nnx.Module, table: Any) -> list[str]:
    """What is to be known beside the axes: numbers that change, memory, arrays that are cut."""
    notes = list(table.notes.get("sentences", ()))
    by_name = {node.name: node for node in _generated(net)}
    notes += [memory(net)] if by_name else []
    direct = [node for node in by_name.values() if node.embedding and node.pair is None]
    kept = [node.name for node in direct if not is_plain_param(node.weight)]
    if kept:
        notes.append(f"Times latents, to keep their type or metadata: {some_of(kept)}.")
    params = nnx.to_flat_state(nnx.state(net, nnx.Param))
    own = {path_name(path): leaf.get_value() for path, leaf in params}
    causes: dict[str, list[str]] = {}
    for name in own.keys() & table.places.keys() - by_name.keys():
        if own[name].ndim > 1:
            real = jnp.issubdtype(own[name].dtype, jnp.floating)
            why = "the code reads or sets it" if real else f"its numbers are {own[name].dtype}"
            causes.setdefault(why, []).append(name)
    told = [f"for {why}: {some_of(sorted(names))}." for why, names in sorted(causes.items())]
    return [*notes, *(f"Cut, but not generated, {cause}" for cause in told)]


def memory(net: nnx.Module) -> str:
    """What the generated arrays of a network take, and would take without hypernetworks."""
    arrays = _generated(net)
    trained, there = sum(node.numbers() for node in arrays), sum(node.size for node in arrays)
    now = sum(node.numbers() * node.dtype.itemsize for node in arrays) / 1e6
    least = sum(node.size * node.dtype.itemsize for node in arrays) / 1e6
    if all(node.pair is None for node in arrays):
        return f"{len(arrays)} arrays, of {there:,} numbers ({now:.3g} MB), are times latents."
    return (
        f"{len(arrays)} arrays are generated from {trained:,} numbers ({now:.3g} MB), in place of "
        f"{there:,} ({least:.3g} MB), which embedding=None takes."
    )


def _generated(net: nnx.Module) -> list[GeneratedArray]:
    found = (node for _, node in nnx.iter_graph(net) if isinstance(node, GeneratedArray))
    return list({id(node): node for node in found}.values())


def notes_of(found: Discovery) -> dict[str, Any]:
    """What a discovery tells beside the table."""
    fixed = {
        why or "it is not reached": [f"{name}[{k}]" for name, k in places]
        for why, places in found.fixed().items()
    }
    sentences, added = [], []
    for family in found.families:
        if family.chosen:
            sentences.append(
                f"{family.name}: a maximum or softmax goes over it at {family.chosen}, so the "
                "numbers of what is left change when entries go."
            )
        if family.drawn:
            sentences.append(
                f"{family.name}: random numbers are drawn over it in evaluation at {family.drawn}, "
                "so what is left is given others when entries go."
            )
        if family.renormalises:
            sentences.append(
                f"{family.name}: a normalisation or mean goes over it, so what is left is "
                "normalised anew when entries go."
            )
        elif family.summed and not family.chosen:
            added.append(family.name)
            sentences.append(f"{family.name}: its entries are added up at {family.summed}.")
    for tied in found.ties:
        sentences.append(f"{tied[0]}: entries go together with those of {', '.join(tied[1:])}.")
    if found.analysis.untrainable:
        sentences.append(f"Not proved in training mode: {found.analysis.untrainable}.")
    return {"fixed": fixed, "sentences": sentences, ADDED: added}


def _layer(place: str) -> str:
    """The layer of an array's axis, written as `path.to.layer.array[axis]`."""
    array = place.partition("[")[0]
    return array.rpartition(".")[0] or array


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
