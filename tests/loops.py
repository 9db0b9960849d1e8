"""Training loops as people write them, each to be run alone, watched, and with a plan.

watch: a function like ps.record without the directory, or `unwatched`. plan: a PrecisionPlan or None. Each loop returns
what it computed: losses, then weights and buffers.
"""

from __future__ import annotations

import contextlib

import models
import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps


class Unwatched:
    """Stands in for a recorder where nobody watches."""

    def step(self):
        pass


def unwatched(model, **options):
    return contextlib.nullcontext(Unwatched())


def applied(plan, model):
    return contextlib.nullcontext() if plan is None else ps.apply(plan, model)


def net(inputs=8, outputs=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, outputs))
    )


def values(*modules):
    return [p.detach().clone() for m in modules for p in [*m.parameters(), *m.buffers()]]


# the loops: watch is ps.record or nothing, plan a plan or None; each returns what it computed


def plain(watch, plan):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer) as rec:
        for step in range(4):
            optimizer.zero_grad()
            loss = models.loss_of(model, models.batch(step))
            loss.backward()
            optimizer.step()
            rec.step()
            losses.append(loss.detach())
    return losses + values(model)


def everything(watch, plan):
    """Autocast, GradScaler, accumulation over two micro-batches, clipping, a schedule, and an evaluation per step."""
    torch.manual_seed(0)
    model = nn.Sequential(net(), nn.Dropout(0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    autocast = contextlib.nullcontext() if plan else torch.autocast("cpu", dtype=torch.float16)
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer, scaler=scaler) as rec:
        for step in range(6):
            for micro in range(2):
                with autocast:
                    loss = models.loss_of(model, models.batch(2 * step + micro)) / 2
                scaler.scale(loss).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= before:
                schedule.step()
            model.eval()
            with torch.no_grad():
                losses.append(models.loss_of(model, models.batch(100, size=32)))
            model.train()
            rec.step()
    return losses + values(model)


def lbfgs(watch, plan):
    """Several forward and backward passes within one step of the optimizer."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer) as rec:
        for step in range(3):

            def closure(step=step):
                optimizer.zero_grad()
                loss = models.loss_of(model, models.batch(step))
                loss.backward()
                losses.append(loss.detach())
                return loss

            optimizer.step(closure)
            rec.step()
    return losses + values(model)


def several_optimizers(watch, plan):
    model = net()
    optimizers = [torch.optim.AdamW(model[0].parameters(), lr=1e-2), torch.optim.SGD(model[2].parameters(), lr=0.1)]
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizers) as rec:
        for step in range(4):
            loss = models.loss_of(model, models.batch(step))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            rec.step()
            losses.append(loss.detach())
    return losses + values(model)


def adversaries(seed=0):
    return net(4, 8, seed), net(8, 1, seed + 1)


def play(generator, discriminator, optimizers, step):
    """One round: the discriminator's step, then the generator's with the discriminator frozen."""
    of_g, of_d = optimizers
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(50 + step))
    fake = generator(noise)
    discriminator.requires_grad_(True)
    d_loss = F.softplus(-discriminator(models.batch(step)[0])).mean() + F.softplus(discriminator(fake.detach())).mean()
    of_d.zero_grad()
    d_loss.backward()
    of_d.step()
    discriminator.requires_grad_(False)
    g_loss = F.softplus(-discriminator(fake)).mean()
    of_g.zero_grad()
    g_loss.backward()
    of_g.step()
    return [d_loss.detach(), g_loss.detach()]


def gan_two_recorders(watch, plan):
    g, d = adversaries()
    of_g, of_d = torch.optim.Adam(g.parameters(), lr=1e-2), torch.optim.SGD(d.parameters(), lr=1e-2)
    losses = []
    with applied(plan, g), applied(plan, d), watch(g, optimizer=of_g) as rec_g, watch(d, optimizer=of_d) as rec_d:
        for step in range(3):
            losses += play(g, d, (of_g, of_d), step)
            rec_g.step()
            rec_d.step()
    return losses + values(g, d)


def gan_one_recorder(watch, plan):
    g, d = adversaries()
    both = nn.ModuleDict({"g": g, "d": d})
    optimizers = torch.optim.Adam(g.parameters(), lr=1e-2), torch.optim.SGD(d.parameters(), lr=1e-2)
    losses = []
    with applied(plan, both), watch(both, optimizer=optimizers) as rec:
        for step in range(3):
            losses += play(g, d, optimizers, step)
            rec.step()
    return losses + values(g, d)


def two_backwards(watch, plan):
    """Two losses through one graph, one after the other, and a gradient penalty, which differentiates twice."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer) as rec:
        for step in range(3):
            x, y = models.batch(step)
            x.requires_grad_()
            out = model(x)
            first, second = F.cross_entropy(out, y), out.float().square().mean()
            (slope,) = torch.autograd.grad(first, x, create_graph=True)
            (first + slope.square().sum()).backward(retain_graph=True)
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
            losses += [first.detach(), second.detach(), slope.detach()]
    return losses + values(model)


def sharpness_aware(watch, plan):
    """Two passes per step, the second one at weights that are moved and put back (SAM)."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer) as rec:
        for step in range(3):
            models.loss_of(model, models.batch(step)).backward()
            with torch.no_grad():
                moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            loss = models.loss_of(model, models.batch(step))
            loss.backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
            losses.append(loss.detach())
    return losses + values(model)


def workers(watch, plan):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    data = torch.utils.data.TensorDataset(*models.batch(0, size=24))
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True, num_workers=2)
    losses = []
    with applied(plan, model), watch(model, optimizer=optimizer) as rec:
        for batch in loader:
            optimizer.zero_grad()
            loss = models.loss_of(model, batch)
            loss.backward()
            optimizer.step()
            rec.step()
            losses.append(loss.detach())
    return losses + values(model)


LOOPS = {
    loop.__name__: loop
    for loop in (plain, everything, lbfgs, several_optimizers, gan_two_recorders, gan_one_recorder, two_backwards,
                 sharpness_aware, workers)
}  # fmt: skip
