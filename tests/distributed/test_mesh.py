"""Several devices, several processes: the same losses and survivors as on one device."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

from dhp_jax.distributed import processes as sharing
from dhp_jax.distributed.mesh import (
    arrange,
    axis_sizes,
    check_divisible,
    gather,
    keep_placement,
    local_rows,
    make_mesh,
    place,
    shard_batch,
)
from dhp_jax.distributed.preemption import EXIT_CODE
from dhp_jax.distributed.processes import ProcessError, Turns, from_first, join
from dhp_jax.errors import ConfigError
from dhp_jax.workdir import metrics as workdir_metrics

CONFIG = ROOT / "tests/support/mesh_config.py"
BOUND = 60  # seconds within which a process ends when another one has died
STREAMED = {"data.streamed": True, "data.workers": 0}  # each process reads its share
MOST = 2 / 240  # of an error: examples that rounding may move to another label
COMPARED = ("loss", "error", "test_loss", "test_error", "flops_ratio", "params_ratio")


def flags_of(devices):
    """XLA's flags of this process and simulated devices."""
    before = os.environ.get("XLA_FLAGS", "")
    return f"{before} --xla_force_host_platform_device_count={devices}"


def begin(workdir, *options, devices=1, **fields):
    """A run of the small network, begun as a process with simulated devices."""
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "experiments/main.py"), f"--config={CONFIG}"),
            *(f"--workdir={workdir}", *arguments, *options),
        ],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": flags_of(devices),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def begin_pair(workdir, **fields):
    """The same run, begun as two processes on this machine."""
    together = f"--coordinator={free_address()}", "--processes=2"
    # Only the first sees the directory.
    places = workdir, workdir.with_name("nothing")
    return [begin(place, *together, f"--process={i}", **fields) for i, place in enumerate(places)]


def end(process, timeout=300):
    """The exit code of a process that ends by itself, and its lines on standard error."""
    try:
        _, told = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, told.splitlines()


def finish(*processes):
    for code, told in [end(process) for process in processes]:
        assert code == 0, told


def wait_for(processes, ready):
    while not ready():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def records(workdir):
    return workdir_metrics.read(workdir / workdir_metrics.RECORDS)


def survivors(workdir):
    return json.loads((workdir / "pruned/model.json").read_text())["survivors"]


def check_same(workdir, expected):
    """Two runs have the same records up to rounding, and prune the same channels."""
    once, again = records(expected), records(workdir)
    assert [(r["phase"], r["step"]) for r in again] == [(r["phase"], r["step"]) for r in once]
    for a, b in zip(again, once, strict=True):
        for name in COMPARED:
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=MOST * ("error" in name)), (
                    a["phase"],
                    a["step"],
                    name,
                )
    assert survivors(workdir) == survivors(expected)
    assert sum(map(len, survivors(expected).values())) > 0


RECIPE = {
    **{"optimizer.decayed": "kernels", "optimizer.clip": 1.0},
    **{"optimizer.average": 0.9, "data.mixup": 0.2, "data.cutout": 3},
    **{"task.label_smoothing": 0.1, "converge.schedule": "cosine", "converge.warmup": 0.5},
}


@pytest.mark.slow
def test_a_recipe_is_the_same_on_four_devices(tmp_path):
    runs = [begin(tmp_path / str(n), devices=n, **{"mesh.data": n}, **RECIPE) for n in (1, 4)]
    finish(*runs)
    check_same(tmp_path / "4", tmp_path / "1")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The directory of a run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(begin(workdir))
    return workdir


@pytest.mark.slow
def test_four_devices_give_the_losses_and_survivors_of_one(one, tmp_path):
    finish(begin(tmp_path / "run", devices=4))
    check_same(tmp_path / "run", one)


@pytest.mark.slow
def test_divided_hypernetworks_and_streamed_data_give_those_of_replicated_ones(one, tmp_path):
    finish(begin(tmp_path / "run", devices=4, **{"mesh.data": 2, "mesh.model": 2}, **STREAMED))
    check_same(tmp_path / "run", one)


TRAINED = """
import sys
_, workdir, *folders = sys.argv
sys.path[:0] = folders
import dataclasses
from pathlib import Path
import jax
import numpy as np
from flax import nnx
import dhp_jax as dhp
from dhp_jax.distributed.mesh import gather, make_mesh, place
from dhp_jax.errors import ConfigError
from dhp_jax.train.phase import Teacher
from dhp_jax.pipeline.preparation import prepare
from networks import arrays, filled
from runs import of_digits
from test_checkpoints import SHAPE, Net, phase_of, recipe, trained
from test_train import EXAMPLES, streamed_labelled
jax.config.update("jax_disable_most_optimizations", True)
net = filled(Net)
traced = dhp.with_latents(dhp.prune(net), SHAPE, embedding=2)
placed = place(make_mesh(2, 2), nnx.to_pure_dict(nnx.state(traced, nnx.Param)))
for name, array in placed["conv"]["kernel"].items():
    assert array.addressable_data(0).shape == (*array.shape[:-1], array.shape[-1] // 2), name
streamed = streamed_labelled(EXAMPLES, 0)
teacher = Teacher(dhp.prune(net), 0.5, 2.0)
for model, phase, ways in [
    (net, phase_of(net, True), [(make_mesh(2, 2), streamed)]),
    (traced, dataclasses.replace(recipe(average=0.8), teacher=teacher), [(make_mesh(2, 2), None)]),
]:
    expected, once = trained(model, phase)
    for mesh, data in ways:
        assert mesh.size == 4
        found, again = trained(model, phase, mesh=mesh, data=data)
        assert [*map(list, again.records)] == [*map(list, once.records)]
        for a, b in zip(again.records, once.records):
            numbers = [name for name in b if name != "phase"]
            assert a["phase"] == b["phase"]
            np.testing.assert_allclose(
                [a[n] for n in numbers], [b[n] for n in numbers], rtol=1e-3, err_msg=str((mesh, b))
            )
        for name in ("model", "best_model"):
            ours, theirs = arrays(getattr(found, name)), arrays(getattr(expected, name))
            assert ours.keys() == theirs.keys()
            for path, array in theirs.items():
                np.testing.assert_allclose(ours[path], array, rtol=1e-3, atol=1e-4, err_msg=path)
try:
    prepare(of_digits(batch_size=66), workdir)
except ConfigError as error:
    assert str(error).startswith("config.batch_size: expected a multiple of 4"), error
    assert not Path(workdir).exists()
else:
    raise AssertionError("66 examples are no batch of 4 devices")
run = prepare(of_digits(**{"mesh.data": 2, "mesh.model": 2}), workdir)
assert dict(run.mesh.shape) == {"data": 2, "model": 2}
# Hypernetworks and their momentum are divided along output channels, where that works.
shapes = {"trace": {"w2": (3, 3, 8, 4, 6)}, "odd": {"w2": (8, 4, 5)}, "kernel": (4, 6)}
tree = jax.tree.map(np.ones, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
placed = place(make_mesh(2, 2), tree)
here = jax.tree.map(lambda array: array.addressable_data(0).shape, placed)
assert here == shapes | {"trace": {"w2": (3, 3, 8, 4, 3)}}, here
assert jax.tree.map(np.shape, gather(placed)) == shapes
"""


def test_training_on_a_mesh_gives_the_records_and_the_networks_of_one_device(tmp_path):
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_of(4)}
    folders = [str(ROOT / "tests" / name) for name in ("support", "train")]
    arguments = [sys.executable, "-c", TRAINED, str(tmp_path / "run"), *folders]
    subprocess.run(arguments, env=os.environ | flags, check=True)


@pytest.mark.slow
def test_two_processes_give_the_losses_and_survivors_of_one_and_the_first_writes(one, tmp_path):
    finish(*begin_pair(tmp_path / "run"))
    check_same(tmp_path / "run", one)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_ends_and_both_go_on_when_started_again(
    victim, one, tmp_path
):
    workdir = tmp_path / "run"
    pair = begin_pair(workdir, **STREAMED)
    wait_for(pair, lambda: (workdir / "checkpoints/search").is_dir() and len(records(workdir)) > 3)
    pair[victim].send_signal(signal.SIGKILL)
    died = time.monotonic()
    code, told = end(pair[1 - victim], BOUND)
    assert code not in (0, EXIT_CODE)
    assert time.monotonic() - died < BOUND
    assert any("one of them may have died" in t or "another task died" in t for t in told), told
    end(pair[victim])
    finish(*begin_pair(workdir, **STREAMED))
    check_same(workdir, one)


@pytest.mark.slow
def test_when_any_process_is_told_to_end_all_stop_after_the_same_step(one, tmp_path):
    workdir = tmp_path / "run"
    pair = begin_pair(workdir)
    wait_for(pair, lambda: (workdir / "checkpoints/search").is_dir())
    pair[1].send_signal(signal.SIGTERM)
    (first, told), (second, others) = [end(process) for process in pair]
    assert first == second == EXIT_CODE
    assert told[-1] == others[-1]
    assert re.search(r"stopped after step \d+; the same command goes on", told[-1])
    finish(begin(workdir))  # on one device
    check_same(workdir, one)


@pytest.mark.parametrize(
    ("asked", "devices", "expected"),
    [
        ((-1, 1), 1, (1, 1)),
        ((-1, 1), 4, (4, 1)),
        ((-1, 2), 4, (2, 2)),
        ((2, 1), 4, (2, 1)),
        ((1, 1), 4, (1, 1)),
    ],
)
def test_the_axes_of_the_mesh_share_the_devices(asked, devices, expected):
    assert axis_sizes(*asked, devices) == expected


@pytest.mark.parametrize(
    ("asked", "processes", "told"),
    [
        ((-1, 3), 1, "config.mesh.model: .* divisor of 4, .* such as 2 or 4; got 3"),
        ((-1, 8), 1, "config.mesh.model: .* divisor of 4, .* such as 4; got 8"),
        ((8, 1), 1, "config.mesh.data: expected at most 4, .* or -1 for all; got 8"),
        ((3, 2), 1, "config.mesh.data: expected at most 2, .*config.mesh.model=2, .*; got 3"),
        ((2, 1), 2, "config.mesh.data: expected 4, as there are 4 devices, .*; got 2"),
    ],
)
def test_a_mesh_that_the_devices_cannot_make_is_refused_with_what_works(asked, processes, told):
    with pytest.raises(ConfigError, match=told):
        axis_sizes(*asked, 4, processes)


@pytest.mark.parametrize(
    ("batch", "data", "told"),
    [
        (64, 3, "config.batch_size: .* multiple of 3, .* 63 or 66; got 64, .*config.mesh.data=2"),
        (3, 4, "config.batch_size: .* multiple of 4, .* such as 4; got 3, .*config.mesh.data=3"),
    ],
)
def test_a_batch_that_the_mesh_cannot_divide_is_refused_with_what_works(batch, data, told):
    with pytest.raises(ConfigError, match=told):
        check_divisible(batch, data)


def test_several_processes_are_not_told_of_a_mesh_that_leaves_devices_out():
    with pytest.raises(ConfigError, match=r"multiple of 8, .* such as 56 or 64; got 60$"):
        check_divisible(60, 8, processes=2)


@pytest.mark.slow
def test_wrong_meshes_are_told_in_one_line_before_any_work(tmp_path):
    process = begin(tmp_path / "run", devices=3, batch_size=64)
    code, told = end(process)
    assert code == 2
    (line,) = told
    assert line.startswith("error: config.batch_size: expected a multiple of 3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("10.0.0.1:80", 2, None), "--process: expected together with"),
        ((None, 2, 0), "--coordinator: expected together with"),
        (("10.0.0.1", 2, 0), "--coordinator: expected host:port, .* got '10.0.0.1'"),
        (("10.0.0.1:80", 0, 0), "--processes: expected at least 1; got 0"),
        (("10.0.0.1:80", 2, 2), "--process: expected 0 to 1; got 2"),
    ],
)
def test_processes_that_cannot_be_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        join(*arguments)


def test_one_device_has_no_mesh_and_nothing_is_added_to_its_program():
    assert make_mesh(1, 1) is None
    tree = {"w1": jnp.ones((2, 4))}
    assert place(None, tree) is tree
    assert gather(tree)["w1"] is tree["w1"]
    step = jax.make_jaxpr(lambda tree: keep_placement(None, shard_batch(None, tree)))
    assert not step(tree).eqns


class Device(SimpleNamespace):
    """What JAX tells of a device that is not here."""

    __hash__ = object.__hash__


def tpus(across, down, host=(1, 1), here=0):
    """The devices of a TPU v5e, host by host, as JAX tells them to the process `here`."""
    client = SimpleNamespace(process_index=lambda: here)
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0, "client": client}
    hosts = [(x, y) for y in range(0, down, host[1]) for x in range(0, across, host[0])]
    places = [
        {"process_index": process, "coords": (x + dx, y + dy, 0)}
        for process, (x, y) in enumerate(hosts)
        for dy in range(host[1])
        for dx in range(host[0])
    ]
    return [Device(id=i, **place, **kind) for i, place in enumerate(places)]


def gpus(hosts, each):
    """The devices of hosts with GPUs, which are numbered host by host from the last one."""
    kind = {"platform": "gpu", "device_kind": "NVIDIA H200"}
    return [
        Device(id=(hosts - 1 - host) * each + i, slice_index=hosts - 1 - host, **kind)
        for host in range(hosts)
        for i in range(each)
    ]


@pytest.mark.parametrize("process", [0, 13, 31])
def test_a_host_of_a_tpu_slice_reads_the_rows_of_its_devices_and_no_more(process):
    devices = arrange(tpus(16, 16, host=(4, 2), here=process), (256, 1))
    (places,) = np.nonzero([device.process_index == process for device in devices[:, 0]])
    assert np.ptp(places) > len(places) == 8  # others lie between them
    rows = local_rows(jax.sharding.Mesh(devices, ("data", "model")), 512)
    np.testing.assert_array_equal(rows, np.arange(512).reshape(256, 2)[places].ravel())


@pytest.mark.parametrize(
    ("topology", "sizes", "rows"),
    [((4, 2), (4, 2), [0, 1, 6, 7]), ((4, 4), (4, 4), [0, 1, 2, 3])],
)
def test_rows_that_several_devices_of_a_process_hold_are_read_once(topology, sizes, rows):
    devices = arrange(tpus(*topology, host=(2, 2)), sizes)
    assert local_rows(jax.sharding.Mesh(devices, ("data", "model")), 8).tolist() == rows


@pytest.mark.parametrize("sizes", [(3, 1), (5, 1), (7, 1), (1, 3)])
def test_devices_that_are_no_rectangle_come_in_the_order_of_their_numbers(sizes):
    devices = tpus(2, 4)[: sizes[0] * sizes[1]]
    found = arrange(devices[::-1], sizes)
    assert found.shape == sizes
    assert found.ravel().tolist() == devices


@pytest.mark.parametrize("sizes", [(6, 1), (3, 2), (1, 6)])
def test_gpus_of_several_hosts_make_a_mesh_host_by_host(sizes):
    assert [device.id for device in arrange(gpus(3, 2), sizes).flat] == list(range(6))


def test_the_topology_orders_the_devices_where_it_can():
    assert [device.id for device in arrange(tpus(2, 4), (8, 1)).flat] == [0, 1, 2, 3, 7, 6, 5, 4]


def test_what_the_first_process_has_read_comes_to_the_others_random_keys_too(monkeypatch):
    sent = []
    monkeypatch.setattr(sharing, "are_several", lambda: True)
    monkeypatch.setattr(
        sharing, "_bytes_from_first", lambda content: sent.append(content) or sent[0]
    )
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "key": jax.random.key(7)}
    like = jax.eval_shape(lambda: {"a": jnp.zeros((2, 3)), "key": jax.random.key(0)})
    for theirs in (tree, None):  # of the first process, and of another one
        found = sharing.arrays_from_first(theirs, like)
        np.testing.assert_array_equal(found["a"], tree["a"])
        assert found["key"] == tree["key"]


SHARED = """
import sys, jax, numpy as np
from jax.sharding import Mesh
from dhp_jax.data.stream import Stream
from dhp_jax.distributed.mesh import local_rows, put_batch, gather
from dhp_jax.distributed.processes import join

def read(chosen, rows, random):
    return chosen[rows], random.random((len(chosen), 2))[rows]

def batches(rows=None):
    settings = {"examples": 40, "batch_size": 16, "first": 0, "last": 3, "rows": rows}
    with Stream(40, read, 0, 0).training((1,), **settings) as given:
        return list(given)

join(sys.argv[1], 2, int(sys.argv[2]))
devices = np.array(sorted(jax.devices(), key=lambda device: device.process_index))
for order in [[0], [4], [5], [1], [2], [3], [6], [7]], [[0, 5], [4, 6], [1, 2], [3, 7]]:
    mesh = Mesh(devices[np.array(order)], ("data", "model"))
    here = [any(device in jax.local_devices() for device in row) for row in mesh.devices]
    rows = local_rows(mesh, 16)
    assert rows.tolist() == np.arange(16).reshape(len(here), -1)[here].ravel().tolist()
    for part, batch in zip(batches(rows), batches(), strict=True):
        given = put_batch(mesh, part, 16)
        for found, expected in zip(given, batch, strict=True):
            for shard in found.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
        for found, expected in zip(gather(given), batch, strict=True):
            np.testing.assert_array_equal(found, expected)
"""


def test_processes_whose_devices_lie_apart_read_their_rows_and_make_whole_batches_of_them():
    flags = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": flags_of(4),
    }
    address = free_address()
    finish(
        *(
            subprocess.Popen(
                [sys.executable, "-c", SHARED, address, str(process)],
                env=os.environ | flags,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        )
    )


def test_one_process_asks_itself_after_every_step():
    turns = Turns()
    assert turns.look(lambda: False, lambda: True) == (False, True)
    assert turns.look(lambda: True, lambda: pytest.fail("no need to ask")) == (True, False)
    assert from_first(lambda: np.float32(1)) == 1
    assert issubclass(ProcessError, RuntimeError)
