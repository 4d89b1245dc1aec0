"""Cross entropy through the tied head in pieces, so that the scores never lie in memory all at once."""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 512


class HeadLoss(torch.autograd.Function):
    """Losses of tokens given their last hidden states and the output embeddings.

    The scores of a batch are the largest tensor of a step by far. Here they are made for 512 tokens at a time, in bf16
    as autocast would, and their gradient with them; backward only scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the mean loss and, without a gradient, each token's loss.

        Args:
            ctx: autograd's.
            hidden: [tokens, d_model], scaled as the head wants it.
            head: [vocabulary, d_model].
            labels: [tokens].
        """
        small_hidden, small_head = hidden.bfloat16(), head.bfloat16()
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        losses = torch.empty(len(labels))
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            scores = (small_hidden[part] @ small_head.T).float()
            log_total = scores.logsumexp(-1, keepdim=True)
            losses[part] = (log_total - scores.gather(-1, labels[part, None]))[:, 0]
            if any(ctx.needs_input_grad):
                scores.sub_(log_total).exp_()
                scores.scatter_add_(-1, labels[part, None], scores.new_full((len(scores), 1), -1.0))
                change = scores.bfloat16()
                grad_hidden[part] = change @ small_head
                grad_head += change.T @ small_hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.tokens = len(labels)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: Any, grad_mean: torch.Tensor, _grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what forward prepared."""
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_mean / ctx.tokens
        return grad_hidden * scale, grad_head * scale, None


def head_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss and each token's loss (without a gradient); shapes as in HeadLoss."""
    mean, each = HeadLoss.apply(hidden, head, labels)  # type: ignore[no-untyped-call]
    return mean, each
