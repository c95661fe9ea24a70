"""Loads saved networks: a JSON description and arrays in safetensors; no pickle."""

from collections.abc import Callable, Mapping
from dataclasses import replace
import functools
import os
from pathlib import Path
import stat
from types import SimpleNamespace
from typing import Any, overload

from flax import nnx
import jax
import numpy as np

from dhp_jax.artifact.arrays import (
    ARRAYS,
    DESCRIPTION,
    digest_of,
    open_arrays,
    open_file,
    read_arrays,
)
from dhp_jax.artifact.description import (
    MAX_DESCRIPTION_BYTES,
    MAX_TEXT,
    ArtifactError,
    check_description,
    parse_json,
)
from dhp_jax.artifact.settings import warn_of_settings
from dhp_jax.artifact.traced import check_table, cuts_from_json, table_from_json
from dhp_jax.core.latent import latents
from dhp_jax.core.plain import Model
from dhp_jax.core.provenance import Architecture, architecture_of, set_architecture
from dhp_jax.core.state import path_name
from dhp_jax.core.surgery import prune
from dhp_jax.errors import FieldError, first_line, shown
from dhp_jax.files import earlier
from dhp_jax.models import registry
from dhp_jax.models.own import is_own
from dhp_jax.pruned.fold import remove_folded_layers
from dhp_jax.pruned.relatent import make_network, narrow
from dhp_jax.tracing.network import install

MODEL = "model"  # of the folders in a run's, the one that it ends with


@overload
def load(
    path: str | os.PathLike[str], *, build: None = None, call: Callable[..., Any] | None = None
) -> nnx.Module: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    build: Callable[..., Model],
    call: Callable[..., Any] | None = None,
) -> Model: ...


def load(
    path: str | os.PathLike[str],
    *,
    build: Callable[..., nnx.Module] | None = None,
    call: Callable[..., Any] | None = None,
) -> nnx.Module:
    """Reads a network that `save` has written; safe with files from strangers.

    A file can do no more than be refused or become arrays. First `load` checks what `model.json`
    says (see `dhp_jax.artifact.description`), then that the two files agree, down to the digest.
    Then it builds the network, abstractly, of no more layers than there are arrays for. It reads
    the arrays only if the network needs just these; they must be finite. Of a network of your own
    class it warns where a module holds another activation, stride or other setting than when it
    was saved; those inside functions it cannot see.

    Args:
      path: the folder; the two files in it may not be links.
      build: for a network of your own class: makes the unpruned network, as `build(rngs)` or
        `build(rngs=rngs)`, whichever it takes. Random state that the file lacks, of a layer of
        dropout that is new, is that of `build(nnx.Rngs(0))`. Where a run has noted arguments, it
        gets those that it takes by name.
        For a network whose latents were found by tracing it makes the ordinary one that
        `dhp.with_latents` was given first, or the one of latents that this was pruned from.
      call: of such a network how it is called, if that is not `model(*inputs)`.

    Returns:
      The network, in evaluation mode and ready to call; `.train()` makes it ready for fine-tuning.

    Raises:
      ArtifactError: a `ValueError`; the folder holds no network of this format, or its arrays are
        not those that the network needs (it tells which).

    Example:
      >>> small = dhp.load("out/")
      >>> logits = small(images)
    """
    path = Path(path).expanduser()
    description = verify(path)
    if build is None and description["family"] in registry.OWN:
        build = functools.partial(registry.build, description["family"])
    if build is None:
        whole = _build_family(description, path / DESCRIPTION)
    else:
        whole = _call_build(build, description)
    traced = _Traced(description, path / DESCRIPTION, call)
    ordinary = traced and not latents(whole)
    masks = None if ordinary else _masks(whole, description["survivors"], path / DESCRIPTION)
    folded = description.get("folded", [])

    def make(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
        if traced:
            model = traced.made(model if ordinary else prune(model, masks))
        elif description.get("renewed"):
            model = narrow(model, description["survivors"] or {})
        elif masks is not None:
            model = prune(model, masks)
        return nnx.split(remove_folded_layers(model, folded))

    def is_gained(location: tuple, leaf: Any) -> bool:  # what is not saved, or may be lacking
        renewed = isinstance(leaf, nnx.RngState | nnx.Intermediate)
        return renewed and path_name(location) not in description["arrays"]

    try:
        graphdef, abstract = nnx.eval_shape(make, whole)
    except (ValueError, KeyError) as error:  # such as layers that are not there
        raise ArtifactError(f"path: {path / DESCRIPTION}: {error}") from error
    gained, known = nnx.split_state(abstract, is_gained, ...)
    state = read_arrays(known, description["arrays"], path)
    if gained:
        state = nnx.merge_state(state, _draw(lambda: make(_built(build, description))[1], gained))
    model = nnx.merge(graphdef, state)
    model.eval()
    if build is not None:
        warn_of_settings(description.get("settings", []), model)
    return model


class _Traced:
    """What a file says of axes that were found by tracing; false if nothing."""

    def __init__(self, description: Mapping[str, Any], where: Path, call: Any):
        cuts, table = description.get("cuts"), description.get("latents")
        self.cuts = None if cuts is None else cuts_from_json(cuts, str(where))
        kept = description["survivors"]
        self.survivors = kept and {name: tuple(entries) for name, entries in kept.items()}
        self.table, self.least = None, {}
        if table is not None:
            self.table, self.least = table_from_json(table, str(where))
            call = call or self.table.call
            self.table = replace(self.table, call=call, inputs=call and self.table.inputs)

    def __bool__(self) -> bool:
        return self.cuts is not None or self.table is not None

    def made(self, model: nnx.Module) -> nnx.Module:
        """The network of a whole one."""
        if self.cuts is not None:
            model = self.cuts.apply(model)
        if self.table is not None:
            check_table(self.table, model)
            generated = self.table.notes["generated"]
            model = install(model, self.table, generated, min_channels=self.least, rngs=nnx.Rngs(0))
        made = replace(
            architecture_of(model), axes=self.table, cuts=self.cuts, survivors=self.survivors
        )
        set_architecture(model, made)
        return model


def verify(path: str | os.PathLike) -> dict[str, Any]:
    """Checks the files of a saved network, down to the digest of its arrays.

    `load` does this too. The network is not built, and no array is read.

    Args:
      path: the folder.

    Returns:
      What `model.json` says, as from `read_description`.

    Raises:
      ArtifactError: no artifact of this format and version is there, or the arrays are not those
        that were saved with it.

    Example:
      >>> dhp_jax.artifact.reading.verify("out/")["notes"]
    """
    path = Path(path).expanduser()
    description = read_description(path)
    with open_arrays(path / ARRAYS, description["arrays"]):
        pass  # what opening it checks is all
    digest = digest_of(path / ARRAYS)
    if digest != description["sha256"]:
        raise ArtifactError(
            f"path: {path / ARRAYS} is not what was saved: expected SHA-256 "
            f"{description['sha256']}, got {digest}"
        )
    return description


def exists(path: str | os.PathLike) -> bool:
    """Whether a folder holds a saved network."""
    return all(os.path.isfile(Path(path).expanduser() / name) for name in (DESCRIPTION, ARRAYS))


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """Reads `model.json`: family, arguments, survivors, arrays and notes.

    Raises:
      ArtifactError: no artifact of this format and version is there.
    """
    path = Path(path).expanduser()
    for name in (DESCRIPTION, ARRAYS):
        try:
            mode = os.lstat(path / name).st_mode
        except (OSError, ValueError):
            others = [other for other in (path / MODEL, earlier(path)) if exists(other)]
            hint = f"; {others[0]} is one" if others else ""
            raise ArtifactError(
                f"path: expected a folder with {DESCRIPTION} and {ARRAYS}, got {path}{hint}"
            ) from None
        if not stat.S_ISREG(mode):
            what = "a link" if stat.S_ISLNK(mode) else "something else"
            raise ArtifactError(f"path: {path / name}: expected a file, got {what}")
    with open_file(path / DESCRIPTION) as file:
        return parse_description(file.read(MAX_DESCRIPTION_BYTES + 1), path / DESCRIPTION)


def parse_description(content: bytes, where: Path) -> dict[str, Any]:
    """Parses and checks the content of a `model.json`."""
    if len(content) > MAX_DESCRIPTION_BYTES:
        raise ArtifactError(
            f"path: {where}: expected at most {MAX_DESCRIPTION_BYTES} bytes, got more"
        )
    description = parse_json(content, str(where))
    check_description(description, str(where))
    _Traced(description, where, None)
    return description


def _build_family(description: Mapping[str, Any], where: Path) -> nnx.Module:
    """Builds the unpruned network of a family, with shapes in place of arrays.

    Building takes bounded time and memory, whatever the arguments are: every layer and latent draws
    initial values, and the first that is too many for the arrays of the file ends it. How wide they
    are is limited by the families.
    """
    family = description["family"]
    if family is None or is_own(family):
        made = "a class of its own" if family is None else shown(family)
        raise ArtifactError(
            f"path: {where.parent} holds a network of {made}; expected load(path, build=...) with "
            "a function build(rngs) that makes it unpruned (of commands "
            f"--build={family or 'module:function'})"
        )
    if family not in registry.FAMILIES:
        raise ArtifactError(
            f"path: {FieldError.unknown(f'{where}: family', family, registry.FAMILIES)}"
        )
    # With latents, of which no network has more than arrays; folded layers have had four each.
    left = 2 * len(description["arrays"]) + 8 * sum(map(len, description.get("folded", [])))

    def draw() -> jax.Array:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("expected a network of the arrays in the file, got one of more layers")
        return jax.random.key(0)

    arguments = {**registry.absent(family), **description["arguments"]}

    def build() -> nnx.Module:
        return registry.build(family, rngs=SimpleNamespace(params=draw), **arguments)

    try:
        return nnx.eval_shape(build)
    except Exception as error:  # whatever hostile arguments lead to
        what = first_line(error)
        raise ArtifactError(f"path: {where}: arguments: {what[:MAX_TEXT]}") from None


def _call_build(build: Callable[..., nnx.Module], description: Mapping[str, Any]) -> nnx.Module:
    """Builds the unpruned network by the caller's function, with shapes in place of arrays."""
    try:
        return registry.shapes_of(lambda: _built(build, description))
    except Exception as error:  # whatever the function raises, or what is none
        what = first_line(error)
        raise ArtifactError(
            "build: expected a function build(rngs) that makes the unpruned network, an "
            f"nnx.Module; got {shown(build)}: {what}"
        ) from error


def _built(build: Callable[..., nnx.Module], description: Mapping[str, Any]) -> nnx.Module:
    family, arguments = description["family"], description["arguments"]
    model = make_network(build, nnx.Rngs(0), arguments)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"it returns {shown(model)}")
    if is_own(family):
        set_architecture(model, Architecture(family, arguments))
    return model


def _masks(
    model: nnx.Module, survivors: Mapping[str, list[int]] | None, where: Path
) -> dict[str, np.ndarray] | None:
    """Masks of the survivors in the file, which must be those of the network's latents."""
    if survivors is None:
        return None
    axes = latents(model)
    for name in sorted(axes.keys() ^ survivors.keys()):
        what = "lacks" if name in axes else "holds an unexpected"
        raise ArtifactError(f"path: {where}: survivors: {what} latent {name!r}")
    masks = {}
    for name, indices in survivors.items():
        size = axes[name].size
        if indices[-1] >= size or not (axes[name].prunable or len(indices) == size):
            expected = "indices below" if axes[name].prunable else "all indices below"
            raise ArtifactError(
                f"path: {where}: survivors[{name!r}]: expected {expected} {size}, got "
                f"{shown(indices)}"
            )
        masks[name] = np.zeros(size, bool)
        masks[name][indices] = True
    return masks


def _draw(make: Callable[[], nnx.State], like: nnx.State) -> nnx.State:
    """The leaves of `make()` at the paths of `like`; nothing else is computed."""
    places = dict(nnx.to_flat_state(like))

    @jax.jit
    def chosen() -> nnx.State:
        found = nnx.to_flat_state(make())
        return nnx.from_flat_state([(place, leaf) for place, leaf in found if place in places])

    return chosen()
