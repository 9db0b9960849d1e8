"""The byte-level GPT task."""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from precscope.errors import UsageError
from precscope.tasks import make_task
from precscope.training.tasks.gpt import GPT, SIZES, GPTConfig, gpt, is_held_out, load_text, source_files


def test_names_and_size_of_the_model():
    model = GPT(SIZES["small"])
    names = {name for name, _ in model.named_modules()}
    inner = ("ln1", "attn.qkv", "attn.proj", "ln2", "mlp.fc1", "mlp.act", "mlp.fc2")
    assert {f"blocks.{i}.{n}" for i in range(4) for n in inner} | {"wte", "wpe", "ln_f", "head"} <= names
    assert sum(p.numel() for p in model.parameters()) == 3_356_160
    assert model(torch.zeros(2, 256, dtype=torch.long)).shape == (2, 256, 256)


def test_attention_looks_back_only():
    torch.manual_seed(0)
    model = GPT(SIZES["tiny"])
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=0)
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_an_untrained_model_knows_nothing():
    task = make_task("gpt")
    assert task.checked_loss(task.batch(0)).item() == pytest.approx(math.log(256), abs=0.2)


def test_text_is_real_and_held_out_by_file():
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in source_files(root)]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not any(n.startswith(("test/", "site-packages/", "lib2to3/", "idlelib/idle_test/")) for n in names)
    train, held_out = load_text()
    assert train.dtype == torch.uint8 and len(train) > 1e6
    assert 0.03 < len(held_out) / len(train) < 0.3
    text = {False: train.numpy().tobytes(), True: held_out.numpy().tobytes()}
    for name in ("json/decoder.py", "argparse.py", "typing.py"):
        assert (root / name).read_bytes() in text[is_held_out(name)]
        assert (root / name).read_bytes() not in text[not is_held_out(name)]


def test_a_batch_depends_on_seed_and_step_alone():
    first, second, other = gpt("tiny"), gpt("tiny"), gpt("tiny", seed=1)
    tokens, targets = first.batch(3)
    assert tokens.shape == targets.shape == (4, 32) and tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(second.batch(3)[0], tokens)
    assert not torch.equal(first.batch(4)[0], tokens)
    assert not torch.equal(other.batch(3)[0], tokens)
    assert torch.equal(first.eval_batches[0][0], other.eval_batches[0][0]), "every seed is judged by the same text"


def test_text_is_read_quickly_and_once():
    load_text()
    start = time.perf_counter()
    load_text()
    assert time.perf_counter() - start < 0.01


def test_an_unknown_size_is_refused():
    with pytest.raises(UsageError, match=r"no size 'smal' \(did you mean small\?\); sizes: tiny, small, medium"):
        gpt("smal")


def test_a_size_is_a_value():
    assert GPTConfig(layers=4) == SIZES["small"]
