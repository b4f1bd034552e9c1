"""Linear layers that read the same input, as one product.

The weights lie one after another in one parameter of a :class:`Joint`; each layer becomes a :class:`Part`, whose weight
is a view of its rows. Code that calls the layers one by one stays as it is: the first call computes all of them, the
others find their share. Saved and loaded states keep the layers' own names.

Shapes: I features in; O features out of one part; ``...`` any leading dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Joint(nn.Module):
    """One product for several parts. Holds the parameters; the parts' names stand for them in a state dict."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linears: Sequence[nn.Linear], product: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.sizes = tuple(linear.out_features for linear in linears)
        self.product = product
        self.held: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        with torch.no_grad():
            needs_gradient = linears[0].weight.requires_grad
            self.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), needs_gradient)
            biases = [linear.bias.data for linear in linears if linear.bias is not None]
            self.bias = nn.Parameter(torch.cat(biases), needs_gradient) if biases else None

    def share(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The product of part ``index``. The last part lets go of what the first has computed."""
        held = self.held
        if held is None or held[0] is not x:
            pieces = self.product(x, self.weight, self.bias).split(self.sizes, dim=-1)
            held = self.held = (x, tuple(pieces))
        if index == len(self.sizes) - 1:
            self.held = None
        return held[1][index]

    def rows(self, index: int) -> slice:
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, sizes={self.sizes}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the parts save their own rows."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Nothing: the parts load their own rows."""


class Part(nn.Module):
    """One of the layers. ``joint`` is registered with the first part only, so that parameters are listed once."""

    def __init__(self, linear: nn.Linear, joint: Joint, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.index = index
        if index == 0:
            self.joint = joint
        self._shared = (joint,)

    @property
    def joint_weight(self) -> nn.Parameter:
        """The parameter that :attr:`weight` is a view of."""
        return self._shared[0].weight

    @property
    def weight(self) -> torch.Tensor:
        """[O, I], a view."""
        joint = self._shared[0]
        return joint.weight[joint.rows(self.index)]

    @property
    def bias(self) -> torch.Tensor | None:
        """[O], a view."""
        joint = self._shared[0]
        return None if joint.bias is None else joint.bias[joint.rows(self.index)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared[0].share(self.index, x)

    def split_off(self, like: nn.Linear) -> nn.Linear:
        """``like`` with this part's weights again, in memory of its own."""
        needs_gradient = self._shared[0].weight.requires_grad
        like.weight = nn.Parameter(self.weight.detach().clone(), needs_gradient)
        bias = self.bias
        like.bias = None if bias is None else nn.Parameter(bias.detach().clone(), needs_gradient)  # type: ignore[assignment]
        return like

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _own(self) -> Mapping[str, torch.Tensor]:
        bias = self.bias
        return {"weight": self.weight} if bias is None else {"weight": self.weight, "bias": bias}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, view in self._own().items():
            destination[prefix + name] = view if keep_vars else view.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self._own()
        for name, view in own.items():
            given = state_dict.get(prefix + name)
            if given is None:
                if strict:
                    missing_keys.append(prefix + name)
            elif given.shape != view.shape:
                error_msgs.append(f"{prefix}{name}: shape {tuple(given.shape)} instead of {tuple(view.shape)}")
            else:
                with torch.no_grad():
                    view.copy_(given)
        if strict:
            known = {prefix + name for name in own}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
