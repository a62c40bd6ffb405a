"""What test_training runs in processes of its own: torchrun's workers, and runs that get killed."""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.text.corpus import Corpus
from fastvae.text.reading import Reading
from fastvae.text.vocabulary import CharVocabulary
from fastvae.training import TrainingConfig, train

torch.set_num_threads(1)


class Letters(Corpus):
    """Cycles through ten letters from a random start."""

    vocabulary, length = CharVocabulary("abcdefghi\n"), 8
    reading = Reading("Letters")  # that of subclasses too: saved runs can be compared

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def batch(self, count, generator):
        return self._samples(torch.randint(10, (count,), generator=generator))

    def __len__(self):
        return 10

    def _samples(self, index):
        return (index.view(-1, 1) + self.stride * torch.arange(self.length)) % 10


def make_model(name: str = "hybrid", **arguments) -> torch.nn.Module:
    """The same small model each time."""
    torch.manual_seed(1)
    if name == "lstm_vae":
        return LSTMVAE(11, 8, latent_size=3, hidden_size=6, pad_id=10, **arguments)
    sizes = {"latent_size": 3, "encoder_channels": (6, 7), "feature_channels": 5}
    sizes |= {"hidden_size": 6, "conv_layers": 2, "conv_channels": 4}
    return HybridVAE(11, 8, pad_id=10, word_dropout=0.3, **sizes, **arguments)


CONFIG = {
    "steps": 20,
    "batch_size": 4,
    "log_every": 3,
    "eval_every": 6,
    "checkpoint_every": 4,
    "sample_every": 0,
    "lr_decay": 0.9,
    "lr_decay_every": 5,
    "kl_start": 2,
    "kl_end": 12,
    "clip_norm": 1.0,
}
SHARED = {**CONFIG, "batch_size": 8, "accumulate": 2, "free_bits": 0.05}


def shared(folder: Path, **changes) -> None:
    """A run that several processes share, begun and resumed."""
    for steps in (8, 13):
        model = make_model(decoder="bytenet", dtype=torch.float64)
        if int(os.environ.get("RANK", 0)):
            torch.nn.init.zeros_(
                model.head.bias
            )  # the first process's model is the one that counts
        config = TrainingConfig(**{**SHARED, **changes, "steps": steps})
        train(model, Letters(), config, folder, validation=Letters(), resume=steps > 8)


def shared_at_a_held_kl(folder: Path) -> None:
    shared(folder, kl_nats=1.0)


class StopsOneProcess(Letters):
    """Asks the second process to stop while its fifth batch is drawn."""

    drawn = 0

    def batch(self, count, generator):
        self.drawn += 1
        if self.drawn == 5 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(count, generator)


def stopped_by_one(folder: Path) -> None:
    config = TrainingConfig(**{**SHARED, "accumulate": 1})
    result = train(make_model(), StopsOneProcess(), config, folder)
    print(json.dumps({name: result[name] for name in ("step", "interrupted")}), flush=True)


def forked(run) -> int:
    """Runs `run` in a fork -> its process id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return child


def finished(child: int) -> bool:
    """Waits for a fork: whether it came to its end, or was killed."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a run failed"
    return not os.WIFSIGNALED(status)


def go_on(folder: Path, **changes) -> None:
    config = TrainingConfig(**{**CONFIG, **changes})
    train(make_model(), Letters(), config, folder, validation=Letters(), resume=True)


def killed_at_random(folder: Path) -> None:
    """One run, killed at random moments until it happens to reach its end."""
    steps = {"steps": 80}
    go_on(folder / "whole", **steps)  # here, so that no fork has to import anything
    start = time.monotonic()
    assert finished(forked(partial(go_on, folder / "again", **steps)))
    span, attempts = time.monotonic() - start, 0
    random.seed(0)
    while True:
        attempts += 1
        child = forked(partial(go_on, folder / "killed", **steps))
        # At first soon: the span may have been measured while others kept the machine busy.
        time.sleep(random.uniform(0.1, 0.4) * span * (0.25 if attempts < 3 else 1))
        os.kill(child, signal.SIGKILL)
        if finished(child):
            break
    print(json.dumps({"attempts": attempts}))


def killed_at_files(folder: Path) -> None:
    """Runs killed just before their n-th operation on files, for every n, then resumed."""
    short = {"steps": 8, "checkpoint_every": 3, "eval_every": 4}
    operations = ("replace", "fsync")
    originals = {name: getattr(os, name) for name in operations}

    def until(n):
        count = 0

        def counting(name):
            def operation(*arguments, **options):
                nonlocal count
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return originals[name](*arguments, **options)

            return operation

        for name in operations:
            setattr(os, name, counting(name))
        go_on(folder / str(n), **short)

    go_on(folder / "whole", **short)
    n = 1
    while not finished(forked(partial(until, n))):
        assert finished(forked(partial(go_on, folder / str(n), **short)))
        n += 1
    print(json.dumps({"kills": n - 1}))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
