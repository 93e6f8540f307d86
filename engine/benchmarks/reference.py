"""The other side of a comparison: a step of MoCo v3 done as the published code does it, written from the paper.

Eager, autocast for bf16, a forward for each view, attention with an explicit softmax, plain BatchNorm over each view,
the momentum encoder and the optimizer one parameter at a time, the whole matrix of logits. `improved` is what its user
could switch on: fused attention, torch.compile, channels_last. On one rank it computes what the engine's step computes.

Shapes: V = 2 views, B images, P width of queries and keys.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from engine.recipe.sections import Optimizer, Pretrain
from engine.training.parallelize import dtype_of
from engine.training.schedule import MocoSchedule
from models.architecture import Architecture
from models.moco import MoCo
from models.trunk import Trunk


class Reference:
    """Networks with the initial weights of `moco` (their names are the same), their optimizer, and the step.

    Args:
        trunk: what `moco` is built on.
        improved: whether attention is fused, the encoders are compiled and images are channels_last.
    """

    def __init__(
        self,
        recipe: Pretrain,
        architecture: Architecture,
        moco: MoCo,
        schedule: MocoSchedule,
        device: torch.device,
        *,
        improved: bool,
    ):
        self.schedule, self.temperature, self.device = schedule, recipe.moco.temperature, device
        self.count, self.improved, self.bf16 = 0, improved, recipe.parallel.precision == "bf16"
        with torch.device("meta"):
            self.networks = Networks(architecture, recipe, fused=improved)
        self.networks.to_empty(device=device).to(dtype_of(recipe.parallel))
        self.networks.load_state_dict(dict(moco.initial_values(recipe.run.seed)))
        self.format = torch.channels_last if improved else torch.contiguous_format
        self.networks.to(memory_format=self.format)
        if improved:
            for part in self.networks.children():
                part.compile()
        self.optimizer = build_optimizer(recipe.optimizer, self.networks)

    def step(self, images: Tensor) -> Tensor:
        """Update the networks once on two views [V*B, 3, H, W]; returns the loss."""
        one, two = images.to(memory_format=self.format).chunk(2)
        networks = self.networks
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            q1_BP, q2_BP = (networks.predictor(networks.base(view)) for view in (one, two))
            networks.move_momentum_encoder(self.schedule.momentum_at(self.count))
            with torch.no_grad():
                k1_BP, k2_BP = networks.momentum(one), networks.momentum(two)
        loss = self._contrast(q1_BP, k2_BP) + self._contrast(q2_BP, k1_BP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate_at(self.count)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.count += 1
        return loss.detach()

    def _contrast(self, q_BP: Tensor, k_BP: Tensor) -> Tensor:
        accurate = torch.promote_types(q_BP.dtype, torch.float32)
        q_BP, k_BP = F.normalize(q_BP.to(accurate), dim=1), F.normalize(k_BP.to(accurate), dim=1)
        logits_BB = torch.einsum("qp,kp->qk", q_BP, k_BP) / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits_BB, torch.arange(len(q_BP), device=q_BP.device))


# ---- networks


class Networks(nn.Module):
    """Base encoder, momentum encoder and predictor; their tensors have the names that models.moco gives them."""

    def __init__(self, architecture: Architecture, recipe: Pretrain, *, fused: bool):
        super().__init__()
        built = architecture.build()
        hidden, out = recipe.model.projector_hidden_dim, recipe.model.output_dim
        make = partial(_Encoder, architecture, built, hidden, out, fused=fused)
        self.base, self.momentum = make(), make().requires_grad_(False)
        self.predictor = _head(out, hidden, out, layers=2, last_norm=built.is_vit)
        if recipe.model.freeze_patch_projection:
            self.base.trunk.get_submodule("patch_embed.proj").requires_grad_(False)

    @torch.no_grad()
    def move_momentum_encoder(self, momentum: float) -> None:
        for slow, fast in zip(self.momentum.parameters(), self.base.parameters(), strict=True):
            slow.mul_(momentum).add_(fast, alpha=1 - momentum)


class _Encoder(nn.Module):
    def __init__(self, architecture: Architecture, built: Trunk, hidden_dim: int, output_dim: int, *, fused: bool):
        super().__init__()
        self.trunk = plain_trunk(architecture, fused=fused)
        layers = 3 if built.is_vit else 2
        self.projector = _head(built.width, hidden_dim, output_dim, layers=layers, last_norm=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.trunk(images))


def plain_trunk(architecture: Architecture, *, fused: bool = True) -> nn.Module:
    """timm's or torchvision's own network, with plain BatchNorm; of a timm trunk the one that the engine trains.

    fused: attention in one kernel, or its products and softmax one after another.
    """
    words = dict(architecture.arguments)
    if architecture.kind == "vit":
        trunk = _plain_vit(**words)
    elif architecture.kind == "resnet":
        trunk = ResNet(Bottleneck, words["layers"], width_per_group=words["width_per_group"])
        setattr(trunk, "fc", nn.Identity())  # noqa: B010 (typed as Linear)
    else:
        trunk = architecture.build().module
    for module in trunk.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return trunk


def _plain_vit(image_size: int, patch_size: int, dim: int, depth: int, heads: int, conv_stem: bool) -> nn.Module:
    trunk = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
        **({"embed_layer": _PlainConvStem} if conv_stem else {}),
    )
    trunk.pos_embed.requires_grad_(False)
    return trunk


class _PlainConvStem(nn.Module):
    """Convolutions of stride 2 with BatchNorm and ReLU, whose widths double up to D, and one of 1x1."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise([in_chans, *(embed_dim >> n for n in reversed(range(halvings)))]):
            convolution = nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide_out), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))
        self.num_patches = (-(-img_size // patch_size)) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def _head(in_dim: int, hidden_dim: int, out_dim: int, *, layers: int, last_norm: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    for wide_in, wide_out in pairwise([in_dim, *[hidden_dim] * (layers - 1), out_dim]):
        modules += [nn.Linear(wide_in, wide_out, bias=False), nn.BatchNorm1d(wide_out), nn.ReLU(inplace=True)]
    del modules[-2:]
    return nn.Sequential(*modules, *([nn.BatchNorm1d(out_dim, affine=False)] if last_norm else []))


# ---- optimizers


def build_optimizer(section: Optimizer, networks: Networks) -> torch.optim.Optimizer:
    parameters = [p for p in networks.parameters() if p.requires_grad]
    if section.name == "lars":
        return _Lars(parameters, {"lr": 0.0, "weight_decay": section.weight_decay})
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=section.weight_decay, foreach=False)


class _Lars(torch.optim.Optimizer):
    """LARS, one parameter after another."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, group["lr"], group["weight_decay"])

    def _update(self, p: Tensor, lr: float, weight_decay: float) -> None:
        update = p.grad
        if p.ndim > 1:
            update = update.add(p, alpha=weight_decay)
            of_p, of_update = p.norm(), update.norm()
            ratio = torch.where((of_p > 0) & (of_update > 0), 0.001 * of_p / of_update, 1.0)
            update = update * ratio
        mu = self.state[p].setdefault("mu", torch.zeros_like(p))
        mu.mul_(0.9).add_(update)
        p.add_(mu, alpha=-lr)
