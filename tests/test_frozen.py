"""What was there before modules were moved is there still: names, flags, fields, saved networks.

`fixtures/make.py` tells how the fixtures were made; test_frozen_runs.py has those of runs.
"""

import importlib
import importlib.util
import inspect
import json

from frozen import FIXTURES, ROOT, TASKS, Net, facts, fields, flags, signatures
from networks import arrays
import numpy as np
import pytest
from safetensors.numpy import load_file

import dhp_jax as dhp

INTERFACE = json.loads((FIXTURES / "interface.json").read_text())
NETWORKS = json.loads((FIXTURES / "networks.json").read_text())
MOVED = {  # what guides imported from elsewhere; they say where it is
    "dhp_jax.latent": "dhp_jax.core.latent",
    "dhp_jax.layers": "dhp_jax.core.layers",
    "dhp_jax.models.blocks": "dhp_jax.models.arguments",
}
RENAMED = {("dhp_jax", "command"): ("dhp_jax", "cli")}


def test_public_names_are_there():
    assert set(INTERFACE["public"]) <= set(dhp.__all__)
    assert set(INTERFACE["families"]) <= set(dhp.models.FAMILIES)
    for name in dhp.__all__:
        assert hasattr(dhp, name), name


@pytest.mark.parametrize(("module", "name"), INTERFACE["imported"])
def test_what_users_import_is_there(module, name):
    module, name = RENAMED.get((module, name), (module, name))
    if not offers(module, name):
        assert module in MOVED
        assert offers(MOVED[module], name)


def offers(module, name):
    """Whether a module is there and has a name, or is a package with a module of that name."""
    try:
        if importlib.util.find_spec(module) is None:
            return False
        found = importlib.import_module(module)
        return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.{name}".startswith(error.name):
            raise  # the library itself lacks a module
        return False


def test_public_functions_take_what_they_took():
    found = signatures()
    for name, expected in INTERFACE["signatures"].items():
        parameters = {parameter: (kind, optional) for parameter, kind, optional in found[name]}
        for parameter, kind, optional in expected:
            assert parameter in parameters, f"{name}: {parameter}"
            kind_found, optional_found = parameters[parameter]
            by_name = inspect.Parameter.KEYWORD_ONLY.name
            assert kind_found in (kind, "POSITIONAL_OR_KEYWORD" if kind == by_name else kind)
            assert optional_found >= optional, f"{name}: {parameter}"
        frozen = {parameter for parameter, _, _ in expected}
        for parameter, kind, optional in found[name]:
            assert parameter in frozen or optional or kind.startswith("VAR_"), (
                f"{name}: {parameter}"
            )
        in_order = [p for p, kind, _ in expected if kind.startswith("POSITIONAL")]
        assert [p for p, kind, _ in found[name] if kind.startswith("POSITIONAL")][
            : len(in_order)
        ] == in_order, name


@pytest.fixture(scope="module")
def flags_found():
    return flags()


@pytest.mark.parametrize("command", INTERFACE["flags"])
def test_commands_have_their_flags(flags_found, command):
    found = flags_found[command]
    assert len(INTERFACE["flags"][command]) >= 4
    for flag, expected in INTERFACE["flags"][command].items():
        assert flag in found, flag
        assert found[flag]["switch"] == expected["switch"], flag
        assert set(expected["choices"]) <= set(found[flag]["choices"]), flag
        assert found[flag]["help"] >= expected["help"], flag


# Of the paper's recipe; runs that were begun with the other value store it.
MENDED = {("super_resolution", "task.steps_per_epoch"): 2013}


@pytest.mark.parametrize("task", TASKS)
def test_configurations_have_their_fields_and_defaults(task):
    found = fields(task)
    for name, expected in INTERFACE["fields"][task].items():
        if (task, name) in MENDED:
            expected = {**expected, "default": MENDED[task, name]}
        assert found.get(name) == expected, name


def test_configurations_of_the_paper_are_there():
    found = {path.name for path in (ROOT / "experiments/configs").glob("*.py")}
    assert set(INTERFACE["configurations"]) <= found


# Networks


@pytest.fixture(scope="module")
def loaded():
    """Each saved network, read once."""
    return {
        name: dhp.load(FIXTURES / "networks" / name, build=Net if expected["build"] else None)
        for name, expected in NETWORKS.items()
    }


def test_every_saved_network_has_its_facts():
    assert {path.name for path in (FIXTURES / "networks").iterdir()} == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_is_read_bit_for_bit(loaded, name):
    stored = load_file(FIXTURES / "networks" / name / "arrays.safetensors")
    found = arrays(loaded[name])
    assert found.keys() == stored.keys()
    for path, array in stored.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].tobytes() == array.tobytes(), path


# Their FLOPs count elements of activations, as the paper's do. The fixtures' count biases instead.
RECOUNTED = ("srresnet_pruned", "edsr_pruned", "dncnn_pruned", "unet_pruned")
# What a network says of itself when it is saved again, and an older file leaves unsaid.
SAID = {"unet_pruned": {"batch_norm": True}}


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_computes_and_costs_the_same(loaded, name):
    expected = {key: value for key, value in NETWORKS[name].items() if key != "build"}
    found = facts(loaded[name], tuple(expected["input_shape"]))
    outputs = np.asarray(expected.pop("outputs"))
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01 * np.abs(outputs).max()  # it looks at them
    np.testing.assert_allclose(
        np.asarray(found.pop("outputs")), outputs, rtol=1e-5, atol=1e-5 * np.abs(outputs).max()
    )
    if name in RECOUNTED:
        found["cost"], expected["cost"] = (
            {"params": each["cost"]["params"]} for each in (found, expected)
        )
    assert found == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_network_is_written_as_it_was(loaded, tmp_path, name):
    there = FIXTURES / "networks" / name
    dhp.save(tmp_path / name, loaded[name], input_shape=tuple(NETWORKS[name]["input_shape"]))
    again, once = (folder / name / "arrays.safetensors" for folder in (tmp_path, there.parent))
    assert again.read_bytes() == once.read_bytes()
    again, once = (
        json.loads((folder / name / "model.json").read_text())
        for folder in (tmp_path, there.parent)
    )
    for description in (again, once):
        del description["provenance"]  # versions of packages
        if name in RECOUNTED:
            del description["cost"]["flops"]
    once["arguments"] |= SAID.get(name, {})
    again.pop("settings", None)  # which came later, and tell nothing of arrays
    assert again == once
