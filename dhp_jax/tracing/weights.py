"""The weights that go with the entries of latents: which make, read and scale their channels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.hypernet import HypernetArrays
from dhp_jax.core.latent import Latent, latents, latents_to_prune, walk
from dhp_jax.core.layers import Hyper, Linear, Norm
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import path_name, value_of, variables_of
from dhp_jax.errors import ArgumentError
from dhp_jax.tracing.analysis import Analysis
from dhp_jax.tracing.generated import ordinary
from dhp_jax.tracing.placed import Positions
from dhp_jax.tracing.reads import all_reads, operands, read_axes, used_and_read
from dhp_jax.tracing.table import LatentTable

NORMS = nnx.BatchNorm | nnx.GroupNorm | nnx.LayerNorm | nnx.RMSNorm | nnx.Dict  # of flax.linen
MADE, READ, SCALED = "made", "read", "scaled"  # what an array does with channels
ANY = "any"
NEEDED = {  # by scores of such weights
    MADE: "a layer that makes",
    READ: "a layer that reads",
    SCALED: "a normalisation that scales",
    ANY: "a layer with weights for",
}
Entries = list[tuple[Latent, int] | None]


class Weights(NamedTuple):
    """An array of the ordinary network, with an axis on latents.

    Attributes:
      role: whether the axis is one of channels that a kernel makes, that it reads, or of scales.
      array: path of the array.
      axis: of the array.
      entries: of which latent each position is which entry; `None` for one that stays.
      value: a function that returns the array in float64, or complex128.
      beside: the axes along which there are several kernels, as of the layers of a stack.
    """

    role: str
    array: str
    axis: int
    entries: Entries
    value: Callable[[], np.ndarray]
    beside: tuple[int, ...] = ()

    def rows(self) -> np.ndarray:
        """What belongs to each position of the axis, `(positions, numbers)`."""
        value = np.moveaxis(self.value(), self.axis, 0)
        return value.reshape(len(value), -1)

    def filters(self) -> np.ndarray:
        """What belongs to each position of the axis in each kernel, `(kernels, positions, n)`."""
        others = [k for k in self.beside if k != self.axis]
        value = np.moveaxis(self.value(), (*others, self.axis), range(len(others) + 1))
        return value.reshape(-1, len(self.entries), math.prod(value.shape[len(others) + 1 :]))


def weights_of(model: nnx.Module) -> list[Weights]:
    """The weights of a network whose axes are on latents, declared or traced.

    Raises:
      ValueError: a network without latents.
    """
    latents_to_prune(model)
    table = architecture_of(model).axes
    return list(_declared(model) if table is None else _traced(model, table))


def makers(layer: Hyper | Linear) -> tuple[int, ...]:
    """What makes a kernel, by identity: layers for which it is the same have one kernel."""
    axes = (layer.z_in,) if isinstance(layer, Linear) else layer.kernel_axes()
    arrays = (vars(layer).get(name) for name in (*HypernetArrays._fields, "weight", "kernel"))
    return tuple(map(id, (*axes, *(array for array in arrays if array is not None))))


def _declared(model: nnx.Module) -> Iterator[Weights]:
    seen = set()
    for path, _, layer in walk(model):
        kernel = f"{path}.kernel" if path else "kernel"
        if isinstance(layer, Hyper | Linear):
            if makers(layer) in seen:
                continue
            seen.add(makers(layer))
        if isinstance(layer, Hyper):
            if layer.kernel_axis() is layer.z_in:  # channels of a group are no prunable axis
                yield Weights(READ, kernel, -2, layer.z_in.entries(), _wide(layer.kernel))
            yield Weights(MADE, kernel, -1, layer.z_out.entries(), _wide(layer.kernel))
        elif isinstance(layer, Linear):
            yield Weights(READ, kernel, 0, layer.z_in.entries(), _wide(layer.kernel.get_value))
        elif isinstance(layer, Norm) and layer.scale is not None:
            scale = f"{path}.scale" if path else "scale"
            yield Weights(SCALED, scale, 0, layer.z.entries(), _wide(layer.scale.get_value))


def _traced(model: nnx.Module, table: LatentTable) -> Iterator[Weights]:
    plain = ordinary(model)
    analysis, variables = table.analysis(plain), variables_of(plain)
    found = all_reads(analysis)
    reads, kernels = read_axes(analysis, found), operands(analysis, found)
    norms = {path for path, module in nnx.iter_modules(plain) if isinstance(module, NORMS)}
    scales = {path_name((*path, "scale")) for path in norms}
    named = latents(model)
    owners = [named[name] for name in table.sizes]
    ruled, others = set(), list[Weights]()
    for array, axes in table.places.items():
        variable = variables[array]
        if not _is_weight(variable):
            continue
        value = value_of(variable)
        is_scale = array in scales and array not in kernels  # whatever name it has in a mapping
        for k, positions in axes.items():
            role = SCALED if is_scale else READ if k in reads[array] else MADE
            entries = entries_of(owners, positions)
            beside = tuple(set(range(value.ndim)) - kernels.get(array, set(range(value.ndim))))
            weights = Weights(role, array, k, entries, _wide(_read(variable)), beside)
            if role != MADE or array in kernels:
                ruled |= {entry[0] for entry in entries if entry}
                yield weights
            elif value.ndim > 1:  # a bias, or the like
                others.append(weights)
    yield from filter(None, (_of_others(weights, ruled) for weights in others))


def _of_others(weights: Weights, ruled: set[Latent]) -> Weights | None:
    """The weights of latents that are not yet ruled, if there are any."""
    entries = [entry if entry and entry[0] not in ruled else None for entry in weights.entries]
    return weights._replace(entries=entries) if any(entries) else None


def entries_of(owners: Sequence[Latent], positions: Positions) -> Entries:
    """Of each position the latent, of those that own some, and its entry."""
    both = zip(positions.owner.tolist(), positions.entry.tolist(), strict=True)
    return [(owners[n], entry) if n >= 0 else None for n, entry in both]


def _is_weight(variable: nnx.Variable) -> bool:
    """Whether it is trained, or a frozen kernel, as beside low-rank adapters.

    Frozen arrays of one axis are statistics or the like. Those of zeros and ones tell which weights
    there are, and have no magnitude.
    """
    value = value_of(variable)
    frozen = sum(n > 1 for n in value.shape) > 1 and jnp.issubdtype(value.dtype, jnp.floating)
    if isinstance(variable, nnx.Param | nnx.BatchStat | nnx.Cache) or not frozen:
        return isinstance(variable, nnx.Param)
    return not np.isin(np.asarray(value), (0, 1)).all()


def _read(leaf: nnx.Variable | jax.Array) -> Callable[[], jax.Array]:
    """A function that returns the array of a leaf as the network reads it."""
    return leaf.get_value if isinstance(leaf, nnx.Variable) else lambda: leaf


def _wide(value: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    def wide() -> np.ndarray:
        array = np.asarray(value())
        return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)

    return wide


def weights_in_role(model: nnx.Module, role: str, other: str) -> list[Weights]:
    """The weights of a role; of traced latents that have none of it those of another role."""
    found = weights_of(model)
    chosen = [weights for weights in found if weights.role == role]
    if architecture_of(model).axes is None:
        return chosen
    ruled = {entry[0] for weights in chosen for entry in weights.entries if entry}
    others = (_of_others(weights, ruled) for weights in found if weights.role == other)
    return [*chosen, *filter(None, others)]


def unread(table: LatentTable, analysis: Analysis) -> set[str]:
    """The latents that a program uses without a kernel that reads their channels.

    A kernel of the other mode's program may read them, as that of a head for training alone.
    """
    found: set[str] = set()
    for used, read in used_and_read(analysis):
        found |= table.owners(used) - table.owners(read)
    return found


def scored_weights(model: nnx.Module, role: str) -> list[Weights]:
    """The weights that make the scores of a role, or of `ANY`; no array is looked at.

    Raises:
      ValueError: a network without latents; a prunable latent without such weights.
    """
    if role == MADE:
        found = weights_in_role(model, MADE, READ)
    else:
        found = [weights for weights in weights_of(model) if role in (ANY, weights.role)]
    check_scored(model, (weights.entries for weights in found), role)
    return found


def check_scored(model: nnx.Module, axes: Iterable[Entries], role: str) -> None:
    """Raises unless every prunable latent is on one of some axes, of weights in a role."""
    ruled = {entry[0] for entries in axes for entry in entries if entry}
    for name, z in latents(model).items():
        if z.prunable and z not in ruled:
            expected = f"{NEEDED[role]} the channels of every prunable latent"
            raise ArgumentError("model", detail=f"expected {expected}; {name!r} has none")


def sum_by_entry(
    model: nnx.Module, pairs: Iterable[tuple[Entries, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Sums the numbers of channels over all that are one entry of a prunable latent.

    Args:
      model: a network of latents.
      pairs: entries of the positions of axes, each with a number for each position.
    """
    sums = {z: np.zeros(z.size) for z in latents_to_prune(model).values()}
    for entries, numbers in pairs:
        for number, entry in zip(numbers, entries, strict=True):
            if entry is not None:
                sums[entry[0]][entry[1]] += number
    return {name: sums[z] for name, z in latents(model).items() if z.prunable}
