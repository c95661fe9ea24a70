"""A new classifier for another number of classes."""

from dataclasses import replace

from flax import nnx

from dhp_jax.core.latent import has_gates, latents, walk
from dhp_jax.core.layers import Linear
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.core.surgery import replace_modules
from dhp_jax.errors import ArgumentError, check_integer
from dhp_jax.models.registry import task_of
from dhp_jax.pruned.gates import gate
from dhp_jax.tracing.generated import GeneratedArray, PlacedAxis


def with_classes(
    model: Model, num_classes: int, *, rngs: nnx.Rngs, layer: str | None = None
) -> Model:
    """A network with a fresh classifier for another number of classes, to be trained on other data.

    Args:
      model: a network that classifies, with or without latents; left as it was, and shares all
        arrays but the classifier's.
      num_classes: how many classes there are now.
      rngs: the `params` stream draws the classifier.
      layer: path of the linear layer that gives the classes, such as "head"; a family's if `None`.

    Returns:
      The network; `save` knows it. So does `load`, which for a network of your own class has to be
      given a function that builds it for as many classes.

    Raises:
      ValueError: no `layer` for a network that is of no family that classifies, or one that is no
        linear layer with a fixed number of outputs; a number that is not positive.

    Example:
      >>> flowers = dhp.with_classes(dhp.load("runs/resnet56/model"), 102, rngs=nnx.Rngs(0))
    """
    made = architecture_of(model)
    classifies = made.family is not None and task_of(made.family) == "classification"
    if layer is None and not classifies:
        raise ValueError(
            "layer: expected the path of the linear layer that gives the classes, for a network of "
            f"no family that classifies; got None and family {made.family!r}"
        )
    check_integer("num_classes", num_classes)
    num_classes = int(num_classes)
    model, path = nnx.clone(model), layer or "classifier"
    linear = {p: m for p, _, m in walk(model) if isinstance(m, Linear | nnx.Linear)}
    if path not in linear:
        raise ArgumentError.unknown("layer", path, linear)
    old = linear[path]
    names = ("use_bias", "dtype", "param_dtype", "precision", "dot_general", "promote_dtype")
    options = {name: getattr(old, name) for name in (*names, "preferred_element_type")}
    if isinstance(old, Linear):
        new = Linear(old.z_in, num_classes, **options, rngs=rngs)
        if has_gates(model):
            gate(new)
    else:
        new = nnx.Linear(old.in_features, num_classes, **options, rngs=rngs)
        if isinstance(old.kernel, GeneratedArray):
            new.kernel = _generated(model, old.kernel, new.kernel, rngs)
    model = replace_modules(model, lambda module: new if module is old else module)
    arguments = dict(made.arguments)
    if "num_classes" in arguments or classifies:
        arguments["num_classes"] = num_classes
    axes = made.axes and replace(made.axes, cache={})
    set_architecture(model, replace(made, arguments=arguments, axes=axes))
    return model


def _generated(
    model: nnx.Module, old: GeneratedArray, kernel: nnx.Param, rngs: nnx.Rngs
) -> GeneratedArray:
    """A kernel whose inputs are on the latents that those of another are on."""
    table, named = architecture_of(model).axes, latents(model)
    places = table.places[old.name]
    if set(places) != {0}:
        raise ValueError(f"layer: expected one whose outputs are not pruned; got {old.name!r}")
    axes = {0: PlacedAxis([named[name] for name in table.sizes], places[0])}
    kernel = old.variable(kernel.get_value())
    return GeneratedArray(old.name, kernel, axes, embedding=old.embedding, rngs=rngs)
