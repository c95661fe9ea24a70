"""What was kept of each axis of the arrays of a network: enough to cut its like again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx
import jax
import numpy as np

from dhp_jax.core.state import path_name
from dhp_jax.tracing.analysis import cut_model
from dhp_jax.tracing.layer_sizes import numbers_in, set_number

Numbers = Sequence[tuple[str, str, int]]  # path of a module, attribute, value


@dataclass(frozen=True, eq=False)
class ArrayCuts:
    """What was kept of the axes of a network's arrays.

    Attributes:
      kept: by array and axis the positions that were kept; other axes are whole.
      numbers: sizes that modules of the user's have then: path, attribute, value.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    numbers: tuple[tuple[str, str, int], ...] = ()

    def then(self, masks: Mapping[str, Sequence[np.ndarray]], numbers: Numbers) -> "ArrayCuts":
        """These cuts, and after them others: boolean masks of the axes of what they leave."""
        kept: dict[str, dict[int, tuple[int, ...]]] = {
            name: dict(axes) for name, axes in self.kept.items()
        }
        for name, axes in masks.items():
            for k, mask in enumerate(axes):
                if not mask.all():
                    before = np.asarray(kept.get(name, {}).get(k, range(len(mask))))
                    kept.setdefault(name, {})[k] = tuple(before[mask].tolist())
        merged = {(path, attribute): value for path, attribute, value in self.numbers}
        merged |= {(path, attribute): value for path, attribute, value in numbers}
        return ArrayCuts(kept, tuple((*place, value) for place, value in merged.items()))

    def apply(self, model: nnx.Module) -> nnx.Module:
        """The network that is left of a whole one, which may be abstract and stays as it was.

        Raises:
          ValueError: it lacks an array, an axis or a module, or has too few positions.
        """
        graphdef, state = nnx.split(model)
        flat = nnx.to_flat_state(state)
        names = [path_name(path) for path, _ in flat]
        for name in sorted(self.kept.keys() - set(names)):
            raise ValueError(f"cuts: the network has no array {name!r}")
        arrays = zip(names, jax.tree.leaves(state), strict=True)
        masks = [_masks(name, tuple(x.shape), self.kept.get(name, {})) for name, x in arrays]
        small = cut_model(graphdef, state, masks)
        set_numbers(small, self.numbers)
        return small


NO_CUTS = ArrayCuts({})


def _masks(name: str, shape: tuple[int, ...], own: Mapping[int, Any]) -> list[np.ndarray]:
    masks = [np.ones(size, bool) for size in shape]
    for k, positions in own.items():
        if not 0 <= k < len(shape) or not positions or max(positions) >= shape[k]:
            raise ValueError(f"cuts: array {name!r} of shape {shape} has no such axis {k}")
        masks[k][:] = False
        masks[k][list(positions)] = True
    return masks


def set_numbers(model: nnx.Module, numbers: Numbers) -> None:
    """Sets sizes in modules.

    Raises:
      ValueError: there is no such module, or it has no such number, or a smaller one.
    """
    modules = {path_name(path): module for path, module in nnx.iter_modules(model)}
    for path, attribute, value in numbers:
        held = dict(numbers_in(modules.get(path, model))).get(attribute)
        if held is None or path not in modules:
            raise ValueError(f"cuts: the network has no number {attribute!r} in {path!r}")
        if not 0 < value <= held:
            where = f"{attribute!r} in {path!r}"
            raise ValueError(f"cuts: {where}: expected a number of 1 .. {held}, got {value}")
        set_number(modules[path], attribute, value)
