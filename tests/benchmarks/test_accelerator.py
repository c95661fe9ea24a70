"""The quarter of an hour on an accelerator: its stages, its page, and the data that travel."""

import io
import json
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dhp_jax import data
from dhp_jax.errors import DataNotFoundError

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import cifar10_pack  # noqa: E402
import kernels  # noqa: E402
import recipe  # noqa: E402
import stages  # noqa: E402

NAMES = [f"class{i}" for i in range(10)]


def encoded(count, seed):
    """So many images as JPEG, and their labels."""
    random = np.random.default_rng(seed)
    images = []
    for pixels in random.integers(0, 256, (count, 32, 32, 3), np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        images.append(file.getvalue())
    return images, random.integers(0, 10, count).tolist()


@pytest.fixture(scope="module")
def splits():
    return {"train": encoded(12, 0), "test": encoded(3, 1)}


def test_packed_images_are_those_that_were_packed(splits):
    file = cifar10_pack.packed(splits, NAMES)
    found, names = cifar10_pack.unpacked(file)
    assert names == NAMES
    for split, (images, labels) in splits.items():
        assert found[split][0] == images
        assert found[split][1].tolist() == labels
    alone = sum(len(image) for images, _ in splits.values() for image in images)
    assert len(file) < alone - 14 * 500  # what a JPEG begins with is there once


def test_unpacked_images_are_read_as_cifar10(splits, tmp_path):
    packed = tmp_path / "cifar10.pack"
    packed.write_bytes(cifar10_pack.packed(splits, NAMES))
    cifar10_pack.unpack(packed, tmp_path / "data")
    source = data.load("cifar10", tmp_path / "data")
    assert source.class_names == tuple(NAMES)
    assert (source.train_size, source.test_size) == (12, 3)
    for split, (images, labels) in splits.items():
        pixels, found = source.read(split)
        expected = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
        np.testing.assert_array_equal(pixels, expected)
        assert found.tolist() == labels
        one_by_one, _ = source.one_by_one(split)
        np.testing.assert_array_equal(one_by_one[2][0], expected[2])
        assert one_by_one[2][1] == labels[2]
    assert source.checksum("train") != source.checksum("test")


def test_a_damaged_pack_is_refused(splits):
    file = bytearray(cifar10_pack.packed(splits, NAMES))
    file[-5] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        cifar10_pack.unpacked(bytes(file))
    with pytest.raises(ValueError, match="expected one that `pack` has made"):
        cifar10_pack.unpacked(b"something else")
    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    with pytest.raises(ValueError, match="expected JPEG images"):
        cifar10_pack.packed({"train": ([png.getvalue()], [0])}, NAMES)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("test_batch.bin", lambda file: file.unlink(), "cannot read"),
        ("data_batch_2.bin", lambda file: file.write_bytes(bytes(5)), "records of 3,073 bytes"),
        ("batches.meta.txt", lambda file: file.write_text("\n"), "names of classes"),
        ("batches.meta.txt", lambda file: file.write_text("one\n"), "labels below 1 in"),
    ],
)
def test_a_broken_binary_version_is_told_in_one_line(splits, tmp_path, name, change, told):
    packed = tmp_path / "cifar10.pack"
    packed.write_bytes(cifar10_pack.packed(splits, NAMES))
    cifar10_pack.unpack(packed, tmp_path)
    change(tmp_path / "cifar-10-batches-bin" / name)
    with pytest.raises(DataNotFoundError, match=told) as error:
        data.load("cifar10", tmp_path).read("train")
    assert "\n" not in str(error.value)


def entries(*more):
    begin = {"stage": None, "event": "begin", "command": "python x", "commit": "abc1234"}
    about = {"date": "2026-01-01", "hardware": "1 x Some GPU", "versions": {"jax": "9.9"}}
    return [begin, {"stage": "a", "event": "about", "about": about}, *more]


def test_the_page_tells_what_was_measured_and_what_was_left_out():
    ms = {"median": 12.3456, "low": 1.0, "high": 20.0}
    page = accelerator.page(
        entries(
            {"stage": "a", "event": "plan", "items": ["first", "second", "third"]},
            {"stage": "a", "event": "row", "item": "first", "row": {"network": "N", "ms": ms}},
            {"stage": "a", "event": "done", "item": "first"},
            {"stage": "a", "event": "error", "item": "second", "error": "ValueError: no"},
            {"stage": "a", "event": "end", "code": "out of time"},
            {"stage": "c", "event": "start", "seconds": 1.0},
            {"stage": "c", "event": "end", "code": -11},
        )
    )
    assert "2026-01-01, 1 x Some GPU, jax 9.9, commit abc1234" in page
    assert "| network | ms |\n|---|---:|\n| N | 12.35 (1.00 to 20.00) |" in page
    assert "- second: ValueError: no\n- no time: third" in page
    assert "- the stage ended with: -11" in page


def test_a_journal_is_read_without_the_line_that_was_being_written(tmp_path):
    journal = accelerator.Journal(tmp_path)
    journal.clear()
    journal.add(stage="a", event="row", row={"x": 1})
    with journal.path.open("a") as file:
        file.write('{"stage": "a", "ev')
    assert journal.entries() == [{"stage": "a", "event": "row", "row": {"x": 1}}]


def test_stages_share_what_time_is_left():
    left, taken = 100.0, []
    for i in range(3):
        taken.append(accelerator.share(["a", "c", "d"][i:], left, rehearse=False))
        left -= taken[-1]
    assert sum(taken) == pytest.approx(100)
    assert taken[0] > taken[1] > taken[2] > 0


def test_the_cost_of_operations_is_that_of_their_shapes():
    def compute(x, kernel, w):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dims)
        return y.reshape(-1, 5) @ w

    given = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5)), jnp.zeros((5, 7))
    text = jax.jit(compute).lower(*given).compile().as_text()
    found = [flops for _, _, flops in kernels.costs(text).values()]
    convolution, product = 2 * (2 * 4 * 4) * 5 * 3 * 3 * 3, 2 * (2 * 4 * 4) * 5 * 7
    assert {convolution, product} <= set(found)


def test_the_flops_of_a_convolution_s_gradients_are_those_of_the_convolution():
    text = """ENTRY %main {
  %x = f32[4,8,10,10]{3,2,1,0} parameter(0)
  %k = f32[16,8,3,3]{3,2,1,0} parameter(1)
  %g = f32[4,16,10,10]{3,2,1,0} parameter(2)
  %a = (f32[4,16,10,10]{3,2,1,0}, u8[9]{0}) custom-call(%x, %k), window={size=3x3}, dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convForward"
  %b = (f32[4,8,10,10]{3,2,1,0}, u8[9]{0}) custom-call(%g, %k), window={size=3x3}, dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convBackwardInput"
  ROOT %c = (f32[16,8,3,3]{3,2,1,0}, u8[9]{0}) custom-call(%x, %g), window={size=3x3}, dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convBackwardFilter"
}
"""  # noqa: E501
    found = kernels.costs(text)
    expected = 2 * 4 * 10 * 10 * 16 * 8 * 9
    assert [found[name][2] for name in "abc"] == [expected] * 3
    assert found["a"][0] == "__cudnn$convForward"
    assert found["a"][1] == 4 * (4 * 16 * 100 + 4 * 8 * 100 + 16 * 8 * 9) + 9


def test_a_device_that_waits_is_told_from_one_that_works():
    events = [
        kernels.Event("k_1", "fusion.1", "Stream 1", 0.0, 4e6),
        kernels.Event("k_2", "", "Stream 2", 2e6, 5e6),
        kernels.Event("k_1", "fusion.1", "Stream 1", 8e6, 10e6),
    ]
    assert kernels.summary(events, 2) == {
        "kernels a step": 1.5,
        "busy, ms": pytest.approx(3.5),
        "idle": pytest.approx(0.3),
    }
    first, second = kernels.by_operation(events, "", 2)
    assert (first.name, first.count, first.seconds) == ("fusion.1", 1.0, pytest.approx(3e-3))
    assert (second.name, second.count, second.seconds) == ("k_2", 0.5, pytest.approx(1.5e-3))
    assert kernels.told(events) == pytest.approx(6 / 9)


@pytest.mark.slow
def test_every_switch_makes_another_program():
    size = stages.size_of(rehearse=True)
    network = size.network("resnet56")
    switches = stages.first_switches() | stages.more_switches()
    programs = {}
    for name, (within, changes) in switches.items():
        model = size.build(network, **changes)
        with within:
            programs[name] = stages.traced(network, model, 4, size.steps).lowered.as_text()
    assert len(programs) >= 8
    assert len(set(programs.values())) == len(programs)
    again = stages.traced(network, size.build(network), 4, size.steps).lowered.as_text()
    assert again == programs["as it is"]  # no switch stays on


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--minutes=0"], "--minutes: expected a positive number, got '0'"),
        (["--stages", "b"], "--stages: expected --data with b, whose recipe needs the images"),
        (["--stages", "b", "--data=no.pack"], "--data: expected a file, got no.pack"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(tmp_path, monkeypatch, capsys, arguments, told):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["accelerator.py", f"--out={out}", *arguments])
    with pytest.raises(SystemExit):
        accelerator.main()
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_a_recipe_travels_with_what_it_needs_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PART", 10_000)
    run = tmp_path / "here/run"
    files = {
        "config.json": b"{}",
        ".lock": b"",
        "search/arrays": bytes(range(256)) * 90,
        "pruned/arrays": b"small",
        "checkpoints/search/700/state": b"of a phase that is done",
        "checkpoints/converge/90/state": b"older",
        "checkpoints/converge/100/state": b"newest",
    }
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    pieces = run.with_name("pieces.json")
    pieces.write_text("[12.5]")
    parts = recipe.pack(run, pieces, tmp_path / "out/recipe.tar")
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 10_000
    there = tmp_path / "there"
    there.mkdir()
    recipe.restore(parts[0], there)
    assert (there / "pieces.json").read_text() == "[12.5]"
    found = {
        str(path.relative_to(there / "run")): path.read_bytes()
        for path in (there / "run").rglob("*")
        if path.is_file()
    }
    left = (".lock", "checkpoints/search/700/state", "checkpoints/converge/90/state")
    assert found == {name: content for name, content in files.items() if name not in left}


def rehearse(out, *stages, **options):
    command = [sys.executable, "benchmarks/accelerator.py", "--rehearse", f"--out={out}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += [f"--cache={out.parent}/cache", "--commit=this one", "--stages", *stages]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr + (out / "accelerator.log").read_text()
    return [json.loads(line) for line in (out / "accelerator.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_stages_can_be_rehearsed(tmp_path):
    out = tmp_path / "out"
    found = rehearse(out, "a", "c", "d", "e", "f", "b", minutes=60)
    planned = {(e["stage"], name) for e in found if e["event"] == "plan" for name in e["items"]}
    done = {(e["stage"], e["item"]) for e in found if e["event"] == "done"}
    assert planned == done
    rows = [(entry["stage"], entry["row"]) for entry in found if entry["event"] == "row"]
    assert {stage for stage, _ in rows} == set("acdeb")
    assert all(row.get("not compiled") is None for _, row in rows)
    assert {row["switch"] for stage, row in rows if stage == "c"} >= {
        "as it is",
        "bfloat16",
        "barrier before the update",
        "precision highest",
        "1 step a dispatch",
        "2 steps a dispatch, 2 ahead",
    }
    (recipe,) = [row for stage, row in rows if stage == "b"]
    assert recipe["finished"]
    assert recipe["exit code"] == 0
    assert len(list(out.iterdir())) <= 8
    assert "commit this one" in (out / "accelerator.md").read_text()


@pytest.mark.slow
def test_a_recipe_stops_in_time_and_goes_on_from_there(tmp_path):
    change = {"set": "converge.epochs=400"}
    (stopped,) = rows_of(rehearse(tmp_path / "first", "b", minutes=2, **change))
    assert stopped["exit code"] == 75
    assert not stopped["finished"]
    assert stopped["seconds here"] < 120
    resumed = tmp_path / "first/recipe_resnet20.tar.00"
    (more,) = rows_of(rehearse(tmp_path / "second", "b", minutes=2, resume=resumed, **change))
    assert more["seconds before"] == stopped["seconds here"]
    assert more["epochs"] > stopped["epochs"]


def rows_of(found):
    return [entry["row"] for entry in found if entry["event"] == "row"]
