"""Artifacts from strangers: what is not exactly a network is refused, in one line and soon."""

import ast
import hashlib
import json
import os
from pathlib import Path
import pickle
import re
import shutil
import time

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Mixed, arrays, drawn_masks, filled, thin_resnet
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized

import dhp_jax as dhp
from dhp_jax.artifact import reading
from dhp_jax.artifact.arrays import ARRAYS, DESCRIPTION
from dhp_jax.artifact.description import ArtifactError
from dhp_jax.artifact.reading import read_description, verify
from dhp_jax.core.surgery import prune

LONGEST = 20  # seconds for what takes less than one on a machine that is busy
KERNEL = "stem.conv.kernel"
FIRST = "blocks.0.layers.0.conv.kernel"
BIAS = "classifier.bias"
ABSENT = object()


@pytest.fixture(scope="module")
def small():
    model = thin_resnet()
    return prune(model, drawn_masks(model, 0))


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "out"
    dhp.save(path, small, test_error=8.46)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(autouse=True)
def without_pickle(monkeypatch):
    """Whoever unpickles anything fails the test."""

    def unpickled(*args, **kwargs):
        pytest.fail("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, unpickled)
    monkeypatch.setattr(np, "load", unpickled)


def refused(path, reason, read=dhp.load, **arguments):
    """Reading raises an `ArtifactError` of one line soon, and the folder stays as it is."""
    before, start = listing(path), time.perf_counter()
    with pytest.raises(ArtifactError, match=reason) as raised:
        read(path, **arguments)
    assert time.perf_counter() - start < LONGEST
    message = str(raised.value)
    assert message.isprintable()  # one line, and nothing that a terminal would obey
    assert len(message) < 2000
    assert not hasattr(raised.value, "__notes__")  # JAX's remarks on tracebacks
    assert isinstance(raised.value, ValueError)
    assert listing(path) == before


def listing(path):
    """What lies in a folder: kinds, sizes, times of change, and the bytes of small files."""
    found = {}
    for item in sorted(path.rglob("*")):
        status = item.lstat()
        small_file = item.is_file() and status.st_size < 2**20
        found[item] = (
            *(status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns),
            item.read_bytes() if small_file else None,
        )
    return found


# Changes of a copy of a saved network


def described(path, **changes):
    """Changes fields of model.json."""
    description = {**json.loads((path / DESCRIPTION).read_text()), **changes}
    kept = {name: value for name, value in description.items() if value is not ABSENT}
    (path / DESCRIPTION).write_text(json.dumps(kept))


def field(name, value):
    return lambda path: described(path, **{name: value})


def argument(**changes):
    """Changes some of the arguments."""

    def tamper(path):
        arguments = json.loads((path / DESCRIPTION).read_text())["arguments"]
        described(path, arguments={**arguments, **changes})

    return tamper


def hostile(family, **arguments):
    """Another family and all of its arguments."""
    return lambda path: described(path, family=family, arguments=arguments, survivors=None)


def part(name, change):
    """Changes an object in model.json in place."""

    def tamper(path):
        value = json.loads((path / DESCRIPTION).read_text())[name]
        change(value)
        described(path, **{name: value})

    return tamper


def survivors(**changes):
    return part("survivors", lambda found: found.update(changes))


def entry(name, **changes):
    """Changes what model.json tells of an array."""
    return part("arrays", lambda found: found[name].update(changes))


def text(before, after):
    """Replaces a piece of model.json."""

    def tamper(path):
        content = (path / DESCRIPTION).read_text()
        assert before in content
        (path / DESCRIPTION).write_text(content.replace(before, after, 1))

    return tamper


def stored(path, content):
    """Replaces arrays.safetensors, and tells its digest."""
    (path / ARRAYS).write_bytes(content)
    described(path, sha256=hashlib.sha256(content).hexdigest())


def swapped(change, *, told=True):
    """Changes the arrays; model.json tells of them as they are now, or the digest only."""

    def tamper(path):
        found = load_file(path / ARRAYS)
        change(found)
        stored(path, serialized(found))
        if told:
            table = {
                name: {"shape": list(array.shape), "dtype": str(array.dtype)}
                for name, array in found.items()
            }
            described(path, arrays=table)

    return tamper


def with_entry(name, value):
    """An array whose first number is another."""

    def change(found):
        found[name] = found[name].copy()
        found[name].flat[0] = value

    return swapped(change)


def header(change):
    """Changes the header of arrays.safetensors, in place or by what `change` returns."""

    def tamper(path):
        content = (path / ARRAYS).read_bytes()
        size = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + size])
        changed = change(found)
        encoded = json.dumps(found if changed is None else changed).encode()
        data = content[8 + size :]
        stored(path, len(encoded).to_bytes(8, "little") + encoded + data)

    return tamper


def offsets(name, by):
    """Moves where the bytes of an array are said to lie."""

    def change(found):
        begin, end = found[name]["data_offsets"]
        found[name]["data_offsets"] = [begin + by[0], end + by[1]]

    return header(change)


def file(name, content):
    """Replaces the content of a file."""
    return lambda path: (path / name).write_bytes(content)


def cut(name, share):
    def tamper(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(share * len(content))])

    return tamper


def longer(name, size):
    """Makes a file longer by zeros that take no room on the disk."""
    return lambda path: os.truncate(path / name, size)


def link(name, elsewhere):
    """A link in place of a file, to the same content elsewhere."""

    def tamper(path):
        target = path / elsewhere
        (path / name).rename(target)
        (path / name).symlink_to(target)

    return tamper


def in_place_of(name, make):
    def tamper(path):
        (path / name).unlink()
        make(path / name)

    return tamper


def doubled_header(path):
    """The header of arrays.safetensors names an array twice."""
    content = (path / ARRAYS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    first = json.loads(content[8 : 8 + size])[BIAS]
    encoded = content[8 : 8 + size].rstrip()[:-1] + f',"{BIAS}":{json.dumps(first)}}}'.encode()
    stored(path, len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])


def nested(depth):
    return b'{"notes":' + b"[" * depth + b"]" * depth + b"}"


GONE = "^path: expected a folder with model.json and arrays.safetensors, got "
NO_FILE = "expected a file, got something else$"
LINKED = "expected a file, got a link$"
NOT_JSON = "^path: .*model.json is not JSON: "
TOO_DEEP = "holds lists or objects more than 32 deep$"
HEADER = "^path: .*arrays.safetensors cannot be read: ['\"]Error while deserializing header: "
BYTES = f"{HEADER}incomplete metadata, file not fully covered'$"
NO_NETWORK = "^path: .*model.json: arguments: "
MORE_LAYERS = f"{NO_NETWORK}expected a network of the arrays in the file, got one of more layers$"
OFFSETS = f"{HEADER}invalid offset for tensor "
SHAPE = f"{HEADER}invalid shape, data type, or offset for tensor"
JSON = f"{HEADER}invalid JSON in header: "
NOT_FINITE = "expected finite numbers, got NaN or infinity$"


def unlike(name, expected, found):
    """How an array is refused that is not like the one that is expected."""
    expected, found = re.escape(expected), re.escape(found)
    return f"^path: array '{name}' in .*arrays.safetensors: expected {expected}, got {found}$"


def not_rising(shown):
    """How survivors of the image's channels are refused that are no rising indices."""
    expected = "at least one index, each above the one before, below 1048576"
    return re.escape(f"model.json: survivors['image']: expected {expected}, got {shown}") + "$"


def told_wrong(what, expected):
    """How is refused what model.json tells of an array."""
    return re.escape(f"model.json: arrays['classifier.bias']{what}: expected {expected}")


TEN = "float32 of shape [10]"

KINDS = {
    # Files
    "no model.json": (lambda path: (path / DESCRIPTION).unlink(), GONE),
    "no arrays.safetensors": (lambda path: (path / ARRAYS).unlink(), GONE),
    "model.json links outside": (link(DESCRIPTION, "../elsewhere"), f"model.json: {LINKED}"),
    "arrays link outside": (link(ARRAYS, "../elsewhere"), f"arrays.safetensors: {LINKED}"),
    "arrays link inside": (link(ARRAYS, "beside"), f"arrays.safetensors: {LINKED}"),
    "model.json links to itself": (
        in_place_of(DESCRIPTION, lambda path: path.symlink_to(path)),
        f"model.json: {LINKED}",
    ),
    "model.json is a pipe": (in_place_of(DESCRIPTION, os.mkfifo), f"model.json: {NO_FILE}"),
    "arrays are a pipe": (in_place_of(ARRAYS, os.mkfifo), f"arrays.safetensors: {NO_FILE}"),
    "model.json is a folder": (in_place_of(DESCRIPTION, Path.mkdir), f"model.json: {NO_FILE}"),
    # JSON
    "empty model.json": (file(DESCRIPTION, b""), NOT_JSON),
    "half of model.json": (cut(DESCRIPTION, 0.5), NOT_JSON),
    "model.json is a pickle": (file(DESCRIPTION, b"\x80\x04K\x01."), f"{NOT_JSON}'utf-8' codec"),
    "model.json of UTF-16": (
        lambda path: (path / DESCRIPTION).write_text((path / DESCRIPTION).read_text(), "utf-16"),
        f"{NOT_JSON}'utf-8' codec",
    ),
    "model.json is a list": (file(DESCRIPTION, b"[1, 2]"), "model.json holds no JSON object$"),
    "a name twice": (
        text('"version": 1', '"version": 1, "version": 1'),
        f"{NOT_JSON}the name 'version' comes twice in an object$",
    ),
    "NaN in the notes": (text("8.46", "NaN"), f"{NOT_JSON}NaN is no number$"),
    "infinity in the notes": (text("8.46", "-Infinity"), f"{NOT_JSON}-Infinity is no number$"),
    "a number beyond float64": (text("8.46", "1e999"), f"{NOT_JSON}1e999 is no number that can "),
    "an integer of a million digits": (
        text("8.46", "9" * 10**6),
        f"{NOT_JSON}an integer of 1000000 digits$",
    ),
    "lists 40 deep": (file(DESCRIPTION, nested(40)), f"model.json {TOO_DEEP}"),
    "lists a million deep": (file(DESCRIPTION, nested(10**6)), f"model.json {TOO_DEEP}"),
    "a terabyte of model.json": (
        longer(DESCRIPTION, 2**40),
        "model.json: expected at most 16777216 bytes, got more$",
    ),
    # Fields
    "another format": (field("format", "other"), "got 'other' version 1 in .*model.json$"),
    "no format": (field("format", ABSENT), "got None version 1 in .*model.json$"),
    "another version": (field("version", 2), "format 'dhp_jax' version 1, got 'dhp_jax' version 2"),
    "a version that is true": (field("version", True), "got 'dhp_jax' version True in "),
    "an endless format": (field("format", "x" * 10**6), r"got 'x+\.\.\.x+' version 1 in "),
    "no family": (field("family", ABSENT), "model.json lacks 'family'$"),
    "no survivors": (field("survivors", ABSENT), "model.json lacks 'survivors'$"),
    "no digest": (
        field("sha256", ABSENT),
        "model.json lacks 'sha256': it was written by an earlier version .* the network again$",
    ),
    "an unknown field": (field("code", "x"), "holds an unknown field 'code'; expected format, "),
    "an unknown field of two lines": (field("a\nb", "x"), r"holds an unknown field 'a\\nb'; "),
    "settings of no modules": (
        field("settings", [{"values": {}}]),
        "settings: expected modules, and texts of what they hold by name, got {'values': {}}$",
    ),
    "a setting of two lines": (
        field("settings", [{"modules": ["conv"], "values": {"act": "relu\n"}}]),
        "settings: expected modules, and texts of what they hold by name, got ",
    ),
    "a setting that is no text": (
        field("settings", [{"modules": ["conv"], "values": {"strides": 2}}]),
        "settings: expected modules, and texts of what they hold by name, got ",
    ),
    "notes of another type": (field("notes", [1]), r"notes: expected an object, got \[1\]$"),
    "survivors of another type": (
        field("survivors", [1]),
        r"survivors: expected an object or null, got \[1\]$",
    ),
    "a digest that is none": (
        field("sha256", "../x"),
        "sha256: expected 64 hexadecimal digits, got '../x'$",
    ),
    "another digest": (
        field("sha256", "0" * 64),
        "arrays.safetensors is not what was saved: expected SHA-256 0{64}, got [0-9a-f]{64}$",
    ),
    # The family and its arguments
    "an unknown family": (
        field("family", "resnot"),
        "family: expected one of .*; got 'resnot'; did you mean 'resnet'",
    ),
    "a family that is a path": (field("family", "../evil"), "family: expected one of .*; got '../"),
    "a family of its own": (field("family", None), r"expected load\(path, build=...\) with a "),
    "an unknown argument": (argument(wdith=1), f"{NO_NETWORK}wdith: unknown argument.*'width'"),
    "no argument": (field("arguments", {}), f"{NO_NETWORK}depth: expected a value, got none$"),
    "an argument that is refused": (argument(depth=21), f"{NO_NETWORK}depth: .*, got 21$"),
    "generators among the arguments": (argument(rngs=1), f"{NO_NETWORK}.*'rngs'$"),
    "an argument of two lines": (
        argument(**{"a\nb": 1}),
        r"arguments: expected names of arguments, got 'a\\nb'$",
    ),
    "an argument that is an object": (
        argument(depth={}),
        "arguments.depth: expected null, true, false, a number of at most 1048576, .*, got {}$",
    ),
    "an argument of another type": (argument(min_channels="4"), f"{NO_NETWORK}min_channels: "),
    "an argument that is a list": (hostile("vgg", depth=[16]), NO_NETWORK),
    "a dtype of objects": (argument(dtype="object"), f"{NO_NETWORK}dtype: .*'object'$"),
    "a dtype of a gigabyte": (argument(dtype="V1000000000"), f"{NO_NETWORK}dtype: "),
    "10**12 classes": (argument(num_classes=10**12), "num_classes: .*, got 1000000000000$"),
    "a width beyond all": (argument(width=1e9), r"arguments.width: .*, got 1000000000\.0$"),
    "a large width": (argument(width=2**20), f"{NO_NETWORK}width: "),
    "many groups": (
        hostile("resnet", depth=50, groups=2**12, group_width=2**12),
        f"{NO_NETWORK}group_width: ",
    ),
    "many channels": (hostile("edsr", scale=2, channels=2**20), f"{NO_NETWORK}channels: "),
    "many features": (hostile("srresnet", scale=2, features=2**20), f"{NO_NETWORK}features: "),
    "many blocks": (hostile("edsr", scale=2, blocks=2**20), f"{NO_NETWORK}blocks: "),
    "10**9 blocks": (
        hostile("srresnet", scale=2, blocks=10**9),
        "blocks: .*, got 1000000000$",
    ),
    "more blocks than arrays": (hostile("edsr", scale=2, blocks=256), MORE_LAYERS),
    "a deep chain": (hostile("dncnn", depth=2**20), f"{NO_NETWORK}depth: "),
    "a chain of more layers than arrays": (hostile("dncnn", depth=200), MORE_LAYERS),
    "a concatenation of more than arrays": (hostile("densenet", depth=199), MORE_LAYERS),
    "a deep U-Net": (hostile("unet", depth=2**20), f"{NO_NETWORK}depth: "),
    "another network": (
        hostile("vgg"),
        "holds an unexpected array 'blocks.0.layers.0.conv.kernel'$",
    ),
    "other classes than arrays": (
        argument(num_classes=11),
        unlike(BIAS, "float32 of shape [11]", TEN),
    ),
    # Survivors
    "an unknown latent": (survivors(**{"blocks.99": [0]}), "unexpected latent 'blocks.99'$"),
    "a latent that is missing": (
        part("survivors", lambda found: found.pop("stages.1")),
        "survivors: lacks latent 'stages.1'$",
    ),
    "no latents": (field("survivors", {}), "survivors: lacks latent "),
    "survivors of a network without any": (field("survivors", None), "lacks array "),
    "no survivor": (survivors(image=[]), not_rising("[]")),
    "a survivor below 0": (survivors(image=[-1, 0]), not_rising("[-1, 0]")),
    "a survivor beyond the latent": (
        survivors(**{"stages.1": [0, 8]}),
        r"survivors\['stages.1'\]: expected indices below 8, got \[0, 8\]$",
    ),
    "a latent that may not be pruned": (
        survivors(image=[0, 1]),
        r"survivors\['image'\]: expected all indices below 3, got \[0, 1\]$",
    ),
    "more latents than a network has": (
        field("survivors", {str(i): [0] for i in range(2**14 + 1)}),
        "survivors: expected at most 16384 latents, got 16385$",
    ),
    "a survivor beyond memory": (survivors(image=[10**12]), not_rising("[1000000000000]")),
    "a survivor twice": (survivors(image=[0, 1, 1]), not_rising("[0, 1, 1]")),
    "survivors out of order": (survivors(image=[0, 2, 1]), not_rising("[0, 2, 1]")),
    "a survivor that is no integer": (survivors(image=[0, 1.0]), not_rising("[0, 1.0]")),
    "a survivor that is true": (survivors(image=[False, True]), not_rising("[False, True]")),
    "survivors in an object": (survivors(image={"0": 1}), not_rising("{'0': 1}")),
    "other survivors than arrays": (
        survivors(**{"stages.0": [0, 1]}),
        unlike(FIRST, "float32 of shape [3, 3, 2, 2]", "float32 of shape [3, 3, 3, 2]"),
    ),
    # What model.json tells of the arrays
    "an array that is told of only": (
        part("arrays", lambda found: found.update(extra={"shape": [1], "dtype": "float32"})),
        "arrays.safetensors lacks array 'extra'$",
    ),
    "an array that is not told of": (
        part("arrays", lambda found: found.pop(BIAS)),
        "arrays.safetensors holds an unexpected array 'classifier.bias'$",
    ),
    "another shape than told": (entry(BIAS, shape=[9]), unlike(BIAS, "float32 of shape [9]", TEN)),
    "another dtype than told": (
        entry(BIAS, dtype="int32"),
        unlike(BIAS, "int32 of shape [10]", TEN),
    ),
    "an unknown dtype": (entry(BIAS, dtype="object"), told_wrong(".dtype", "one of bool, ")),
    "a dtype that is a list": (entry(BIAS, dtype=["f4"]), told_wrong(".dtype", "one of bool, ")),
    "a negative size": (entry(BIAS, shape=[-1]), told_wrong(".shape", "a list of at most 32 ")),
    "a size that is a float": (entry(BIAS, shape=[10.0]), told_wrong(".shape", "a list of at ")),
    "99 axes": (
        entry(BIAS, shape=[1] * 1000),
        told_wrong(".shape", "a list of at most 32 "),
    ),
    "an array of a terabyte": (
        entry(BIAS, shape=[2**38]),
        "arrays: expected at most 4294967296 bytes together, got 10995116",
    ),
    "more than is told of an array": (entry(BIAS, code="x"), told_wrong("", "an object of shape")),
    "too many arrays": (
        field("arrays", {str(i): {"shape": [], "dtype": "bool"} for i in range(2**14 + 1)}),
        "arrays: expected at most 16384 arrays, got 16385$",
    ),
    # The file of arrays
    "no arrays": (file(ARRAYS, b""), f"{HEADER}header too small'$"),
    "half of the arrays": (cut(ARRAYS, 0.5), BYTES),
    "a terabyte of arrays": (longer(ARRAYS, 2**40), BYTES),
    "arrays are a pickle": (
        lambda path: stored(path, pickle.dumps(list(range(1000)))),
        f"{HEADER}header too large'$",
    ),
    "a header beyond the file": (
        lambda path: stored(path, b"\xff" * 8 + (path / ARRAYS).read_bytes()[8:]),
        f"{HEADER}header too large'$",
    ),
    "a header that is not JSON": (
        lambda path: stored(path, (2).to_bytes(8, "little") + b"{]"),
        f"{JSON}key must be a string ",
    ),
    "a header that is a list": (header(lambda found: [found]), f"{JSON}invalid type: sequence, "),
    "a header that is deep": (
        header(lambda found: {"a": json.loads("[" * 50 + "]" * 50)}),
        f"{JSON}invalid type: sequence, ",
    ),
    "an array twice": (
        doubled_header,
        "its header is not JSON: the name 'classifier.bias' comes twice in an object$",
    ),
    "an array that overlaps": (offsets(BIAS, (-4, -4)), OFFSETS),
    "an array beyond the file": (offsets(BIAS, (10**9, 10**9)), OFFSETS),
    "an array of fewer bytes": (offsets(BIAS, (0, -4)), SHAPE),
    "an array before the file": (
        header(lambda found: found[BIAS].update(data_offsets=[-40, 0])),
        f"{JSON}invalid value: integer `-40`, expected usize ",
    ),
    "bytes of no array": (
        lambda path: stored(path, (path / ARRAYS).read_bytes() + b"MZ"),
        BYTES,
    ),
    "remarks in the header": (
        header(lambda found: found.update(__metadata__={"a": "b"})),
        "holds an unexpected array '__metadata__'$",
    ),
    "a code that is unknown": (
        header(lambda found: found[BIAS].update(dtype="F4")),
        f"{JSON}|{SHAPE}",
    ),
    "a code that is no text": (
        header(lambda found: found[BIAS].update(dtype=["F32"])),
        f"{JSON}invalid type: sequence, ",
    ),
    "a size in the header that is a float": (
        header(lambda found: found[BIAS].update(shape=[10.0])),
        f"{JSON}invalid type: floating point `10.0`, expected usize ",
    ),
    # Arrays, told of as they are
    "a missing array": (swapped(lambda a: a.pop(KERNEL)), "lacks array 'stem.conv.kernel'; the cl"),
    "an extra array": (
        swapped(lambda a: a.update(extra=np.ones(2))),
        "holds an unexpected array 'extra'$",
    ),
    "an array by the name of a path": (
        swapped(lambda a: a.update({"../../etc/passwd": np.ones(2)})),
        "holds an unexpected array '../../etc/passwd'$",
    ),
    "an array by a name of two lines": (
        swapped(lambda a: a.update({"a\nb": np.ones(2)})),
        r"arrays: expected names of at most 1024 characters, got 'a\\nb'$",
    ),
    "an array of another shape": (
        swapped(lambda a: a.update({BIAS: np.ones(9, np.float32)})),
        unlike(BIAS, TEN, "float32 of shape [9]"),
    ),
    "an array of another rank": (
        swapped(lambda a: a.update({BIAS: np.ones((10, 1), np.float32)})),
        unlike(BIAS, TEN, "float32 of shape [10, 1]"),
    ),
    "an array of another float than the description tells": (
        swapped(lambda a: a.update({BIAS: np.ones(10, np.float16)}), told=False),
        unlike(BIAS, TEN, "float16 of shape [10]"),
    ),
    "an array of integers": (
        swapped(lambda a: a.update({BIAS: np.ones(10, np.int32)})),
        unlike(BIAS, TEN, "int32 of shape [10]"),
    ),
    "two arrays that are exchanged": (
        swapped(lambda a: a.update({BIAS: a[KERNEL], KERNEL: a[BIAS]}), told=False),
        unlike(BIAS, TEN, "float32 of shape [3, 3, 3, 3]"),
    ),
    "NaN": (with_entry(KERNEL, np.nan), f"array '{KERNEL}' in .*: {NOT_FINITE}"),
    "infinity": (with_entry(BIAS, -np.inf), f"array '{BIAS}' in .*: {NOT_FINITE}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tampered_with_is_refused(copy, kind):
    tamper, reason = KINDS[kind]
    tamper(copy)
    refused(copy, reason)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        for read in (dhp.load, verify, read_description):
            with pytest.raises(ArtifactError, match=GONE):
                read(path)


def test_a_folder_may_be_a_link(saved, small, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    np.testing.assert_array_equal(arrays(dhp.load(tmp_path / "link"))[BIAS], arrays(small)[BIAS])


def test_a_file_that_is_cut_short_anywhere_is_refused(copy):
    for name in (DESCRIPTION, ARRAYS):
        content = (copy / name).read_bytes()
        lengths = {*range(12), *range(12, len(content), 97), *range(len(content) - 4, len(content))}
        for length in lengths:
            (copy / name).write_bytes(content[:length])
            refused(copy, "^path: .*(is not JSON|cannot be read): ")
        (copy / name).write_bytes(content)
    dhp.load(copy)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    name=st.sampled_from([DESCRIPTION, ARRAYS]),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    values=st.lists(st.one_of(st.sampled_from(b'019".-e[]{}'), st.integers(0, 255)), min_size=1),
    length=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_other_bytes_are_refused_or_change_no_array(
    saved, small, tmp_path_factory, name, places, values, length
):
    path = shutil.copytree(saved, tmp_path_factory.mktemp("bytes") / "copy")
    content = bytearray((path / name).read_bytes())
    for place, value in zip(places, values, strict=False):
        content[place % len(content)] = value
    if length is not None:
        del content[length % len(content) :]
    (path / name).write_bytes(content)
    try:
        loaded = arrays(dhp.load(path))
    except ArtifactError:
        return
    finally:
        shutil.rmtree(path)
    expected = arrays(small)
    assert loaded.keys() == expected.keys()
    for array, bits in expected.items():
        assert loaded[array].tobytes() == bits.tobytes()


# Checks without the network, and networks of one's own


def test_verify_tells_what_model_json_says(saved):
    description = verify(saved)
    assert description == read_description(saved)
    assert description["notes"] == {"test_error": 8.46}


@pytest.mark.parametrize(
    "kind", ["another digest", "half of the arrays", "a survivor twice", "an extra array"]
)
def test_verify_refuses_all_but_what_takes_building_the_network(copy, kind):
    tamper, reason = KINDS[kind]
    tamper(copy)
    if kind == "an extra array":  # the files agree with each other
        verify(copy)
    else:
        refused(copy, reason, verify)


class Other(nnx.Module):
    """A network without latents."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Other, "survivors: holds an unexpected latent 'join.z_out'$"),
        (
            lambda rngs: None,
            "^build: expected a function .* an nnx.Module; got .*: it returns None$",
        ),
    ],
)
def test_a_function_that_builds_another_network_is_refused(tmp_path, build, reason):
    model = filled(Mixed)
    dhp.save(tmp_path / "pruned", prune(model, drawn_masks(model, 0)))
    refused(tmp_path / "pruned", reason, build=build)


def test_a_function_that_builds_a_network_of_other_arrays_is_refused(tmp_path, copy):
    dhp.save(tmp_path / "whole", filled(Mixed))
    refused(tmp_path / "whole", "holds an unexpected array 'classifier.bias'$", build=Other)
    refused(copy, "survivors: ", build=Mixed)


def test_a_network_of_ones_own_is_checked_as_others_are(tmp_path):
    dhp.save(tmp_path, filled(Mixed))
    with_entry(BIAS, np.inf)(tmp_path)
    refused(tmp_path, "'classifier.bias' .*: expected finite numbers, got NaN or", build=Mixed)


def test_what_reads_artifacts_imports_nothing_that_runs_code_from_files():
    folder = Path(reading.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] if _imports(node) else []
            names.append(getattr(node, "module", None) or "")
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def _imports(node):
    return isinstance(node, ast.Import | ast.ImportFrom)
