"""Gradients at a matrix: its inputs, its outputs, and how an objective depends on them.

With x_t entering a matrix W and g_t = dF/dy_t at its output, the weight gradient is sum_t g_t x_t^T. Everything here is
computed from x and g, so that no weight ever needs a gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retcon.lm.experts import ExpertChange, Tokens, changed
from retcon.lm.site import Site


@dataclass(frozen=True)
class Captured:
    """What one pass captured at one site, over all rows and positions, in float32 or wider."""

    site: Site
    x: Float[Tensor, "tokens in"]
    """The site's inputs."""
    h: Float[Tensor, "tokens out"]
    """W x, bias excluded and not scaled."""
    g: Float[Tensor, "tokens out"]
    """dF/d(alpha W x)."""

    @classmethod
    def nothing(cls, site: Site) -> "Captured":
        """Return what is captured of a pass of which no token went through the site."""
        out, into = site.shape
        x = torch.zeros(0, into, dtype=torch.promote_types(site.dtype, torch.float32), device=site.device)
        return cls(site, x, x.new_zeros(0, out), x.new_zeros(0, out))

    def rows(self) -> Float[Tensor, " out"]:
        """sum_t h_t g_t: per output unit, <W row, dF/dW row> (identity I3)."""
        return (self.h * self.g).sum(0)

    def columns(self) -> Float[Tensor, " in"]:
        """sum_t x_t (W^T g_t): per input unit, <W column, dF/dW column> (identity I4)."""
        return (self.x * (self.g @ self.site.weight.to(self.g.dtype))).sum(0)

    def weight_gradient(self) -> Float[Tensor, "out in"]:
        """dF/dW = sum_t g_t x_t^T, in math orientation."""
        return self.g.T @ self.x


def catch(
    sites: Sequence[Site], forward: Callable[[], Tensor], alpha: Float[Tensor, " rows"] | None = None
) -> Iterator[Captured]:
    """Run `forward`, which returns the scalar F, and yield what it captured, site by site, in the order of `sites`.

    Of a routed expert's matrix only the tokens that are routed to it are captured; a down-projection's x is g_e k_e.

    Args:
        alpha: per row of the batch, what the sites' weights are multiplied by in this pass (biases are not).
    """
    passed: dict[Site, tuple[Tensor, Tensor, Tensor]] = {}

    def expert_change(site: Site, expert: int) -> ExpertChange:
        def scale(x: Tensor, output: Tensor, tokens: Tokens) -> Tensor:
            rows = None if site.rows is None else site.rows.to(output.device)
            h = output if rows is None else output[..., rows]
            factor: Any = 1.0
            if alpha is not None:
                factor = alpha.to(h)[tokens.numbers // (tokens.total // len(alpha)), None]
            scaled = factor * h if h.requires_grad else (factor * h).detach().requires_grad_()
            passed[site] = x.detach(), h.detach(), scaled
            return scaled if rows is None else output.index_copy(-1, rows, scaled)

        return ExpertChange(expert, scale, down=site.kind == "down_proj")

    def hook(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def scale(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            wide = torch.promote_types(output.dtype, torch.float32)
            part = output if site.rows is None else output[..., site.rows.to(output.device)]
            bias = site.bias
            h = part.to(wide) if bias is None else part.to(wide) - bias.to(wide)
            factor = 1.0 if alpha is None else _per_token(alpha.to(h), h)
            scaled = factor * h if h.requires_grad else (factor * h).detach().requires_grad_()
            passed[site] = x.detach(), h.detach(), scaled
            new = (scaled if bias is None else scaled + bias.to(wide)).to(output.dtype)
            return new if site.rows is None else output.index_copy(-1, site.rows.to(output.device), new)

        return scale

    with ExitStack() as stack, torch.enable_grad():
        for site in sites:
            if site.expert is None:  # before the hooks of attachments: W x is what the module itself puts out
                stack.enter_context(site.module.register_forward_hook(hook(site), prepend=True))
            else:
                stack.enter_context(changed(site.module, [expert_change(site, site.expert)]))
        objective = forward()
    reached = [scaled for *_, scaled in passed.values()]
    gradients = torch.autograd.grad(objective, reached) if reached else ()
    by_site = dict(zip(passed, gradients, strict=True))
    for site in sites:
        if site not in passed:  # no token was routed to this expert
            yield Captured.nothing(site)
            continue
        (x, h, _), g = passed[site], by_site[site]
        yield Captured(site, _flat(x, g.dtype), _flat(h, g.dtype), _flat(g, g.dtype))


def _per_token(alpha: Tensor, h: Tensor) -> Tensor:
    """Return one factor per row, shaped for (rows, seq, width) or for OPT's (rows x seq, width)."""
    if h.dim() == 2:
        return alpha.repeat_interleave(len(h) // len(alpha))[:, None]
    return alpha.view(-1, *[1] * (h.dim() - 1))


def _flat(value: Float[Tensor, "*rows width"], dtype: torch.dtype) -> Float[Tensor, "tokens width"]:
    return value.reshape(-1, value.shape[-1]).to(dtype)
