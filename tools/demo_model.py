"""The demo's architecture, and a fast training forward with the same parameters and the same maths.

transformers' sparse layer loops over experts with a mask for each; here the tokens are sorted by expert once.
Padding is neither routed nor counted in the router's losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_tokenizer import PIECES, SENTINELS
from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP


def config() -> SwitchTransformersConfig:
    """Eight experts in every second layer, 7.4 million parameters in all."""
    settings = SwitchTransformersConfig(
        architectures=["SwitchTransformersForConditionalGeneration"],
        vocab_size=PIECES + SENTINELS,
        d_model=192,
        d_kv=32,
        d_ff=352,
        num_heads=6,
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_experts=8,
        expert_capacity=64,
        router_jitter_noise=0.01,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.001,
        router_dtype="float32",
        dropout_rate=0.0,
        tie_word_embeddings=True,
    )
    settings.decoder_start_token_id = 0
    return settings


@dataclass
class Routing:
    """What the sparse layers share with the training loop during one forward pass."""

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    balance: list[torch.Tensor] = field(default_factory=list)
    z: list[torch.Tensor] = field(default_factory=list)
    load: dict[str, torch.Tensor] = field(default_factory=dict)

    def start(self, encoder: torch.Tensor, decoder: torch.Tensor) -> None:
        """Forget the last pass; masks are [batch, tokens], true for real tokens."""
        self.masks = {"encoder": encoder, "decoder": decoder}
        self.balance, self.z = [], []


def build(routing: Routing) -> SwitchTransformersForConditionalGeneration:
    """A fresh model whose sparse layers run the fast forward and report to routing."""
    model = SwitchTransformersForConditionalGeneration(config())
    for name, module in model.named_modules():
        if isinstance(module, SwitchTransformersSparseMLP):
            _speed_up(module, name, routing)
    return model


@torch.no_grad()
def align_sentinels(model: SwitchTransformersForConditionalGeneration, sentinels: int = 10, gain: float = 0.35) -> None:
    """Let the first two heads of the lower cross-attentions find the input's ``<extra_id_3>`` for the output's.

    Small models need a very long time to discover which blank a sentinel of the output means. Once the embeddings have
    settled it can be said in the weights: queries and keys of these heads become the sentinels' own directions.
    """
    size = model.config.d_kv
    ids = model.config.vocab_size - 1 - torch.arange(sentinels)
    directions = torch.nn.functional.normalize(model.shared.weight[ids], dim=-1) * gain**0.5
    blocks: Any = model.decoder.block
    for block in blocks[: len(blocks) // 2]:
        attention = block.layer[1].EncDecAttention
        for head in range(2):
            rows = slice(head * size, (head + 1) * size)
            for projection in (attention.q, attention.k):
                projection.weight[rows] *= 0.1
                projection.weight[head * size : head * size + sentinels] = directions


@torch.no_grad()
def look_around(model: SwitchTransformersForConditionalGeneration) -> None:
    """Let some heads look at a token's neighbours: the position biases start near 0, and learn too slowly to get far.

    The step of ScaledAdam goes with a tensor's size, so a bias near 0 stays there for thousands of steps, and without
    positions an encoder sees a bag of words.
    """
    # Distance buckets: in the encoder 0 to 15 lie before a token, 16 to 31 after it; in the decoder all lie before.
    distance = torch.arange(16.0)
    stacks: list[Any] = [model.encoder, model.decoder]
    encoder, decoder = (stack.block[0].layer[0].SelfAttention.relative_attention_bias for stack in stacks)
    encoder.weight[1, 0] = encoder.weight[17, 1] = 4.0
    encoder.weight[:16, 2] = encoder.weight[16:, 2] = -0.4 * distance
    encoder.weight[2, 3] = encoder.weight[18, 3] = 3.0
    decoder.weight[1, 0] = 4.0
    decoder.weight[:16, 1] = -0.3 * distance


def _speed_up(mlp: SwitchTransformersSparseMLP, name: str, routing: Routing) -> None:
    stack = name.split(".")[0]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return _sparse_forward(mlp, hidden, routing, stack, name)

    # An instance attribute: the class, and so every other model, keeps transformers' own forward.
    mlp.__dict__["forward"] = forward


def _sparse_forward(
    mlp: SwitchTransformersSparseMLP, hidden: torch.Tensor, routing: Routing, stack: str, name: str
) -> torch.Tensor:
    """Top-1 routing of hidden [batch, tokens, d_model] with capacity per sequence, as transformers does it."""
    router = mlp.router
    mask = routing.masks[stack]
    with torch.autocast("cpu", enabled=False):
        routed = hidden.float()
        if mlp.training:
            noise = torch.empty_like(routed)
            routed = routed * noise.uniform_(1 - router.jitter_noise, 1 + router.jitter_noise)
        logits = F.linear(routed, router.classifier.weight.float())
        probs = logits.softmax(-1)
    top, chosen = probs.max(-1)
    one_hot = F.one_hot(chosen, router.num_experts)
    within = (one_hot.cumsum(-2) * one_hot).sum(-1) <= router.expert_capacity

    real = mask.float()
    count = real.sum()
    share = (one_hot * real[..., None]).sum((0, 1)) / count
    mean_prob = (probs * real[..., None]).sum((0, 1)) / count
    routing.balance.append(router.num_experts * (share.detach() * mean_prob).sum())
    routing.z.append((logits.logsumexp(-1) ** 2 * real).sum() / count)
    routing.load[name] = share.detach() * count + routing.load.get(name, 0.0)

    flat = hidden.reshape(-1, hidden.shape[-1])
    kept = (mask & within).reshape(-1).nonzero()[:, 0]
    experts = chosen.reshape(-1)[kept]
    order = kept[experts.argsort()]
    sizes = torch.bincount(experts, minlength=router.num_experts).tolist()
    outputs = []
    for index, part in enumerate(torch.split(flat[order], sizes)):
        expert: Any = mlp.experts[f"expert_{index}"]
        outputs.append(F.linear(expert.dropout(F.linear(part, expert.wi.weight).relu()), expert.wo.weight))
    weighted = torch.cat(outputs).float() * top.reshape(-1)[order, None]
    return torch.zeros_like(flat, dtype=torch.float32).index_copy(0, order, weighted).view(hidden.shape)


def export(model: SwitchTransformersForConditionalGeneration, folder: Path) -> None:
    """Write the weights in bf16 as an ordinary checkpoint, with its config and generation config."""
    plain = SwitchTransformersForConditionalGeneration(config())
    plain.load_state_dict(model.state_dict())
    plain.bfloat16().save_pretrained(folder)
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_new_tokens=64
    )
    generation.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


class ScaledAdam:
    """AdamW without decay whose step is scaled by each tensor's own size, as Adafactor's is (nanoT5's recipe).

    T5's embeddings have entries near 1 and its matrices near 0.05: one learning rate for both needs this.
    """

    def __init__(self, parameters: list[torch.Tensor], betas: tuple[float, float] = (0.9, 0.98)) -> None:
        """Keep first and second moments for parameters."""
        self.parameters = parameters
        self.betas = betas
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update from the gradients, then clear them."""
        self.steps += 1
        # An expert that got no token has no gradient; zeros let its moments fade like everybody's.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_lerp_(self.first, grads, 1 - self.betas[0])
        torch._foreach_mul_(self.second, self.betas[1])
        torch._foreach_addcmul_(self.second, grads, grads, 1 - self.betas[1])
        scale = torch._foreach_div(self.second, 1 - self.betas[1] ** self.steps)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        update = list(torch._foreach_div(self.first, scale))
        norms = torch._foreach_norm(self.parameters)
        sizes = [max(1e-3, float(n) / p.numel() ** 0.5) for n, p in zip(norms, self.parameters, strict=True)]
        correction = rate / (1 - self.betas[0] ** self.steps)
        torch._foreach_mul_(update, [size * correction for size in sizes])
        torch._foreach_sub_(self.parameters, update)
        for p in self.parameters:
            p.grad = None
