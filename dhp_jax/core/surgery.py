"""Pruning: layers on latents are replaced by smaller plain layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
import functools
from typing import Any

from flax import nnx
import jax
import numpy as np

from dhp_jax.core.latent import Axis, latents, latents_to_prune, modules_in
from dhp_jax.core.plain import Model, is_prunable
from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.core.state import with_metadata_of
from dhp_jax.core.survivors import Masks
from dhp_jax.errors import shown


def prune(model: Model, keep: Masks | None = None) -> Model:
    """Makes the smaller network, as `dhp.prune` does; nothing of hand-written latents is proved."""
    if keep is None:
        keep = {name: np.ones(z.size, bool) for name, z in latents(model).items()}
    check_masks(model, keep)
    if architecture_of(model).axes is not None:
        return architecture_of(model).axes.prune(model, keep)
    model = nnx.clone(model)
    masks = {z: np.asarray(keep[name], bool) for name, z in latents(model).items()}
    architecture = architecture_of(model)
    if masks:
        kept = {name: np.flatnonzero(keep[name]) for name in keep}
        if architecture.renewed:  # of what an earlier pruning has left
            kept = {name: np.take(architecture.survivors[name], kept[name]) for name in kept}
        kept = {name: tuple(indices.tolist()) for name, indices in kept.items()}
        architecture = replace(architecture, survivors=kept, renewed=False)

    shared: dict[Any, nnx.Variable] = {}

    def plain(module: nnx.Module) -> Any:
        if not is_prunable(module):
            return None if isinstance(module, Axis) else module
        made = module.plain(masks)
        _tie(module, made, shared)
        return made

    small = replace_modules(model, plain)
    set_architecture(small, architecture)
    return small


def _tie(layer: nnx.Module, made: nnx.Module, shared: dict[Any, nnx.Variable]) -> None:
    """Makes variables of plain layers one where those of the layers on latents are.

    A variable that the layer has too is one with those of the same variable elsewhere; all others
    are made of all that the layer has.
    """
    own = {name: v for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    alike = {"kernel": own.get("b2", own.get("weight")), **own}  # a generated one is as its bias
    axes = tuple(id(v) for v in vars(layer).values() if isinstance(v, Axis))
    for name, variable in list(vars(made).items()):
        if isinstance(variable, nnx.Variable):
            others = [v for n, v in own.items() if n not in vars(made)]
            source = tuple(map(id, [own[name]] if name in own else others))
            variable = with_metadata_of(alike.get(name), variable)
            setattr(made, name, shared.setdefault((name, *source, axes), variable))


def replace_modules(module: nnx.Module, change: Callable[[nnx.Module], Any]) -> Any:
    """Replaces modules within a module, in place; returns what replaces the module itself.

    `change` gives what stands in a module's place; the module itself to look at those in it. A
    module that several parents share is changed once.
    """
    done: dict[int, Any] = {}

    def of(module: nnx.Module) -> Any:
        if id(module) not in done:
            done[id(module)] = substitute = change(module)
            if substitute is module:
                for name, value in list(vars(module).items()):
                    if any(modules_in(value)):
                        setattr(module, name, in_value(value))
        return done[id(module)]

    def in_value(value: Any) -> Any:  # a module, or a list, tuple or dict of modules
        return jax.tree.map(
            lambda item: of(item) if isinstance(item, nnx.Pytree) else item,
            value,  # no variable is made anew, for another module may have it too
            is_leaf=lambda item: isinstance(item, nnx.Pytree | nnx.Variable),
        )

    return of(module)


def override(layer: nnx.Module, **methods: Callable[..., Any]) -> None:
    """Replaces methods of one layer, in place; other layers of its class keep theirs.

    A function is called with the replaced method, then the layer and the arguments of the call. NNX
    keeps every class for good, and each pair of a class and these functions makes one: use
    functions of a module, and keep what belongs to one layer in its attributes.
    """
    layer.__class__ = _overriding(type(layer), tuple(methods.items()))


@functools.cache
def _overriding(kind: type, methods: tuple[tuple[str, Callable[..., Any]], ...]) -> type:
    def method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        replaced_method = getattr(kind, name)
        return lambda self, *args, **options: function(replaced_method, self, *args, **options)

    return type(kind)(kind.__name__, (kind,), {name: method(name, f) for name, f in methods})


def check_masks(model: nnx.Module, keep: Masks) -> None:
    """Raises unless every latent has a mask of its size that keeps what may not be pruned."""
    if not isinstance(keep, Mapping):
        raise ValueError(f"keep: expected masks by latent, got {shown(keep)}")
    expected = latents_to_prune(model) if keep else latents(model)
    for name in [*(n for n in keep if n not in expected), *(n for n in expected if n not in keep)]:
        what = "has no mask for latent" if name in expected else "has a mask for unknown latent"
        raise ValueError(f"keep: {what} {name!r}; the model's latents are {sorted(expected)}")
    for name, z in expected.items():
        mask = np.asarray(keep[name])
        if mask.shape != (z.size,) or mask.dtype != bool or not mask.any():
            raise ValueError(
                f"keep[{name!r}]: expected a boolean mask of shape ({z.size},) that keeps at least "
                f"one entry, got {mask.dtype} of shape {mask.shape} that keeps {int(mask.sum())}"
            )
        if not z.prunable and not mask.all():
            raise ValueError(
                f"keep[{name!r}]: expected a mask that keeps all {z.size} entries, for it is not "
                f"prunable; got one that drops {int((~mask).sum())}"
            )
