"""Laws of the step, on real ranks; each prints its name when it holds. Launched by test_laws.py."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from engine.data.decode import Crops
from engine.distributed.world import World, make_mesh, process_group
from engine.evaluation.online_probe import OnlineProbe
from engine.recipe.sections import Parallel
from engine.runs.run import as_deterministic_as_asked
from engine.torch_internals import lerp_each_
from engine.training import update as update_module
from engine.training.optim import LARS_TRUST, Lars
from engine.training.parallelize import local, materialize, parallelize
from engine.training.schedule import Schedule
from engine.training.step import KeyGather, TrainState, train_step
from engine.training.update import gradient_norm
from models.architecture import Architecture
from models.moco import MoCo
from models.norm import GlobalBatchNorm, batch_norm_weights, set_batch_norm_group
from tests.distributed.replays import GOLDEN, SHARDINGS
from tests.replay import Trace, build
from tests.training.trunks import Unpooled


def images(trace: Trace, world: World, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = trace.config["global_batch"] // world.size
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    views = torch.cat([trace[f"images.{view}"][step, mine] for view in (1, 2)]).to(world.device, dtype)
    # Convolutions of float64 are slow on a CPU, and a ResNet takes images of any size.
    return views[..., :16, :16] if trace.config["trunk"]["kind"] == "resnet" else views


def built(world: World, trace: str, shard: str = "full") -> tuple[Trace, TrainState]:
    trace = Trace(GOLDEN / f"{trace}.safetensors")
    return trace, build(trace, world, "float64", False, shard, world.size if shard == "hybrid" else 1)


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {name: local(tensor).clone() for name, tensor in state.tensors().items()}


def bad_gradient_changes_nothing(world: World) -> None:
    """NaN or infinity in one rank's shard of one gradient: all ranks keep all but the momentum encoder's parameters."""
    cases = [("A_vit_adamw", "full"), ("A_vit_adamw", "hybrid"), ("B_resnet_lars", "full"), ("B_resnet_lars", "hybrid")]
    cases.append(("B_resnet_lars", "replicate"))
    for number, (name, shard) in enumerate(cases):
        trace, state = built(world, name, shard)
        train_step(state, images(trace, world, 0))
        train_step(state, images(trace, world, 1))
        before = snapshot(state)
        expected = [shard.clone() for shard in state.momentum_shards]
        lerp_each_(expected, state.base_shards, 1 - state.schedule.momentum_at(2))

        def poisoned(trained, *rest, bad: float = (torch.nan, torch.inf)[number % 2]) -> tuple[Tensor, Tensor]:
            if world.rank == world.size - 1:
                last = [p for p in trained.values() if local(p.grad).numel()][-1]
                local(last.grad).view(-1)[0] = bad
            return gradient_norm(trained, *rest)

        update_module.gradient_norm = poisoned
        update = state.update
        update.message = lambda: torch.tensor([0.0, 1.0, world.rank], dtype=torch.float64, device=world.device)
        output = train_step(state, images(trace, world, 2))
        update_module.gradient_norm, update.message = gradient_norm, None
        # What travels beside bad gradients arrives, on every rank.
        assert update.heard.tolist() == [0, world.size, world.size * (world.size - 1) / 2]

        assert (output.applied.skipped.item(), update.step) == (1, 3)
        assert (update.skipped.item(), update.skipped_in_a_row.item()) == (1, 1)
        after = snapshot(state)
        moved = {n for n in after if not torch.equal(after[n], before[n])} - {"skipped", "skipped_in_a_row"}
        assert all(n.startswith("model.momentum.") and isinstance(state.saved[n], nn.Parameter) for n in moved), moved
        assert all(map(torch.equal, state.momentum_shards, expected))

        assert train_step(state, images(trace, world, 3)).applied.skipped.item() == 0
        assert update.skipped_in_a_row.item() == 0
        again = snapshot(state)
        # A local shard may be empty; where it is not, every trained tensor has moved again.
        still = [
            n
            for n in update.trained
            if after["model." + n].numel() and torch.equal(again["model." + n], after["model." + n])
        ]
        assert not still, still
        steps = {t.item() for n, t in again.items() if n.startswith("optimizer.step.")}
        assert steps <= {3.0}, steps  # the skipped step does not count for AdamW


def replicas_stay_equal(world: World) -> None:
    """To the bit, buffers and the optimizer's state too, also over a step whose images are bad on one rank alone."""
    for shard in ("hybrid", "replicate"):
        trace, state = built(world, "A_vit_adamw", shard)
        for step in range(4):
            x = images(trace, world, step)
            if step == 2 and world.rank == world.size - 1:
                x[0, 0, 0, 0] = torch.nan
            train_step(state, x)
        assert state.update.skipped.item() == 1, shard
        for name, tensor in snapshot(state).items():
            everyones = [torch.empty_like(tensor) for _ in range(world.size)]
            dist.all_gather(everyones, tensor)
            assert all(torch.equal(tensor, other) for other in everyones), (shard, name)


def momentum_shards_are_what_keys_see(world: World) -> None:
    for shard in SHARDINGS:
        trace, state = built(world, "A_vit_adamw", shard)
        x = images(trace, world, 0)
        train_step(state, x)
        before = state.moco.keys(x)
        with torch.no_grad():
            torch._foreach_zero_(state.momentum_shards)
        after = state.moco.keys(x)
        assert not torch.allclose(before, after), shard
        assert after.abs().max().item() == 0, shard  # a network of zeros answers zero


def base_shards_are_what_features_see(world: World) -> None:
    """After a step, whatever an evaluation before it has gathered."""
    for shard in SHARDINGS:
        trace, state = built(world, "A_vit_adamw", shard)
        x, trunk = images(trace, world, 0), state.moco.base.trunk
        with torch.no_grad():
            trunk(x)
        train_step(state, x)
        with torch.no_grad():
            torch._foreach_zero_(state.base_shards)
            assert trunk(x).abs().max().item() == 0, shard


def keys_come_rank_by_rank(world: World) -> None:
    """Of each view, to the bit, into one piece of memory; also keys that do not lie row by row."""
    generator = torch.Generator().manual_seed(world.rank)
    keys = torch.randn(4, 6, generator=generator).to(world.device).T
    everyones = [torch.empty(6, 4, device=world.device) for _ in range(world.size)]
    dist.all_gather(everyones, keys.contiguous())
    gather = KeyGather(keys, world.group)
    for found_GP, rows in zip(gather.wait(), (slice(0, 3), slice(3, 6)), strict=True):
        assert torch.equal(found_GP, torch.cat([other[rows] for other in everyones]))


def nothing_grows_with_the_steps(world: World) -> None:
    """FSDP keeps no record of forwards whose backward never comes."""
    trace, state = built(world, "A_vit_adamw")
    for step in range(3):
        train_step(state, images(trace, world, step))
    for module in state.moco.modules():
        if isinstance(module, FSDPModule):
            fsdp = module._get_fsdp_state()
            groups = getattr(fsdp, "_fsdp_param_groups", None) or [fsdp._fsdp_param_group]
            assert not fsdp._comm_ctx.post_forward_order
            assert not any(group._post_forward_indices for group in groups)


def batch_norm_is_global(world: World) -> None:
    """Against torch's BatchNorm on the whole of each crop batch: values, gradients, running statistics."""
    channels, rows = 5, 4
    for size in ((), (3, 2)):
        generator = torch.Generator().manual_seed(7)
        whole_VB = torch.randn(2, world.size * rows, channels, *size, generator=generator, dtype=torch.float64) * 3 + 50
        weights_VB = torch.randn(whole_VB.shape, generator=generator, dtype=torch.float64)
        ours = GlobalBatchNorm(channels, views=2).double()
        theirs = (nn.BatchNorm2d if size else nn.BatchNorm1d)(channels).double()
        with torch.no_grad():
            for norm in (ours, theirs):
                norm.weight.copy_(torch.linspace(0.5, 2, channels))
                norm.bias.copy_(torch.linspace(-1, 1, channels))
        set_batch_norm_group(ours, world.group)
        mine = slice(world.rank * rows, (world.rank + 1) * rows)
        x = whole_VB[:, mine].flatten(0, 1).requires_grad_()
        (ours(x) * weights_VB[:, mine].flatten(0, 1)).sum().backward()
        whole = whole_VB.clone().requires_grad_()
        expected = torch.stack([theirs(view) for view in whole])
        (expected * weights_VB).sum().backward()
        torch.testing.assert_close(
            ours(x.detach()).unflatten(0, (2, -1)), torch.stack([theirs(v) for v in whole])[:, mine]
        )
        torch.testing.assert_close(x.grad.unflatten(0, (2, -1)), whole.grad[:, mine])
        for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):  # the mean over ranks
            torch.testing.assert_close(weight.grad, expected.grad / world.size)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name])
            everyones = [torch.empty_like(buffer) for _ in range(world.size)]
            dist.all_gather(everyones, buffer)
            assert all(torch.equal(buffer, other) for other in everyones), name
        torch.testing.assert_close(ours.eval()(x.detach()), theirs.eval()(x.detach()))


def small_variance_far_from_zero_is_exact(world: World) -> None:
    """Mean 1e4, variance 1e-2, and another mean on every rank: statistics and output against float64."""
    channels, rows = 4, 512
    generator = torch.Generator().manual_seed(9)
    whole_VB = 1e4 + 0.1 * torch.randn(2, world.size, rows, channels, generator=generator, dtype=torch.float64)
    whole_VB = (whole_VB + 0.03 * torch.arange(world.size, dtype=torch.float64)[:, None, None]).float()
    exact_VB = whole_VB.double().flatten(1, 2) - 1e4  # near zero, where the reference is exact too
    variance_VC, mean_VC = torch.var_mean(exact_VB, 1, correction=0)
    expected = (exact_VB - mean_VC[:, None]) * (variance_VC[:, None] + 1e-5).rsqrt()
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-9)):
        ours = GlobalBatchNorm(channels, affine=False, momentum=1.0, views=2).to(world.device, dtype)
        set_batch_norm_group(ours, world.group)
        y = ours(whole_VB[:, world.rank].flatten(0, 1).to(world.device, dtype)).unflatten(0, (2, -1))
        # With momentum 1 the buffers are the last view's statistics.
        unbiased_C = variance_VC[1] * exact_VB.shape[1] / (exact_VB.shape[1] - 1)
        torch.testing.assert_close(ours.running_var.double().cpu(), unbiased_C, rtol=tolerance, atol=0)
        torch.testing.assert_close(ours.running_mean.double().cpu(), 1e4 + mean_VC[1], rtol=tolerance, atol=0)
        mine = expected.unflatten(1, (world.size, rows))[:, world.rank]
        torch.testing.assert_close(y.double().cpu(), mine, rtol=0, atol=10 * tolerance)


def batch_norm_weights_stay_float32_under_bf16(world: World) -> None:
    """In both trunks, forward and after a step; and they end equal on all ranks."""
    state = build(Trace(GOLDEN / "C_conv_stem_adamw.safetensors"), world, "bf16", False, "full")
    trunks, seen = (state.moco.base.trunk, state.moco.momentum.trunk), set()
    norms = [part for trunk in trunks for part in trunk.modules() if isinstance(part, GlobalBatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda n, x: seen.add((n.weight.dtype, x[0].dtype))) for norm in norms]
    x = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
    train_step(state, x)
    train_step(state, x)
    assert norms
    assert seen == {(torch.float32, torch.bfloat16)}
    for weight in batch_norm_weights(trunks):
        assert weight.dtype == torch.float32
        assert not isinstance(weight, DTensor)
        everyones = [torch.empty_like(weight) for _ in range(world.size)]
        dist.all_gather(everyones, weight.detach())
        assert all(torch.equal(weight, other) for other in everyones)
    for hook in hooks:
        hook.remove()


def batch_norm_compiles_into_one_graph(world: World) -> None:
    """Values, gradients and buffers of the compiled module are those of the eager one."""
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
    found = []
    for compile in (False, True):
        module = nn.Sequential(GlobalBatchNorm(3, views=2), nn.ReLU(inplace=True)).to(world.device)
        set_batch_norm_group(module, world.group)
        function = torch.compile(module, fullgraph=True, backend="aot_eager") if compile else module
        given = x.clone().requires_grad_()
        y = function(given)
        y.square().sum().backward()
        found.append([y, given.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def weights_depend_on_the_seed_alone(world: World) -> None:
    def make() -> MoCo:
        shape = {"image_size": 16, "patch_size": 8, "dim": 12, "depth": 2, "heads": 3, "conv_stem": False}
        with torch.device("meta"):
            return MoCo(partial(Architecture("vit", shape).build, freeze_patch_projection=True), 20, 8)

    moco = make()
    expected = dict(make().initial_values(seed=3))
    other_seed = dict(make().initial_values(seed=4))
    mesh = make_mesh(world, "full", 1)
    parallelize(moco, mesh, world.group, Parallel(compile=False, precision="float32"))
    materialize(moco, world.device, moco.initial_values(seed=3))
    for name, tensor in moco.state_dict().items():
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(value.cpu().double(), expected[name].double()), name
    matrices = [n for n in expected if n.endswith(".weight") and expected[n].ndim > 1]
    assert matrices
    assert all(not torch.equal(expected[n], other_seed[n]) for n in matrices)


def lars_takes_norms_of_whole_parameters(world: World) -> None:
    """Against the formula on whole tensors, in one process: sharded rows and a bias, two steps."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"matrix": (7, 3), "kernel": (5, 2, 3, 3), "zero": (4, 4), "bias": (6,)}
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    values["zero"].zero_()
    mesh = make_mesh(world, "full", 1)["shard"]
    shards = {
        n: nn.Parameter(torch.distributed.tensor.distribute_tensor(v, mesh, [torch.distributed.tensor.Shard(0)]))
        for n, v in values.items()
    }
    optimizer = Lars(shards.values(), 0.01, mesh.get_group())
    mu = {n: torch.zeros_like(v) for n, v in values.items()}
    for lr in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in shards.items():
            gradient = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
            parameter.grad = torch.distributed.tensor.distribute_tensor(
                gradient, mesh, [torch.distributed.tensor.Shard(0)]
            )
            value = values[name]
            if gradient.ndim > 1:
                gradient = gradient + 0.01 * value
                if value.norm() > 0:
                    gradient = gradient * LARS_TRUST * value.norm() / gradient.norm()
            mu[name] = 0.9 * mu[name] + gradient
            values[name] = value - lr * mu[name]
        optimizer.step()
    for name, parameter in shards.items():
        torch.testing.assert_close(parameter.detach().full_tensor(), values[name], rtol=1e-12, atol=1e-14)


def bad_features_of_one_rank_leave_the_online_probe_alone_on_all(world: World) -> None:
    """Then it goes on, and is equal on all ranks."""
    images, width = 16, 6
    labels, schedule = (
        np.arange(images) % 3,
        Schedule(peak_lr=images / 256, epochs=2, warmup_epochs=0, steps_per_epoch=4),
    )
    options = {"seed": 0, "device": world.device, "dtype": torch.float64, "group": world.group}
    probe = OnlineProbe(width, labels, 3, schedule, **options)
    generator = torch.Generator().manual_seed(world.rank)
    rows = images // world.size
    mine = torch.arange(world.rank * rows, (world.rank + 1) * rows)
    for step in range(4):
        before = {name: tensor.clone() for name, tensor in probe.tensors().items()}
        features = torch.randn(2 * rows, width, generator=generator, dtype=torch.float64).to(world.device)
        if step == 2 and world.rank == world.size - 1:
            features[1, 1] = torch.nan
        probe.learn(features, mine)
        still = [torch.equal(tensor, before[name]) for name, tensor in probe.tensors().items()]
        assert all(still) if step == 2 else not any(still), (step, still)
        for tensor in (probe.loss, *probe.tensors().values()):
            everyones = [torch.empty_like(tensor) for _ in range(world.size)]
            dist.all_gather(everyones, tensor.contiguous())
            assert all(torch.equal(tensor.nan_to_num(), other.nan_to_num()) for other in everyones)


def what_one_rank_cannot_do_deterministically_binds_all(world: World) -> None:
    odd = world.rank == world.size - 1
    task = SimpleNamespace(
        world=world,
        parallel=Parallel(compile=False, precision="float32"),
        crops=Crops(8, 1.0),
        fresh_trunk=lambda: Unpooled() if odd else nn.Conv2d(3, 4, 1),
        refused=None,
    )
    with as_deterministic_as_asked(task):
        assert task.refused == "max_unpooling2d_forward_out"
        assert torch.is_deterministic_algorithms_warn_only_enabled()


LAWS = (
    bad_gradient_changes_nothing,
    replicas_stay_equal,
    momentum_shards_are_what_keys_see,
    base_shards_are_what_features_see,
    keys_come_rank_by_rank,
    nothing_grows_with_the_steps,
    batch_norm_is_global,
    small_variance_far_from_zero_is_exact,
    batch_norm_weights_stay_float32_under_bf16,
    batch_norm_compiles_into_one_graph,
    weights_depend_on_the_seed_alone,
    lars_takes_norms_of_whole_parameters,
    bad_features_of_one_rank_leave_the_online_probe_alone_on_all,
    what_one_rank_cannot_do_deterministically_binds_all,
)

if __name__ == "__main__":
    with process_group() as world:
        for law in LAWS:
            law(world)
            if world.is_first:
                print(json.dumps({"law": law.__name__}), flush=True)
