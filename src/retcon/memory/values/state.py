"""The state of a search: vectors, Adam's moments, step counts and what was reached, one place per edit.

Everything is a tensor on its device, so that a step never waits for the CPU. Ended places keep what they have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory.values.objective import Loss, ValueSearch, ValueSite

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's."""


@dataclass
class SearchState:
    """The places of a batch; lists have one tensor per site."""

    going: Bool[Tensor, " places"]
    """Whether the place's edit is still searched; not so in places that are there for the batch's shape."""
    reached: Bool[Tensor, " places"]
    """Whether the stop rule has ended it."""
    steps: Int[Tensor, " places"]
    """Updates made."""
    nll_factor: Float[Tensor, " places"]
    """Weight of the nll in the next step's loss."""
    terms: Float[Tensor, "4 places"]
    """Of the last step before the end: probability, nll, kl and loss, in float64."""
    init: list[Float[Tensor, "places d"]]
    activation: list[Float[Tensor, "places d"]]
    offset: list[Float[Tensor, "places d"]]
    mean: list[Float[Tensor, "places d"]]
    """Adam's first moment."""
    square: list[Float[Tensor, "places d"]]
    """Adam's second moment."""
    original: Float[Tensor, "places vocab"] | None = None
    """Log-probabilities at the KL row's subject before any change."""
    rates: list[Float[Tensor, "2 steps"]] = field(default_factory=list)
    """Adam's step size and root correction after n + 1 updates, per site."""

    @classmethod
    def new(
        cls,
        lm: LM,
        sites: Sequence[ValueSite],
        n: int,
        clean: Sequence[Float[Tensor, "n d"] | None],
        search: ValueSearch,
    ) -> "SearchState":
        """Return the state of n edits before their first step.

        Args:
            clean: per site, the clean activations where they are known; None: the first step finds them.
        """
        dtype = torch.promote_types(lm.dtype, torch.float32)
        device = lm.device
        zeros = [_zeros(lm, site.point, n, dtype) for site in sites]
        known = [z.clone() if x is None else x.to(z) for x, z in zip(clean, zeros, strict=True)]
        beta, beta2 = BETAS
        size = [search.learning_rate / (1 - beta**t) for t in range(1, search.steps + 1)]
        root = [math.sqrt(1 - beta2**t) for t in range(1, search.steps + 1)]
        return cls(
            going=torch.ones(n, dtype=torch.bool, device=device),
            reached=torch.zeros(n, dtype=torch.bool, device=device),
            steps=torch.zeros(n, dtype=torch.long, device=device),
            nll_factor=torch.ones(n, dtype=dtype, device=device),
            terms=torch.zeros(4, n, dtype=torch.float64, device=device),
            init=[x.clone() for x in known],
            activation=known,
            offset=[z.clone() for z in zeros],
            mean=[z.clone() for z in zeros],
            square=zeros,
            rates=[z.new_tensor([size, root]) for z in zeros],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all that changes in the course of a search, by name."""
        names = ("going", "reached", "steps", "nll_factor", "terms")
        found: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        for name in ("init", "activation", "offset", "mean", "square"):
            found |= {f"{name}.{s}": x for s, x in enumerate(getattr(self, name))}
        return found if self.original is None else {**found, "original": self.original}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, named as `tensors` names them, for those that change."""
        for name in ("going", "reached", "steps", "nll_factor", "terms"):
            setattr(self, name, tensors[name])
        for name in ("init", "activation", "offset", "mean", "square"):
            setattr(self, name, [tensors[f"{name}.{s}"] for s in range(len(self.rates))])
        self.original = tensors.get("original")

    @classmethod
    def from_tensors(
        cls, lm: LM, sites: Sequence[ValueSite], tensors: Mapping[str, Tensor], search: ValueSearch
    ) -> "SearchState":
        """Return the state that `tensors` gave, on the devices of a search by `lm`."""
        state = cls.new(lm, sites, len(tensors["going"]), [None] * len(sites), search)
        for name in ("going", "reached", "steps", "nll_factor", "terms"):
            setattr(state, name, tensors[name].to(getattr(state, name).device, copy=True))
        for name in ("init", "activation", "offset", "mean", "square"):
            own = getattr(state, name)
            own[:] = [tensors[f"{name}.{s}"].to(x.device, copy=True) for s, x in enumerate(own)]
        if "original" in tensors:
            state.original = tensors["original"].to(state.going.device, copy=True)
        return state

    def rearranged(self, order: Int[Tensor, " places"], new: "SearchState") -> "SearchState":
        """Return a state with these places of this one and a new one, whose places are numbered after this one's."""

        def joined(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([one, other]).index_select(0, order.to(one.device))

        def of_sites(name: str) -> list[Tensor]:
            return [joined(one, other) for one, other in zip(getattr(self, name), getattr(new, name), strict=True)]

        original = self.original
        if original is not None:
            original = joined(original, original.new_zeros(len(new.going), original.shape[1]))
        return SearchState(
            going=joined(self.going, new.going),
            reached=joined(self.reached, new.reached),
            steps=joined(self.steps, new.steps),
            nll_factor=joined(self.nll_factor, new.nll_factor),
            terms=joined(self.terms.T, new.terms.T).T,
            init=of_sites("init"),
            activation=of_sites("activation"),
            offset=of_sites("offset"),
            mean=of_sites("mean"),
            square=of_sites("square"),
            original=original,
            rates=self.rates,
        )

    @torch.no_grad()
    def take(self, loss: Loss, search: ValueSearch) -> None:
        """Take in what a step found, and end the edits that are done."""
        last = self.steps == search.steps - 1
        over = loss.over(search)
        found = torch.stack([loss.probability, loss.nll, loss.kl, loss.total]).double()
        self.terms = torch.where(self.going, found, self.terms)
        self.reached = torch.where(self.going, over, self.reached)
        self.nll_factor = loss.next_nll_factor(search)
        self.going = self.going & ~(over | last | ~self.terms[3].isfinite())

    @torch.no_grad()
    def descend(self, gradients: Sequence[Float[Tensor, "places d"]], sites: Sequence[ValueSite]) -> None:
        """Make one step of Adam in every place that is going, by its own count, and bring it back onto its ball."""
        self.steps = self.steps + self.going
        beta, beta2 = BETAS
        for s, (site, gradient) in enumerate(zip(sites, gradients, strict=True)):
            going = self.going.to(gradient.device)[:, None]
            size, root = self.rates[s][:, (self.steps.to(gradient.device) - 1).clamp(min=0)][:, :, None]
            mean = self.mean[s].lerp(gradient, 1 - beta)
            square = (self.square[s] * beta2).addcmul(gradient, gradient, value=1 - beta2)
            offset = self.offset[s] - size * mean / (square.sqrt() / root + EPS)
            radius = site.clamp * self.init[s].norm(dim=1, keepdim=True)
            length = offset.norm(dim=1, keepdim=True)
            offset = torch.where(length > radius, offset * (radius / length), offset)
            for kept, new in ((self.mean, mean), (self.square, square), (self.offset, offset)):
                kept[s] = torch.where(going, new, kept[s])


def _zeros(lm: LM, point: Point, n: int, dtype: torch.dtype) -> Float[Tensor, "n d_model"]:
    """Return vectors of the residual stream's width on the device of the point's block."""
    return torch.zeros(n, lm.d_model, dtype=dtype, device=lm.site(point.layer, "o_proj").device)
