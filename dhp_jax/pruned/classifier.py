"""A new classifier for another number of classes."""

from dataclasses import replace

from flax import nnx

from dhp_jax.core.layers import Linear
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import architecture_of, set_architecture
from dhp_jax.models.registry import task_of


def with_classes(model: Model, num_classes: int, *, rngs: nnx.Rngs) -> Model:
    """A network with a fresh classifier for another number of classes, to be trained on other data.

    Args:
      model: a network of a family that classifies, with or without latents; left as it was, and
        shares all arrays but the classifier's.
      num_classes: how many classes there are now.
      rngs: the `params` stream draws the classifier.

    Returns:
      The network; `save` and `load` know it.

    Raises:
      ValueError: a network of no such family (of one of your own class, replace the last layer and
        give `load` a function that builds it so), or a number that is not positive.

    Example:
      >>> flowers = dhp.with_classes(dhp.load("runs/resnet56/model"), 102, rngs=nnx.Rngs(0))
    """
    made = architecture_of(model)
    if made.family is None or task_of(made.family) != "classification":
        raise ValueError(
            f"model: expected a network of a family that classifies, got {made.family!r}"
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive integer, got {num_classes!r}")
    model = nnx.clone(model)
    old = model.classifier
    options = {name: getattr(old, name) for name in ("use_bias", "dtype", "param_dtype")}
    if isinstance(old, Linear):
        model.classifier = Linear(old.z_in, num_classes, **options, rngs=rngs)
    else:
        model.classifier = nnx.Linear(old.in_features, num_classes, **options, rngs=rngs)
    arguments = {**made.arguments, "num_classes": num_classes}
    set_architecture(model, replace(made, arguments=arguments))
    return model
