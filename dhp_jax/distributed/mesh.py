"""The mesh of devices that training runs on, and which device holds which array.

The mesh has two axes. Batches are divided along `data`. The arrays of hypernetworks and their
optimizer state are divided along `model`. Every device has all other arrays. The compiler adds the
communication, so that losses, BatchNorm statistics and gradients are those of the whole batch.
With one device there is no mesh, and functions return what they are given.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree
import numpy as np

from dhp_jax.core.hypernet import HypernetArrays, KernelGenerator
from dhp_jax.core.latent import walk
from dhp_jax.core.state import is_key
from dhp_jax.core.surgery import override
from dhp_jax.errors import ConfigError

DATA, MODEL = "data", "model"


def axis_sizes(data: int, model: int, devices: int, processes: int = 1) -> tuple[int, int]:
    """How many devices each axis of the mesh has.

    Args:
      data, model: `config.mesh.data`, -1 for all devices that `model` leaves, and `.model`.
      devices: how many there are.
      processes: among which they are divided. Several of them use all devices.

    Raises:
      ConfigError: there are not so many devices, or some would be left that must not.
    """
    every = data == -1 or processes > 1
    if model > devices or (every and devices % model):
        near = _nearest([n for n in range(1, devices + 1) if devices % n == 0], model)
        raise ConfigError(
            "config.mesh.model",
            f"a divisor of {devices}, the number of devices, such as {near}",
            model,
        )
    most = devices // model
    if data == -1:
        return most, model
    if data > most or (processes > 1 and data != most):
        expected = f"{most}" if processes > 1 else f"at most {most}"
        beside = f" for config.mesh.model={model}" if model > 1 else ""
        raise ConfigError(
            "config.mesh.data",
            f"{expected}, as there are {devices} devices{beside}, or -1 for all",
            data,
        )
    return data, model


def check_divisible(batch_size: int, data: int, processes: int = 1) -> None:
    """Raises a `ConfigError` unless a batch can be divided among the devices along `data`.

    Several processes cannot leave any of them out.
    """
    if batch_size % data:
        below = batch_size - batch_size % data
        sizes = " or ".join(str(size) for size in (below, below + data) if size)
        near = _nearest([n for n in range(1, data) if batch_size % n == 0], data)
        fewer = f", for which config.mesh.data={near} works" if processes == 1 else ""
        raise ConfigError(
            "config.batch_size",
            detail=f"expected a multiple of {data}, the devices along config.mesh.data, such "
            f"as {sizes}; got {batch_size}{fewer}",
        )


def _nearest(possible: list[int], value: int) -> str:
    """The nearest possible values below and above a value, in words."""
    below = [n for n in possible if n <= value][-1:]
    above = [n for n in possible if n > value][:1]
    return " or ".join(map(str, below + above))


def make_mesh(
    data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
    """Makes the mesh of the devices of all processes; `None` if it would have one device.

    Raises:
      ConfigError: the devices at hand cannot be arranged so; see `axis_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(data, model, len(devices), jax.process_count())
    count = sizes[0] * sizes[1]
    if count == 1:
        return None
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(arrange(devices[:count], sizes), (DATA, MODEL), axis_types=auto)


def arrange(devices: Sequence[jax.Device], sizes: tuple[int, int]) -> np.ndarray:
    """Arranges devices so that neighbours in the mesh are neighbours in the hardware.

    Slices (of TPUs, or of GPUs with fast connections) may be joined by a slower network; `data`
    then goes from slice to slice. Some devices cannot be arranged so, such as those that are no
    rectangle of a TPU's topology. They come in the order of their numbers.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    options = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, **options)
        within = sizes[0] // slices, sizes[1]
        return mesh_utils.create_hybrid_device_mesh(within, (slices, 1), **options)
    except (AssertionError, ValueError):  # what JAX raises if it finds no arrangement
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)


def shard_batch(mesh: Mesh | None, batch: PyTree) -> PyTree:
    """Divides the arrays of a batch along their first axis; within a jitted function."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, _data_sharding(mesh))


def gather_kernels(mesh: Mesh | None, model: nnx.Module) -> nnx.Module:
    """Has every device use whole kernels where hypernetworks are divided; in place.

    Otherwise the compiler divides the channels of activations like the kernels. It then sends
    activations between devices, which are many times larger. The model, merged within a jitted
    function, is returned.
    """
    if mesh is not None and mesh.shape[MODEL] > 1:
        everywhere = NamedSharding(mesh, PartitionSpec())
        for _, _, layer in walk(model):
            if isinstance(layer, KernelGenerator):
                override(layer, kernel=_on_every_device(everywhere))
    return model


@functools.cache
def _on_every_device(everywhere: NamedSharding) -> Callable[..., Array]:
    def kernel(generate: Callable[[KernelGenerator], Array], layer: KernelGenerator) -> Array:
        return jax.lax.with_sharding_constraint(generate(layer), everywhere)

    return kernel


def local_rows(mesh: Mesh | None, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Indices of the examples of a batch that this process's devices hold, in ascending order.

    They need not be consecutive: devices are ordered by their connections.
    """
    if mesh is None:
        return np.arange(batch_size)
    held = np.zeros(batch_size, bool)
    for index in _data_sharding(mesh).addressable_devices_indices_map((batch_size,)).values():
        held[index] = True
    return np.flatnonzero(held)


def put_batch(mesh: Mesh | None, batch: PyTree, batch_size: int) -> PyTree:
    """Copies a batch from the host, the examples `local_rows`, to the devices of this process.

    It is copied even where the device is the host, so that shared memory can be used again.
    `batch_size` counts the examples of all processes.
    """
    if mesh is None:
        return jax.tree.map(lambda array: jax.device_put(array, may_alias=False), batch)
    sharding, rows = _data_sharding(mesh), local_rows(mesh, batch_size)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            begin = np.searchsorted(rows, start)
            return array[begin : begin + stop - start].copy()

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def keep_placement(mesh: Mesh | None, state: PyTree) -> PyTree:
    """Keeps a training state where `place` has put it; within a jitted function."""
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(mesh, state))


def shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Where on the mesh each array of a training state is; shapes of arrays suffice."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: NamedSharding(mesh, _spec(mesh, path, array)), state
    )


def place(mesh: Mesh | None, tree: PyTree) -> PyTree:
    """Puts a tree, which is the same in all processes, on the devices of the mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(_put, tree, shardings(mesh, tree))


def gather(tree: PyTree) -> PyTree:
    """Gathers arrays of a mesh, each in full, on one device of this process or on its host.

    All processes call it together.
    """
    return jax.tree.map(_gather, tree)


def _data_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA))


def _spec(mesh: Mesh, path: tuple[Any, ...], array: jax.Array) -> PartitionSpec:
    """How an array of a training state is divided: along its last axis, or not at all.

    Momentum of a hypernetwork's array has the name of that array in its path.
    """
    names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
    of_hypernetwork = array.ndim >= 2 and not names.isdisjoint(HypernetArrays._fields)
    if of_hypernetwork and array.shape[-1] % mesh.shape[MODEL] == 0:
        return PartitionSpec(*[None] * (array.ndim - 1), MODEL)
    return PartitionSpec()


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if is_key(array):
        numbers = _put(jax.random.key_data(array), sharding)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(numbers)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _gather(array: Any) -> Any:
    sharding = getattr(array, "sharding", None)
    if sharding is None or sharding.num_devices == 1:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    return multihost_utils.process_allgather(array, tiled=True)
